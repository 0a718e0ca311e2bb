"""`mige-rt annotate`: people make a benchmark of editing pairs."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from mige_rt.cli.shared import PATH
from mige_rt.errors import InputError, requires
from mige_rt.terminal import echo, report

_DECISIONS = click.argument("decisions", type=PATH, nargs=-1, required=True)
_ROOT = click.option("--root", type=PATH, help="folder that the manifest's paths are relative to  [default: its own]")


@click.group()
def annotate() -> None:
    """Make a benchmark of editing pairs by hand.

    Pairs come from a manifest, as mige-rt convert-data and python -m trainer.synthetic.manifest write one, or from the
    JSON that the paper's authors publish. Decisions are JSON lines that are only added to.
    """


@annotate.command()
@click.argument("manifest", type=PATH)
@_ROOT
@click.option("--decisions", type=PATH, required=True, help="JSON lines to write, or to go on with")
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on; 0.0.0.0: all of them")
@click.option("--port", type=click.IntRange(0, 65535), default=8002, show_default=True, help="0: a free one")
def page(manifest: Path, root: Path | None, decisions: Path, host: str, port: int) -> None:
    """Show the pairs of a manifest on a page, to keep, correct or drop.

    \b
      mige-rt annotate page data/manifest.jsonl --decisions decisions.jsonl
      mige-rt annotate export data/manifest.jsonl decisions.jsonl --out benchmark
      mige-rt eval run --benchmark migebench:benchmark --out evaluation

    Several people may annotate on one page at once. Whoever comes back goes on under the same name. There is no
    password: whoever reaches the page can write to the file, so it listens on this machine alone by default.
    """
    with requires("annotate", "the annotation page"):
        from benchmarks.annotation.annotating import Annotating
        from benchmarks.annotation.decisions import DecisionLog
        from benchmarks.annotation.page import create_app
        from benchmarks.annotation.pairs import open_pairs
        from mige_rt.serve.server import serve_page

    if not decisions.absolute().parent.is_dir():
        raise InputError(f"{decisions} cannot be written: {decisions.parent} is no folder; make it first")
    pairs = open_pairs(manifest, root)
    annotating = Annotating(pairs, DecisionLog(decisions))
    with TemporaryDirectory(prefix="mige-rt-annotate-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # the images that it has shown do not stay
        serve_page(create_app(annotating), host, port, f"{len(pairs)} editing pairs; decisions go to {decisions}")


@annotate.command()
@click.argument("manifest", type=PATH)
@_DECISIONS
@_ROOT
@click.option("--out", type=PATH, required=True, help="folder to make")
@click.option("--title", default="Benchmark", show_default=True, help="of the datasheet")
def export(manifest: Path, decisions: tuple[Path, ...], root: Path | None, out: Path, title: str) -> None:
    """Write what was kept as a benchmark in MIGEBench's layout, with a datasheet.

    A pair is in where more annotators keep than drop it, with the annotation of the latest decision to keep.
    """
    with requires("annotate", "exporting a benchmark"):
        from benchmarks.annotation.decisions import Standing, read_decisions
        from benchmarks.annotation.export import export_benchmark
        from benchmarks.annotation.pairs import open_pairs

    selection = export_benchmark(open_pairs(manifest, root), Standing(read_decisions(decisions)), out, title)
    report(
        f"{len(selection.kept)} samples; left out: {selection.dropped} dropped, {selection.disputed} disputed, "
        f"{selection.undecided} not decided on"
    )
    echo(out)


@annotate.command()
@click.argument("manifest", type=PATH)
@_DECISIONS
@_ROOT
def status(manifest: Path, decisions: tuple[Path, ...], root: Path | None) -> None:
    """Print each annotator's progress by category, and how far they agree (Cohen's kappa)."""
    with requires("annotate", "reading decisions"):
        from benchmarks.annotation.decisions import Standing, progress_rows, read_decisions
        from benchmarks.annotation.export import agreement_table
        from benchmarks.annotation.pairs import open_pairs, proposed_categories
        from export.formatting import markdown_table

    categories = proposed_categories(open_pairs(manifest, root))
    standing = Standing(read_decisions(decisions))
    standing.check_pairs(categories)
    for name in standing.annotators():
        echo(f"{name}:")
        for line in markdown_table(progress_rows(categories, standing.by_pair(name)), ("category",)).split("\n"):
            echo(line)
    agreement = agreement_table(standing, {name: name for name in standing.annotators()})
    for line in (agreement or "No two annotators have decided on the same pair.").split("\n"):
        echo(line)


COMMANDS = (page, export, status)
