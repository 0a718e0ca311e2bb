"""`python -m trainer STAGE --config FILE --assets DIR --state DIR`: the stages that make the default model, in order.

`python -m trainer train --config FILE --out DIR` is `mige-rt train`, as `accelerate launch -m trainer` starts it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mige_rt.cli.train import train
from mige_rt.errors import InputError

CONFIGS = Path(__file__).parent / "configs"
STAGES = ("vae", "vit", "looks", "qformer", "samples", "mige", "save", "rungs", "curve", "preview")
# Those that can go on from an existing model.
STAGES_WITH_START = ("looks", "qformer", "samples", "mige", "save", "rungs")


class _Commands(click.Group):
    """Bad input ends with exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise click.UsageError(str(error)) from error
        except OSError as error:  # the training goes on from the last state that was written whole
            raise click.UsageError(
                f"a file cannot be read or written ({error}): make room on the disk, or give another path"
            ) from error


@click.group(cls=_Commands, help=__doc__)
def main() -> None:
    """Run a stage, or a run."""


def _stage_command(stage: str) -> Callable[..., None]:
    @main.command(stage, help=f"The stage {stage}.")
    @click.option(
        "--config",
        type=click.Path(path_type=Path),
        default=CONFIGS / "tiny.toml",
        show_default="the default model's",
    )
    @click.option(
        "--assets",
        type=click.Path(path_type=Path),
        metavar="ASSETS",
        required=True,
        help="folder of emoji images made by python -m trainer.synthetic.fetch",
    )
    @click.option(
        "--state",
        type=click.Path(path_type=Path),
        required=True,
        help="folder for states, logs, previews; resumed from",
    )
    @click.option(
        "--start",
        type=click.Path(path_type=Path),
        help=f"model folder or bundle to go on from, for the stages {', '.join(STAGES_WITH_START)}; vae and vit are "
        "not needed then",
    )
    @click.option(
        "--processes",
        type=click.IntRange(1),
        show_default="1",
        help="that make samples, for the stage samples",
    )
    def command(config: Path, assets: Path, state: Path, start: Path | None, processes: int | None) -> None:
        if processes is not None and stage != "samples":
            raise click.UsageError(f"--processes means nothing to the stage {stage}, only to samples; leave it out")
        run_stage(stage, config, assets, state, start, processes or 1)

    return command


for _stage in STAGES:
    _stage_command(_stage)
main.add_command(train)


def run_stage(stage: str, config: Path, assets: Path, state: Path, start: Path | None, processes: int = 1) -> None:
    """Run one stage.

    Raises:
        InputError: What was given cannot be used.
    """
    from trainer.settings import load_settings
    from trainer.synthetic.concepts import load_concepts

    if start is not None and stage not in STAGES_WITH_START:
        raise InputError(
            f"--start means nothing to the stage {stage}, only to {', '.join(STAGES_WITH_START)}; leave it out"
        )
    settings = load_settings(config)
    model, all_concepts = settings.config(), load_concepts(assets)
    concepts = [concept for concept in all_concepts if not concept.held_out]
    if stage == "vae":
        from trainer.stages.train_vae import train_vae

        train_vae(model, settings.stage("vae"), concepts, state)
    elif stage == "vit":
        from trainer.stages.train_vit import train_vit

        train_vit(model, settings.stage("vit"), concepts, state)
    elif stage == "looks":
        from trainer.stages.train_looks import train_looks

        train_looks(model, settings.stage("looks"), all_concepts, state, start)
    elif stage == "qformer":
        from trainer.stages.train_qformer import train_qformer

        train_qformer(model, settings.stage("qformer"), all_concepts, state, start)
    elif stage == "samples":
        from trainer.stages.make_samples import make_samples

        ladder = settings.ladder()
        made = make_samples(model, settings.stage("mige"), ladder, all_concepts, state, start, processes)
        click.echo(f"{state / 'features'}: {made} shards of {ladder.shard_samples} samples")
    elif stage == "mige":
        from trainer.stages.train_mige import train_mige

        train_mige(model, settings.stage("mige"), settings.ladder(), all_concepts, state, start)
    elif stage == "save":
        from trainer.stages.save_model import save

        click.echo(save(model, state, start))
    elif stage == "rungs":
        from rich.console import Console

        from trainer.stages.measure_rungs import measure_rungs

        Console().print(measure_rungs(all_concepts, start or state / "model"))
    elif stage == "curve":
        from trainer.curve import plot_curve

        click.echo(plot_curve(state / "mige" / "log.jsonl", state / "curve.png"))
    else:
        from rich.console import Console

        from trainer.preview import preview

        Console().print(preview(concepts, state))


if __name__ == "__main__":
    main()
