"""What goes from stage to stage: a raw record, the entities in its image, and what has become of them."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mige_rt.errors import InputError
from trainer.data.tar_images import open_sample_image
from trainer.masks import Box


class DroppedError(Exception):
    """A record or an entity in it is left out.

    Attributes:
        reason: A few words, the same for all that are left out for it.
        detail: What exactly was the matter.
        bad: Something is wrong with it, and not only too little good about it.
    """

    def __init__(self, reason: str, detail: str = "", *, bad: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.bad = reason, detail, bad


@dataclass(frozen=True)
class Drop:
    """Why and at which stage something was left out, see `DroppedError`."""

    stage: str
    reason: str
    detail: str
    bad: bool


@dataclass
class Candidate:
    """An entity in an image, which may become a subject.

    Attributes:
        words: Its name; empty where it has none yet.
        box: Where it is.
        mask: Its pixels, see `pack_mask`.
        stage: That brought it up.
        prompt: The instruction, where each entity has its own.
        background: The image without it, as a PNG.
        scores: By name.
        drop: Why it was left out.
    """

    words: str = ""
    box: Box | None = None
    mask: bytes | None = None
    stage: str = ""
    prompt: str = ""
    background: bytes | None = None
    scores: dict[str, float] = field(default_factory=dict)
    drop: Drop | None = None


@dataclass
class Sample:
    """A sample that a record has come to.

    Attributes:
        prompt: Multimodal: with one placeholder for each image.
        files: Contents by name, such as target.png.
        images: The files' names in the order of the placeholders.
        source: The file's name; None where a new image is made.
        target: The file's name.
        size: (width, height) of the target in pixels.
        scores: By name.
        subjects: Name and box of each entity that an image shows; its mask is the file mask-N.png.
    """

    prompt: str
    files: dict[str, bytes]
    images: tuple[str, ...]
    source: str | None
    target: str
    size: tuple[int, int]
    scores: Mapping[str, float]
    subjects: tuple[Mapping[str, Any], ...] = ()


@dataclass
class Record:
    """A raw record on its way.

    Attributes:
        number: In the input, from 0 on.
        id: What the input calls it.
        image: Path of the image that entities are cut from; of an edit, the target.
        text: The caption or instruction.
        source: Path of the image to edit.
        images: Paths of the images that the text's placeholders stand for.
        annotation: Path of the file with the image's masks.
        is_grounded: The entities and their boxes came with the caption.
        candidates: The entities in the image.
        scores: By name.
        samples: What came of it.
        drop: Why it was left out.
        stop: Why the whole run cannot go on.
    """

    number: int
    id: str
    image: str
    text: str = ""
    source: str | None = None
    images: tuple[str, ...] = ()
    annotation: str | None = None
    is_grounded: bool = False
    candidates: list[Candidate] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    drop: Drop | None = None
    stop: str = ""

    @property
    def remaining(self) -> list[Candidate]:
        """The entities that have not been left out."""
        return [candidate for candidate in self.candidates if candidate.drop is None]

    def open(self) -> Image.Image:
        """The image, RGB and upright; raises DroppedError where it cannot be read."""
        return open_or_drop(self.image)


def open_or_drop(path: str) -> Image.Image:
    """An image, RGB and upright; raises DroppedError where it cannot be read."""
    try:
        return open_sample_image(path)
    except InputError as error:
        raise DroppedError("an image that cannot be read", str(error), bad=True) from error


def png(image: Image.Image) -> bytes:
    """The content of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3)
    return file.getvalue()


def pack_mask(mask: NDArray[np.bool_]) -> bytes:
    """A mask, bool [height,width], as a PNG of one bit."""
    return png(Image.fromarray(mask))


def unpack_mask(data: bytes | None) -> NDArray[np.bool_]:
    """The inverse of `pack_mask`."""
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data), formats=["PNG"])).astype(bool)
