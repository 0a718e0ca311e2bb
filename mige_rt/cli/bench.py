"""`mige-rt bench`."""

import sys
from pathlib import Path
from typing import Any, get_args

import click

from engines.factory import ENGINES
from mige_rt.cli.shared import INTERRUPTED, PATH, Scale, Several, Size, command_line, progress
from mige_rt.config import Precision
from mige_rt.errors import requires
from mige_rt.terminal import echo, report


@click.command()
@click.option(
    "--model",
    "models",
    type=PATH,
    multiple=True,
    help="a bundle or a model folder; may be repeated, for bundles of one model in several precisions  [default: the "
    "model that comes with mige-rt]",
)
@click.option("--engines", type=Several(click.Choice(ENGINES), "NAMES"), help="[default: all that work here]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1")
@click.option(
    "--precisions",
    type=Several(click.Choice(get_args(Precision)), "NAMES"),
    help="engines other than pytorch need a --model in each  [default: the models' own]",
)
@click.option("--sizes", type=Several(Size(), "SIZES"), help="as 512,768x512  [default: the model's trained size]")
@click.option(
    "--references",
    type=Several(click.IntRange(1, 4), "NUMBERS"),
    default="1",
    show_default=True,
    help="images that a prompt refers to, the edited one included",
)
@click.option(
    "--batch",
    "batches",
    type=Several(click.IntRange(1), "NUMBERS"),
    default="1",
    show_default=True,
    help="images made at once",
)
@click.option(
    "--num-inference-steps",
    "--steps",
    type=Several(click.IntRange(2, 1000), "NUMBERS"),
    default="60",
    show_default=True,
)
@click.option(
    "--guidance-scale",
    "--text-scale",
    type=Scale(),
    default=5.0,
    show_default=True,
    help="how strongly the text counts",
)
@click.option(
    "--image-guidance-scale",
    "--source-scale",
    type=Scale(),
    default=1.0,
    show_default=True,
    help="how strongly the source counts",
)
@click.option(
    "--iterations",
    "--runs",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="that count, of each candidate",
)
@click.option(
    "--warmup",
    "--warmups",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="iterations before them that do not count",
)
@click.option(
    "--compile/--no-compile",
    default=True,
    show_default=True,
    help="PyTorch through torch.compile as well, which takes a minute or more to compile",
)
@click.option("--out", type=PATH, default=Path("report"), show_default=True, help="folder to make for the report")
def bench(out: Path, **options: Any) -> None:
    """Measure how fast images are made here, beside the published variant and beside what is possible.

    \b
      mige-rt bench
      mige-rt bench --engines pytorch --precisions fp32,bf16 --out report
      mige-rt bench --model bundle --references 1,2,4 --steps 20,60 --out report

    Edits images at the published settings with every engine, the variant as published and other baselines taking
    turns, and writes report.html, report.md and report.json. Options that name several values are measured in all
    combinations. A result counts only if its images are those of PyTorch in float32. The exit code is 0 where all do,
    1 where some do not, 130 after Ctrl-C, which keeps what was measured.
    """
    with requires("bench", "the bench"):
        from benchmarks import bench as benchmark
        from benchmarks.report import summary, write_report
    from mige_rt.atomic import atomic_folder

    given = {
        name: value for name, value in options.items() if value not in (None, ())
    }  # the others have the defaults of BenchOptions
    with atomic_folder(out) as folder:
        with progress("bench") as advance:
            results = benchmark.bench(benchmark.BenchOptions(command=command_line(), **given), advance)
        write_report(results, folder)
    for sentence in summary(results.to_json()):
        report(sentence)
    echo(out)
    if not results.complete:
        sys.exit(INTERRUPTED)
    if results.failed:
        sys.exit(1)
