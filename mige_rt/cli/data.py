"""`mige-rt data`: the way from published datasets and raw images to what training reads.

Its commands `convert` and `prepare` are also there as `mige-rt convert-data` and `mige-rt prepare`.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from mige_rt.cli.shared import PATH, Part, progress
from mige_rt.errors import InputError, requires
from mige_rt.terminal import echo, report, report_lines

LAYOUTS = (
    "instructpix2pix",
    "magicbrush",
    "ultraedit",
    "seed-data-edit",
    "hq-edit",
    "gier",
    "subjects200k",
    "idm-vton",
)

_FILTERS = click.option(
    "--filter/--no-filter",
    "filtered",
    default=True,
    show_default=True,
    help="leave out what the paper does: much wider than high, or a score too low",
)


@click.group("data")
def data_group() -> None:
    """Make training data: convert datasets, build samples of raw images, compute features.

    `convert` turns a published dataset into a manifest, and `build` raw images and texts; `prepare` computes what
    `mige-rt train` reads of either.
    """


@data_group.command("convert")
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
    """Turn a published dataset into a manifest, the form in which training data is kept.

    \b
      mige-rt data convert --layout magicbrush --data MagicBrush --out data/magicbrush
      mige-rt data convert --layout instructpix2pix --data mine.parquet --out data/mine \\
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
        converted = convert(
            layout,
            data,
            out,
            convert_options,
            filtered=options["filtered"],
            limit=options["limit"],
            on_progress=advance,
        )
    report(f"{converted.samples} samples{_left_out(converted.rejected)}")
    echo(out / "manifest.jsonl")


@data_group.command()
@click.option("--manifest", type=PATH, required=True, help="JSON lines, or the published JSON")
@click.option("--out", type=PATH, required=True, help="the folder to make, or to go on with")
@click.option(
    "--model",
    default="tiny",
    show_default=True,
    help="whose VAE and ViT are used: the published model.pth or a folder with it, a model folder, a bundle, a "
    "repository on the Hugging Face hub, or tiny, the model that comes with mige-rt",
)
@click.option(
    "--images-root", "root", type=PATH, help="the folder that the manifest's paths are relative to  [default: its own]"
)
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="that work at once")
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="have a Ray cluster do it, by as many actors as --processes says: auto, HOST:PORT, ray://HOST:PORT, or local",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1")
@click.option("--shard-samples", type=click.IntRange(1), default=256, show_default=True, help="samples in each shard")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="images encoded at once")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="of the order of the samples")
@click.option(
    "--part", type=Part(), default=(1, 1), help="one part alone, as 2/6 on the second of six machines  [default: all]"
)
@_FILTERS
def prepare(manifest: Path, out: Path, model: str, **options: Any) -> None:
    """Compute the latents and ViT features of a manifest's images, once, for training to read.

    \b
      mige-rt data prepare --manifest data/magicbrush/manifest.jsonl --model MIGE --out prepared --processes 8

    A run that was stopped goes on by the same command, and ends on the same bytes. A sample with an image that cannot
    be read is left out; more than 1 % of such images stop the run.
    """
    with requires("data", "preparing training data"):
        from export.exporter import locate_checkpoint
        from trainer.data.prepare import CorruptImage, PrepareOptions
        from trainer.data.prepare import prepare as prepare_manifest

    if options["ray"] is not None:
        with requires("ray", "--ray"):
            import_module("ray.data")  # now, since opening the model takes longer

    def warn(image: CorruptImage) -> None:
        report(f"warning: {image.id} is left out: {image.error}")

    with progress("shards") as advance:
        prepared = prepare_manifest(
            manifest,
            locate_checkpoint(model),
            out,
            PrepareOptions(**options),
            on_progress=advance,
            on_corrupt=warn,
        )
    total = prepared.total
    corrupt = {"an image that cannot be read": len({image.id for image in total.corrupt})} if total.corrupt else {}
    report(f"{total.samples} samples{_left_out({**corrupt, **total.filtered})}")
    if prepared.missing:
        report(f"{prepared.missing} of {prepared.shards} shards are left to the other parts")
    echo(out)


@data_group.command()
@click.option("--config", "config_file", type=PATH, required=True, help="YAML, as in trainer/configs/pipelines")
@click.option("--data", type=PATH, required=True, help="captions as JSON lines, a manifest, or a folder as of SA-1B")
@click.option("--out", type=PATH, required=True, help="the folder to make, or to go on with")
@click.option(
    "--ray",
    default="local",
    show_default=True,
    metavar="ADDRESS",
    help="of a Ray cluster: auto, HOST:PORT, ray://HOST:PORT; local: this machine; none: this process, without Ray",
)
@click.option("--limit", type=click.IntRange(1), help="take the first so many records alone")
@click.option(
    "--dry-run", "shown", type=click.IntRange(1), metavar="N", help="show what comes of N records: OUT/dry-run.png"
)
def build(config_file: Path, data: Path, out: Path, ray: str, limit: int | None, shown: int | None) -> None:
    """Make training samples of raw images and texts, by one of the paper's pipelines.

    \b
      mige-rt data build --config trainer/configs/pipelines/add.yaml --data sa-1b --out data/add --dry-run 20
      mige-rt data build --config trainer/configs/pipelines/add.yaml --data sa-1b --out data/add
      mige-rt data prepare --manifest data/add/manifest.jsonl --model MIGE --out prepared/add

    A run that was stopped goes on by the same command, and ends on the same bytes where the models give the same
    answers. What is left out is in OUT/dropped.jsonl with its reason.
    """
    with requires("pipelines", "building training data"):
        from export.formatting import markdown_table
        from trainer.pipelines.build import PREVIEW, BuildOptions, dry_run
        from trainer.pipelines.build import build as build_samples
        from trainer.pipelines.config import load_pipeline_config
        from trainer.pipelines.funnel import funnel_table

    config = load_pipeline_config(config_file)
    if shown is not None:
        with requires("pipelines", "building training data"):
            records = dry_run(config, data, out, shown)
        samples = sum(len(record.samples) for record in records)
        report(f"{samples} samples of {len(records)} records")
        echo(out / PREVIEW)
        return
    with requires("pipelines", "building training data"), progress("shards") as advance:
        options = BuildOptions(ray=None if ray == "none" else ray, limit=limit)
        total = build_samples(config, data, out, options, advance)
    report_lines(markdown_table(funnel_table(total)))
    report(f"{len(total.lines)} samples of {total.records} records; {total.bad} records are bad")
    echo(out / "manifest.jsonl")


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


COMMANDS = (convert_data, prepare, build)
