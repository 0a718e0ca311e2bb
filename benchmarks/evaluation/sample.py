"""What every benchmark is read into: samples. Their images stay in their files until they are needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from mige_rt.errors import InputError
from mige_rt.images import READABLE, decode_image, open_image
from mige_rt.instruction import PLACEHOLDER

LISTED = 20  # missing files that an error lists


@dataclass(frozen=True)
class ImageFile:
    """An image in a file of its own."""

    path: Path

    def open(self) -> Image.Image:
        """The image as RGB. Raises InputError when it cannot be read."""
        return open_image(self.path)


@dataclass(frozen=True)
class ParquetImage:
    """An image in a row of a parquet file, as the Hugging Face hub keeps them."""

    path: Path
    row: int
    column: str

    def open(self) -> Image.Image:
        """The image as RGB. Raises InputError when it cannot be read."""
        value = _parquet_image(self.path, self.row, self.column)
        content = value.get("bytes") if isinstance(value, dict) else value
        name = f"{self.path} row {self.row + 1} column {self.column!r}"
        if not isinstance(content, bytes):
            raise InputError(f"{name} holds no image file; download the benchmark again")
        return decode_image(content, name)


def _parquet_image(path: Path, row: int, column: str) -> Any:
    first, values = _row_group(path, row, column)
    return values[row - first]


def _row_group(path: Path, row: int, column: str) -> tuple[int, list[Any]]:
    """The row group that holds a row: the number of its first row, and the column's values."""
    first = 0
    for group, rows in enumerate(_row_counts(path)):
        if row < first + rows:
            return first, _read_row_group(path, group, column)
        first += rows
    raise InputError(f"{path} has {first} rows; row {row + 1} was asked for")


@lru_cache(maxsize=64)
def _row_counts(path: Path) -> tuple[int, ...]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return tuple(file.metadata.row_group(k).num_rows for k in range(file.num_row_groups))


