"""Write samples as files with a manifest: `python -m trainer.synthetic.manifest --assets ASSETS --out DIR --samples N`.

DIR/manifest.jsonl is a manifest as `trainer.data.manifest` describes it. Its lines have a seed besides, the sample's
number. What else is known of a sample is in `truth`:

  kind       the kind of sample, such as "add"
  changed    a mask of the pixels in which the target differs from the source
  before     the subjects of the source, from the rearmost to the foremost; empty without a source
  after      the subjects of the target, likewise
  asked      indices in `after` of the subjects that the prompt brings in or changes in place

and a subject has its concept's `code` and `name`, `held_out`, `style` ("fluent" or "noto"), the `mask` of its visible
part, that part's `box` (left, top, right, bottom in pixels, the last two exclusive) and `reference`, the index in
`images` of the image that shows it alone, or null. Images are PNG; masks are, too, of one bit.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from mige_rt.atomic import atomic_folder
from mige_rt.errors import InputError
from mige_rt.requests import RequestRecord
from trainer.data.manifest import MANIFEST, manifest_line
from trainer.synthetic.concepts import Concept, load_concepts
from trainer.synthetic.photos import load_photos
from trainer.synthetic.tasks import Mark, Sample, make_sample

FOLDER_SAMPLES = 1000  # whose images share a folder


def _save(out: Path, path: str, image: np.ndarray) -> str:
    """Write an image or a mask to out/path; returns that path."""
    Image.fromarray(image).save(out / path, compress_level=1)
    return path


def _subjects(out: Path, stem: str, marks: Sequence[Mark]) -> list[dict[str, Any]]:
    return [
        {
            "code": mark.concept.code,
            "name": mark.concept.name,
            "held_out": mark.concept.held_out,
            "style": mark.style,
            "mask": _save(out, f"{stem}-{i}.png", mark.mask),
            "box": mark.box,
            "reference": mark.reference,
        }
        for i, mark in enumerate(marks)
    ]


def write_sample(out: Path, sample: Sample, number: int) -> RequestRecord:
    """Write a sample's images below out; returns its record in the manifest."""
    stem = f"{number // FOLDER_SAMPLES:04d}/{number:07d}"
    (out / stem).parent.mkdir(exist_ok=True)
    source = None if sample.source is None else _save(out, f"{stem}-source.png", sample.source)
    images = tuple(
        source if source and image is sample.source else _save(out, f"{stem}-image-{i}.png", image)
        for i, image in enumerate(sample.images)
    )
    height, width = sample.target.shape[:2]
    return RequestRecord(
        id=f"{number:07d}",
        prompt=sample.prompt,
        images=images,
        source=source,
        target=_save(out, f"{stem}-target.png", sample.target),
        task=sample.task,
        size=(width, height),
        seed=number,
        truth={
            "kind": sample.kind,
            "changed": _save(out, f"{stem}-changed.png", sample.changed),
            "before": _subjects(out, f"{stem}-before", sample.before),
            "after": _subjects(out, f"{stem}-after", sample.after),
            "asked": sample.asked,
        },
    )


def write_manifest(
    out: Path, concepts: Sequence[Concept], samples: int, seed: int, side: int, photos: Sequence[Path] = ()
) -> None:
    """Fill the new folder `out` with the first samples of a series. Raises InputError when it exists."""

    def lines(folder: Path) -> Iterator[str]:
        for number in range(samples):
            sample = make_sample(seed, number, concepts, side, photos=photos)
            yield manifest_line(write_sample(folder, sample, number))

    with atomic_folder(out) as folder, (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.writelines(lines(folder))


@click.command(help="Write synthetic samples as files, with a manifest (trainer/synthetic/manifest.py describes it).")
@click.option("--assets", type=click.Path(path_type=Path), required=True, help="folder made by trainer.synthetic.fetch")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="folder to make")
@click.option("--samples", type=click.IntRange(1), required=True, help="how many")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="which series of samples")
@click.option("--held-out", is_flag=True, help="of the things kept for evaluation, instead of those trained on")
@click.option("--side", type=click.IntRange(16, 128), default=64, show_default=True, help="of the pictures, in pixels")
@click.option("--photos", is_flag=True, help="with photos as backgrounds, where --assets has any")
def main(assets: Path, out: Path, samples: int, seed: int, held_out: bool, side: int, photos: bool) -> None:
    """Write the samples; bad input ends with exit code 2."""
    try:
        concepts = [concept for concept in load_concepts(assets) if concept.held_out == held_out]
        photographs = load_photos(assets) if photos else []
        if photos and not photographs:
            raise InputError(
                f"{assets} has no photos; python -m trainer.synthetic.fetch --out {assets} --photos adds them"
            )
        write_manifest(out, concepts, samples, seed, side, photographs)
    except InputError as error:
        raise click.UsageError(str(error)) from error
    click.echo(out / MANIFEST)


if __name__ == "__main__":
    main()
