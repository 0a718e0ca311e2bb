"""`python -m trainer.study`: train a study's arms from one common start, measure them, and write the report.

The same command goes on where it was stopped.
"""

import json
from dataclasses import asdict
from pathlib import Path

import click

from mige_rt.errors import InputError

CONFIG = Path(__file__).parent.parent / "configs" / "study"
PATH = click.Path(path_type=Path)


@click.command(help=__doc__)
@click.option("--config", type=PATH, default=CONFIG, show_default=True, help="folder of study.toml and the arms")
@click.option("--assets", type=PATH, required=True, help="folder made by python -m trainer.synthetic.fetch")
@click.option("--state", type=PATH, required=True, help="state folder after the stages looks and qformer")
@click.option("--start", type=PATH, help="model folder or bundle that these stages went on from, if they did")
@click.option("--out", type=PATH, required=True, help="the study's folder: runs, features, and the report")
def main(config: Path, assets: Path, state: Path, start: Path | None, out: Path) -> None:
    """Parse the options and run; bad input ends with exit code 2."""
    try:
        run_study(config, assets, state, start, out)
    except InputError as error:
        raise click.UsageError(str(error)) from error


def run_study(config: Path, assets: Path, state: Path, start: Path | None, out: Path) -> None:
    """Run all arms that have no result yet, and write the report.

    Raises:
        InputError: What was given cannot be used.
    """
    from trainer.data.plan import write_plan
    from trainer.loop import check_one_process
    from trainer.plotting import check_matplotlib
    from trainer.study.config import load_study
    from trainer.study.measure import RESULT_FILE, HeldOut, measure_run
    from trainer.study.report import Report, Result
    from trainer.study.training import Workshop, train_arm, train_common
    from trainer.synthetic.concepts import load_concepts

    check_matplotlib()
    check_one_process("a study")
    study, concepts = load_study(config), load_concepts(assets)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error}); give a folder of your own") from error
    workshop = Workshop.open(study, concepts, state, start, out)
    train_common(workshop)
    held_out: dict[bool, HeldOut] = {}
    results: dict[str, dict[int, Result]] = {name: {} for name in study.arms}
    for seed in study.seeds:  # all arms of the first seed, so that a study that is stopped compares all of them
        for name, arm in study.arms.items():
            folder = out / f"{name}-{seed}"
            write_plan(folder, {name: value for name, value in asdict(arm).items() if name != "title"}, allowed=None)
            path = folder / RESULT_FILE
            if path.is_file():
                results[name][seed] = json.loads(path.read_text(encoding="utf-8"))
                continue
            module = train_arm(workshop, name, arm, seed, folder)
            if arm.multimodal not in held_out:
                held_out[arm.multimodal] = HeldOut.make(workshop, arm.multimodal)
            results[name][seed] = measure_run(workshop, arm, module, held_out[arm.multimodal], folder)
            click.echo(f"{name}, seed {seed}: {path}")
    Report(study, results).write(out)
    click.echo(out / "study.md")


if __name__ == "__main__":
    main()
