"""`mige-rt bench`."""

import sys
from pathlib import Path
from typing import Any, get_args

import click

from engines.factory import ENGINES
from mige_rt.cli.shared import INTERRUPTED, PATH, Scale, Size, command_line, progress, requires
from mige_rt.config import Precision


class _Values(tuple[Any, ...]):
    """Values that were given as one text, which they are again as a string."""

    text: str

    def __str__(self) -> str:
        return self.text


class _Several(click.ParamType):
    """Values separated by commas, each of a type."""

    def __init__(self, of: click.ParamType, name: str) -> None:
        self.of, self.name = of, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> _Values:
        if isinstance(value, _Values):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        found = _Values(self.of.convert(part, param, ctx) for part in parts)
        if len(set(found)) < len(found):
            self.fail(f"{value!r} names a value twice", param, ctx)
        found.text = str(value)
        return found


@click.command()
@click.option(
    "--model",
    "models",
    type=PATH,
    multiple=True,
    help="a bundle or a model folder; may be repeated, for bundles of one model in several precisions  [default: the "
    "model that comes with mige-rt]",
)
@click.option("--engines", type=_Several(click.Choice(ENGINES), "NAMES"), help="[default: all that work here]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1")
@click.option(
    "--precisions",
    type=_Several(click.Choice(get_args(Precision)), "NAMES"),
    help="bundles that are missing are exported for the time being  [default: the models' own]",
)
@click.option("--sizes", type=_Several(Size(), "SIZES"), help="as 512,768x512  [default: the model's trained size]")
@click.option(
    "--references",
    type=_Several(click.IntRange(1, 4), "NUMBERS"),
    default="1",
    show_default=True,
    help="pictures that a prompt refers to, the edited one included",
)
@click.option(
    "--batch", type=_Several(click.IntRange(1), "NUMBERS"), default="1", show_default=True, help="pictures made at once"
)
@click.option(
    "--steps", type=_Several(click.IntRange(2, 1000), "NUMBERS"), default="60", show_default=True, help="of the solver"
)
@click.option("--text-scale", type=Scale(), default=5.0, show_default=True, help="how strongly the words count")
@click.option("--source-scale", type=Scale(), default=1.0, show_default=True, help="how strongly the source counts")
@click.option("--runs", type=click.IntRange(1), default=10, show_default=True, help="that count, of each candidate")
@click.option("--warmups", type=click.IntRange(0), default=3, show_default=True, help="that do not count, before them")
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=True,
    show_default=True,
    help="PyTorch through torch.compile as well, which takes a minute or more to compile",
)
@click.option("--out", type=PATH, default=Path("report"), show_default=True, help="folder to make for the report")
def bench(
    models: tuple[Path, ...],
    engines: Any,
    device: str,
    precisions: Any,
    sizes: Any,
    references: Any,
    batch: Any,
    steps: Any,
    guidance_scale: float,
    image_guidance_scale: float,
    runs: int,
    warmups: int,
    compiled: bool,
    out: Path,
) -> None:
    """Measure how fast pictures are made here, beside the published program and beside what is possible.

    \b
      mige-rt bench
      mige-rt bench --engines onnxruntime,pytorch --precisions fp32,int8 --out report
      mige-rt bench --model bundle --references 1,2,4 --steps 20,60 --out report

    Edits pictures at the published settings with every engine, the program as published and other baselines taking
    turns, and writes report.html, report.md and report.json. Options that name several values are measured in all
    combinations. A row counts only if its pictures are those of PyTorch in float32. The exit code is 0 where all do,
    1 where some do not, 130 after Ctrl-C, which keeps what was measured.
    """
    with requires("bench", "the bench"):
        from benchmarks import bench as benching
        from benchmarks import formatting as words
        from benchmarks.report import write_report
    from mige_rt.atomic import atomic_folder
    from mige_rt.bundle import DEFAULT_MODEL

    plan = benching.Plan(
        models=models or (DEFAULT_MODEL,),
        engines=engines or ENGINES,
        device=device,
        precisions=precisions or (),
        sizes=sizes or (),
        references=references,
        batches=batch,
        steps=steps,
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
        effort=benching.Effort(runs, warmups),
        compile=compiled,
        command=command_line(),
    )
    with atomic_folder(out) as folder:
        with progress("bench") as advance:
            found = benching.bench(plan, advance)
        write_report(found, folder)
    for sentence in words.summary(found):
        click.echo(sentence, err=True)
    click.echo(out)
    if not found.complete:
        sys.exit(INTERRUPTED)
    if found.failed:
        sys.exit(1)