@lru_cache(maxsize=1)  # samples are read in their order, and a group's images are large
def _read_row_group(path: Path, group: int, column: str) -> list[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(column).to_pylist()


AnyImageFile = ImageFile | ParquetImage
Named = TypeVar("Named")  # an image's file, or its path


def image_labels(images: Sequence[Named], source: Named | None) -> dict[Named, str]:
    """What a page calls the images of a request, and which placeholders of the prompt they are.

    Args:
        images: Of the placeholders, in their order.
        source: The image to edit, or None.

    Returns:
        Such as "source (<imagehere> 2)" and "reference 1 (<imagehere> 1)", the source first.
    """
    references = [image for image in dict.fromkeys(images) if image != source]
    names = ({} if source is None else {source: "source"}) | {
        image: f"reference {number}" if len(references) > 1 else "reference"
        for number, image in enumerate(references, 1)
    }
    places = {image: [str(k) for k, other in enumerate(images, 1) if other == image] for image in names}
    return {
        image: f"{name} ({PLACEHOLDER} {' and '.join(places[image])})" if places[image] else name
        for image, name in names.items()
    }


@dataclass(frozen=True)
class MaskFile:
    """Where an image is edited.

    Attributes:
        path: An image file.
        kind: `white`: white is edited. `erased`: the source with the edited part made transparent, as MagicBrush has
            it, or white where the file has no transparency.
    """

    path: Path
    kind: Literal["white", "erased"] = "white"

    def open(self, size: tuple[int, int]) -> np.ndarray:
        """The mask, bool [height,width], true where the image is edited.

        Args:
            size: (width, height) of the image that it belongs to.

        Raises:
            InputError: It cannot be read, or has another size.
        """
        mask = _white(self.path) if self.kind == "white" else _erased(self.path)
        if mask.shape != size[::-1]:
            height, width = mask.shape
            raise InputError(f"the mask {self.path} is {width}x{height}, its image {size[0]}x{size[1]}")
        return mask


def _white(path: Path) -> np.ndarray:
    return np.asarray(open_image(path).convert("L")) > 127


def _erased(path: Path) -> np.ndarray:
    flattened = open_image(path)  # which also checks it
    with Image.open(path, formats=READABLE) as image:
        if image.has_transparency_data:
            return np.asarray(image.convert("RGBA"))[..., 3] == 0
    return (np.asarray(flattened) == 255).all(axis=-1)


@dataclass(frozen=True)
class Subject:
    """The subject that an edit is to bring in.

    Attributes:
        words: What it is called, for a detector.
        reference: It alone, on black; the ground truth where `mask` is known.
        mask: Where it stands in the ground truth. Image and reference are both cut out by it, and no detector is asked.
    """

    words: str
    reference: AnyImageFile
    mask: MaskFile | None = None


@dataclass(frozen=True, kw_only=True)
class BenchmarkSample:
    """One request of a benchmark, and what its image is compared with.

    Attributes:
        id: Unique; a part of file names.
        rows: The rows of the table in which it counts; none for an intermediate turn.
        group: Samples of one group are alike (one subject, one session): intervals resample groups.
        prompt: With or without placeholders, as for `mige_rt.requests.Request`.
        images: Of the placeholders.
        source: The image to edit.
        after: The id of an earlier sample, whose image is edited instead of `source`.
        truth: What the image is compared with pixel by pixel, and a mask belongs to.
        similar_to: Images that DINO and CLIP-I compare it with; their mean counts.
        caption: Of the image that should be made, for CLIP-T; None: CLIP-T is left out.
        source_caption: Of the source, for CLIP-dir; None: CLIP-dir is left out.
        mask: Where the source is edited, for the background shift.
        subject: To be cut out and compared by itself.
    """

    id: str
    rows: tuple[str, ...]
    group: str
    prompt: str
    images: tuple[AnyImageFile, ...] = ()
    source: AnyImageFile | None = None
    after: str | None = None
    truth: AnyImageFile | None = None
    similar_to: tuple[AnyImageFile, ...] = ()
    caption: str | None = None
    source_caption: str | None = None
    mask: MaskFile | None = None
    subject: Subject | None = None

    def files(self) -> Iterator[Path]:
        """Every image file that it needs, masks left out: without one, a metric is missing and nothing else."""
        single = (self.source, self.truth, self.subject and self.subject.reference)
        yield from (image.path for image in (*self.images, *self.similar_to, *single) if image is not None)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark that was opened.

    Attributes:
        layout: Which one it is, as `--benchmark` names it.
        title: In reports.
        compared: What similarities are computed against, in words.
        samples: In order; one that is `after` another comes later.
        rows: Of the table, in order.
        seeds: Of the images of each sample, as published.
        notes: What a reader of the report has to know.
    """

    layout: str
    title: str
    compared: str
    samples: tuple[BenchmarkSample, ...]
    rows: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()

    def image_names(self) -> list[tuple[BenchmarkSample, int, str]]:
        """Every image that a results folder has when it is complete: sample, seed, and the file's name."""
        return [(sample, seed, f"{sample.id}-{seed}.png") for sample in self.samples for seed in self.seeds]

    def empty_rows(self) -> list[str]:
        """Rows without samples."""
        filled = {row for sample in self.samples for row in sample.rows}
        return [row for row in self.rows if row not in filled]

    def fingerprint(self) -> str:
        """A digest of what is asked for; paths are no part of it, so that a benchmark may be moved."""
        digest = sha256(f"{self.layout} {self.seeds}".encode())
        for sample in self.samples:
            about = (sample.id, sample.prompt, sample.after, sample.caption, sample.source_caption, sample.rows)
            digest.update(repr(about).encode())
        return digest.hexdigest()

    def first(self, number: int) -> "Benchmark":
        """The same with its first samples alone."""
        if number >= len(self.samples):
            return self
        note = f"only the first {number} of {len(self.samples)} samples"
        return replace(self, samples=self.samples[:number], notes=(*self.notes, note))


def check_files(samples: Sequence[BenchmarkSample], folder: Path) -> None:
    """Raises InputError that lists the files which are not there."""
    paths = dict.fromkeys(path for sample in samples for path in sample.files())
    missing = [path for path in paths if not path.is_file()]
    if missing:
        names = [str(path.relative_to(folder) if path.is_relative_to(folder) else path) for path in missing[:LISTED]]
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(paths)} files: {', '.join(names)}{more}; download it again"
        )
