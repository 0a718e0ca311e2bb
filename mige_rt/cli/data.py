"""`mige-rt convert-data`: the way from published datasets to what training reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mige_rt.cli.shared import PATH, progress, requires
from mige_rt.errors import InputError

LAYOUTS = ("instructpix2pix", "magicbrush", "ultraedit", "seed-data-edit", "hq-edit", "gier", "subjects200k")

_FILTERS = click.option(
    "--filter/--no-filter",
    "filtered",
    default=True,
    show_default=True,
    help="leave out what the paper does: much wider than high, or a score too low",
)


@click.command("convert-data")
@click.option("--layout", type=click.Choice(LAYOUTS), required=True, help="which dataset it is")
@click.option("--data", type=PATH, required=True, help="the folder that the dataset was downloaded to, or its one file")
@click.option("--out", type=PATH, required=True, help="the folder to make, with manifest.jsonl")
@click.option("--image-column", help="of the image that should be made  [default: the layout's]")
@click.option("--source-column", help="of the image to edit  [default: the layout's]")
@click.option("--caption-column", help="of the instruction  [default: the layout's]")
@click.option(
    "--score-column",
    "scores",
    multiple=True,
    metavar="NAME=COLUMN",
    help="where a score is that is filtered by: aesthetic, clip_t or annotation_match; may be repeated",
)
@click.option(
    "--edit-scope",
    type=click.Choice(["local", "global"]),
    default="local",
    show_default=True,
    help="how an instruction without <imagehere> is completed: 'in' the image, or 'of' it",
)
@_FILTERS
@click.option("--limit", type=click.IntRange(1), help="read this many samples alone")
def convert_data(layout: str, data: Path, out: Path, scores: tuple[str, ...], **options: Any) -> None:
    r"""Turn a published dataset into a manifest, the form in which training data is kept.

    \b
      mige-rt convert-data --layout magicbrush --data MagicBrush --out data/magicbrush
      mige-rt convert-data --layout instructpix2pix --data mine.parquet --out data/mine \
          --source-column before --caption-column text --image-column after
    """
    with requires("data", "converting datasets"):
        from trainer.data.convert import convert
        from trainer.data.converters.layout import ConvertOptions

    convert_options = ConvertOptions(
        image_column=options["image_column"],
        source_column=options["source_column"],
        caption_column=options["caption_column"],
        score_columns=_score_columns(scores),
        scope=options["edit_scope"],
    )
    with progress("convert") as advance:
        report = convert(
            layout,
            data,
            out,
            convert_options,
            filtered=options["filtered"],
            limit=options["limit"],
            on_progress=advance,
        )
    click.echo(f"{report.samples} samples{_left_out(report.rejected)}", err=True)
    click.echo(out / "manifest.jsonl")


def _score_columns(scores: tuple[str, ...]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for score in scores:
        name, equals, column = score.partition("=")
        if not (name and equals and column):
            raise InputError(f"--score-column is {score!r}; give the score and its column, as aesthetic=pred_score")
        columns[name] = column
    return columns


def _left_out(reasons: Mapping[str, int]) -> str:
    if not reasons:
        return ""
    return "; left out: " + ", ".join(f"{number} ({reason})" for reason, number in reasons.items())
