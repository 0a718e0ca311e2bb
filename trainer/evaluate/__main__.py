"""`python -m trainer.evaluate --assets DIR --out DIR`: measure a model on concepts that were held out from training.

Writes evaluation.json (all metrics), evaluation.md (tables), preview.png and grid.webp (the first samples of each
kind, not selected); with --guidance, guidance.json and guidance.png instead: what the two scales and the number of
steps do, on concepts that the model was trained on.
"""

from pathlib import Path
from typing import Any

import click

from mige_rt.errors import InputError
from trainer.evaluate.options import EVALUATION_SAMPLES, GUIDANCE_SAMPLES, EvaluationOptions


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option(
    "--model", type=click.Path(path_type=Path), help="a bundle or a model folder  [default: the one with mige-rt]"
)
@click.option("--engine", default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1")
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "fp16", "bf16", "int8"]), default="auto", show_default=True
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    help=f"of each kind  [default: {EVALUATION_SAMPLES}; {GUIDANCE_SAMPLES} for --guidance]",
)
@click.option("--seed", type=click.IntRange(0), help="of the series of samples, and of the images' noise")
@click.option(
    "--assets",
    type=click.Path(path_type=Path),
    metavar="ASSETS",
    required=True,
    help="folder of emoji images made by python -m trainer.synthetic.fetch",
)
@click.option("--guidance", is_flag=True, help="measure what guidance scales and steps do instead")
@click.option("--paste-back", is_flag=True, help="as of mige-rt run: what it does to an edit's figures")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="folder to make")
def main(**options: Any) -> None:
    """Parse the options and run; bad input ends with exit code 2."""
    from rich.console import Console
    from rich.progress import Progress

    from mige_rt.atomic import atomic_folder

    try:
        from trainer.evaluate.run import run
    except ModuleNotFoundError as error:
        raise click.UsageError(
            f"the package {error.name} is not installed; install it with: pip install 'mige-rt[eval]'"
        ) from error

    parsed = EvaluationOptions(**options)
    console = Console(stderr=True)
    try:
        with (
            atomic_folder(parsed.out) as folder,
            Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
        ):
            task = bar.add_task("")
            report = run(
                parsed,
                folder,
                lambda description, done, total: bar.update(task, description=description, completed=done, total=total),
            )
    except InputError as error:
        raise click.UsageError(str(error)) from error
    if report is not None:
        click.echo(report)
    click.echo(parsed.out)


if __name__ == "__main__":
    main()
