"""A published dataset, as it was downloaded, made into a manifest with its images."""

import io
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mige_rt.atomic import atomic_folder
from mige_rt.errors import InputError
from mige_rt.images import MAX_PIXELS, READABLE
from mige_rt.requests import RequestRecord
from trainer.data.converters.edit_pairs import EDIT_PAIRS
from trainer.data.converters.gier import convert_gier
from trainer.data.converters.idm_vton import convert_idm_vton
from trainer.data.converters.layout import (
    ConvertedSample,
    Converter,
    ConvertOptions,
    ImageData,
    Rejection,
    check_score_names,
)
from trainer.data.converters.seed_data_edit import convert_seed_data_edit
from trainer.data.converters.subjects200k import convert_subjects200k
from trainer.data.filters import rejection
from trainer.data.manifest import MANIFEST, manifest_line

FOLDER_SAMPLES = 1000  # whose images share a folder

CONVERTERS: dict[str, Converter] = {
    **EDIT_PAIRS,
    "seed-data-edit": convert_seed_data_edit,
    "gier": convert_gier,
    "subjects200k": convert_subjects200k,
    "idm-vton": convert_idm_vton,
}


@dataclass(frozen=True)
class ConversionReport:
    """What came of a conversion.

    Attributes:
        samples: How many were written.
        rejected: How many were left out, by reason.
    """

    samples: int
    rejected: Mapping[str, int]


def convert(
    layout: str,
    data: Path,
    out: Path,
    options: ConvertOptions = ConvertOptions(),  # noqa: B008  # frozen
    *,
    filtered: bool = True,
    limit: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ConversionReport:
    """Write the folder `out` with a manifest and images, whole or not at all.

    Images in parquet are written as the files that they are. Those that are files already stay where they are, and the
    manifest names them relative to `out`.

    Args:
        layout: A key of CONVERTERS.
        data: The downloaded dataset: its folder, or the one file of it.
        out: The folder to make.
        options: Columns, and how instructions are rewritten.
        filtered: Apply the paper's filters (`trainer.data.filters`).
        limit: Stop after this many samples of the dataset, those that are left out included.
        on_progress: Gets a description, how many samples were read, and `limit`, or 0 where there is none.

    Raises:
        InputError: The dataset has not this layout, no sample of it can be used, `out` exists or cannot be
            written, or the disk is full.
    """
    if not data.exists():
        raise InputError(f"there is nothing at {data}; download the dataset first")
    check_score_names(options.score_columns)
    rejected: Counter[str] = Counter()
    written = 0
    try:
        with atomic_folder(out) as folder, (folder / MANIFEST).open("w", encoding="utf-8") as file:
            for number, sample in enumerate(CONVERTERS[layout](data, options)):
                if number == limit:
                    break
                if on_progress:
                    on_progress("converting", number, limit or 0)
                try:
                    record = _record(sample, f"{layout}-{number:08d}", _Images(folder, out, number), filtered)
                except _RejectedError as error:
                    rejected[str(error)] += 1
                    continue
                file.write(manifest_line(record))
                written += 1
            if not written:
                reasons = ", ".join(f"{reason}: {number}" for reason, number in rejected.items()) or "it holds none"
                raise InputError(f"no sample of {data} can be used ({reasons})")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error}); make room, or give another path") from error
    return ConversionReport(written, dict(rejected.most_common()))


class _RejectedError(Exception):
    """A sample is left out; the text is the reason."""


def _record(sample: ConvertedSample | Rejection, name: str, images: "_Images", filtered: bool) -> RequestRecord:
    """Write a sample's images; raises _RejectedError."""
    if isinstance(sample, Rejection):
        raise _RejectedError(sample.reason)
    size = _size(sample.target)
    if filtered and (reason := rejection(size, sample.scores)):
        raise _RejectedError(reason)
    for image in (sample.source, *sample.images):
        if image is not None:
            _size(image)  # before anything is written
    source = None if sample.source is None else images.save(sample.source, "source")
    return RequestRecord(
        id=name,
        prompt=sample.prompt,
        images=tuple(
            source if source and image is sample.source else images.save(image, f"image-{k}")
            for k, image in enumerate(sample.images)
        ),
        source=source,
        target=images.save(sample.target, "target"),
        task=sample.task,
        size=size,
        scores=dict(sample.scores) or None,
    )


@dataclass(frozen=True)
class _Images:
    """Writes the images of one sample.

    Attributes:
        folder: The new folder.
        out: What it will be called.
        number: The sample's.
    """

    folder: Path
    out: Path
    number: int

    def save(self, image: ImageData, role: str) -> str:
        """The image's path, relative to the manifest."""
        if isinstance(image, Path):
            return os.path.relpath(image, self.out)
        name = f"images/{self.number // FOLDER_SAMPLES:05d}/{self.number:08d}-{role}"
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, bytes):
            name += f".{_open(image).format or 'image'}".lower()
            (self.folder / name).write_bytes(image)
        else:
            name += ".png"
            image.save(self.folder / name, compress_level=1)
        return name


def _size(image: ImageData) -> tuple[int, int]:
    """(width, height) in pixels, from the header alone; raises _RejectedError where there is no image to read."""
    if isinstance(image, Image.Image):
        return image.size
    if isinstance(image, Path) and not image.is_file():
        raise _RejectedError("missing image file")
    try:
        with _open(image) as opened:
            width, height = opened.size
    except Exception as error:  # damaged files make the format readers raise nearly anything
        raise _RejectedError("unreadable image") from error
    if not 0 < width * height <= MAX_PIXELS:
        raise _RejectedError(f"image of more than {MAX_PIXELS:,} pixels")
    return width, height


def _open(image: bytes | Path) -> Image.Image:
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=READABLE)
