"""The command `mige-rt train`, which `accelerate launch -m trainer train` starts in many processes."""

from pathlib import Path
from typing import Any

import click

from mige_rt.cli.shared import PATH
from mige_rt.errors import InputError, requires
from mige_rt.terminal import echo


@click.command()
@click.option("--config", "config_file", type=PATH, required=True, help="YAML, as in trainer/configs")
@click.option("--out", type=PATH, help="the run's folder: checkpoints, metrics.jsonl, tensorboard")
@click.option(
    "--resume-from-checkpoint",
    "resume",
    metavar="latest|FOLDER",
    help="go on from a checkpoint; latest: from the last one in --out, if there is one",
)
@click.option("--max-steps", type=click.IntRange(1), help="stop after this step: 2 tries a config")
@click.option("--checkpoints-total-limit", "total_limit", type=click.IntRange(1), help="instead of the config's")
@click.option(
    "--estimate", is_flag=True, help="print memory and time instead of training; needs no files but the config"
)
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="of the estimate")
@click.option(
    "--tflops", type=click.FloatRange(1), default=400.0, show_default=True, help="that a GPU reaches, of the estimate"
)
@click.option(
    "--save-model",
    "model_out",
    type=PATH,
    help="make this model folder of the latest checkpoint, or --resume-from-checkpoint's, instead of training",
)
def train(config_file: Path, out: Path | None, **options: Any) -> None:
    """Train MIGE on prepared data, with the published recipe.

    \b
      mige-rt train --config trainer/configs/xl-1gpu.yaml --out runs/xl
      accelerate launch --num_processes 8 -m trainer train --config trainer/configs/xl-8gpu.yaml --out runs/xl
      mige-rt train --config trainer/configs/xl.yaml --estimate --gpus 48
    """
    with requires("train", "training"):
        from trainer.run.config import load_run_config, with_total_limit

        config = load_run_config(config_file)
        if options["total_limit"] is not None:
            config = with_total_limit(config, options["total_limit"])
        if options["estimate"]:
            from trainer.run.estimate import estimate

            for line in str(estimate(config, options["gpus"], options["tflops"] * 1e12)).split("\n"):
                echo(line)
            return
        if out is None:
            raise InputError("--out is missing: give the run's folder")
        if options["model_out"] is not None:
            from trainer.run.save import save_run

            echo(save_run(config, out, options["resume"], options["model_out"]))
            return
        from trainer.run.train import RunOptions, train_run
    train_run(config, RunOptions(out, options["resume"], options["max_steps"]))
