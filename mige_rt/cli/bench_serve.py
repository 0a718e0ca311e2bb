"""`mige-rt bench-serve`."""

import sys
from pathlib import Path
from typing import Any

import click

from mige_rt.cli.shared import INTERRUPTED, PATH, Several, command_line, model_options, progress
from mige_rt.errors import InputError, requires
from mige_rt.terminal import echo, report

_FOR_ALL = ("model", "engine", "device", "precision")  # options that `mige-rt serve` takes, too
_FOR_SOAKS = ("kills", "max_growth_mb")


@click.command()
@model_options
@click.option("--max-batch", type=click.IntRange(2), default=8, show_default=True, help="of the servers that batch")
@click.option(
    "--num-inference-steps", "--steps", type=click.IntRange(2, 100), help="[default: the model's for the task]"
)
@click.option(
    "--mixes",
    type=Several(click.Choice(["edits", "mixed"]), "NAMES"),
    default="edits,mixed",
    show_default=True,
    help="edits alone; generations, edits and both at once in turn",
)
@click.option(
    "--loads",
    type=Several(click.FloatRange(0, 10, min_open=True), "SHARES"),
    default="0.25,0.5,0.75,1,1.5",
    show_default=True,
    help="rates, as shares of what the server makes at most",
)
@click.option(
    "--seconds", type=click.FloatRange(0.5), default=6, show_default=True, help="that calls come for, in each round"
)
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True, help="of all rates")
@click.option(
    "--deadline",
    type=click.FloatRange(1),
    default=5,
    show_default=True,
    help="by when an image is of use, in times the latency of a call alone",
)
@click.option("--soak", type=click.FloatRange(0, min_open=True), metavar="MINUTES", help="a soak instead, of so long")
@click.option("--kills", type=click.IntRange(0), help="of the engine worker, in a soak  [default: 20]")
@click.option("--max-growth-mb", type=click.IntRange(1), help="of memory, in a soak  [default: 50]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="of when calls come")
@click.option("--out", type=PATH, default=Path("report"), show_default=True, help="folder to make for the report")
def bench_serve(out: Path, **values: Any) -> None:
    """Measure what mige-rt serve does under load, or try it for a while under kills, bad bodies and clients that go.

    \b
      mige-rt bench-serve --out serving
      mige-rt bench-serve --soak 10 --kills 20 --out soak

    The bench has three servers take turns with the same calls, which come at random at several rates: with continuous
    batching, with batches that start when the one before has ended, and with none. It writes serving.json, serving.md
    and a plot of each mix, and takes about 8 minutes.

    A soak writes soak.json and soak.md. The exit code is 1 if a request that was accepted was lost, an image is not
    the one that is made alone, or memory has grown. Ctrl-C ends either with 130, and keeps what was measured.
    """
    server = tuple(word for name in _FOR_ALL for word in _server_option(name, values[name]))
    is_soak = values["soak"] is not None
    for name in () if is_soak else _FOR_SOAKS:
        if values[name] is not None:
            raise InputError(f"--{name.replace('_', '-')} is of a soak; give --soak MINUTES, too")
    sys.exit(_soak(server, values, out) if is_soak else _bench(server, values, out))


def _bench(server: tuple[str, ...], values: dict[str, Any], out: Path) -> int:
    with requires("bench", "the bench"):
        from benchmarks.serving.bench import ServingOptions, bench_serving
        from benchmarks.serving.report import summary, write_report
    from mige_rt.atomic import atomic_folder

    names = ("mixes", "loads", "seconds", "rounds", "max_batch", "deadline", "num_inference_steps", "seed")
    options = ServingOptions(server=server, command=command_line(), **{name: values[name] for name in names})
    with atomic_folder(out) as folder:
        with progress("bench-serve") as advance:
            results = bench_serving(options, advance)
        write_report(results, folder)
    for sentence in summary(results.to_json()):
        report(sentence)
    echo(out)
    return 0 if results.complete else INTERRUPTED


def _soak(server: tuple[str, ...], values: dict[str, Any], out: Path) -> int:
    with requires("bench", "the bench"):
        from benchmarks.serving.soak import SoakOptions, soak, write_soak
    from mige_rt.atomic import atomic_folder

    given = {name: values[name] for name in _FOR_SOAKS if values[name] is not None}
    options = SoakOptions(
        server=server,
        minutes=values["soak"],
        max_batch=values["max_batch"],
        num_inference_steps=values["num_inference_steps"],
        seed=values["seed"],
        command=command_line(),
        **given,
    )
    with atomic_folder(out) as folder:
        with progress("soak") as advance:
            results = soak(options, advance)
        write_soak(results, folder)
    for sentence in results.failures or ["all is as it should be"]:
        report(sentence)
    echo(out)
    if not results.complete:
        return INTERRUPTED
    return 1 if results.failures else 0


def _server_option(name: str, value: str | None) -> list[str]:
    return [] if value is None else [f"--{name}", value]
