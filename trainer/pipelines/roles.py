"""The roles of the pipelines: what each can be asked. `trainer.pipelines.loaders` has who can fill them."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mige_rt.errors import InputError
from trainer.masks import Box
from trainer.vision_models import Detection


class ServiceError(InputError):
    """A role cannot work at all, such as a server that does not answer: no record's fault, so the run stops."""


class Tagger(Protocol):
    """Understands texts. Raises DroppedError where no sense can be made of its answer."""

    def entities(self, caption: str) -> list[str]:
        """The entities that a caption names, in its own words."""
        ...

    def new_subject(self, instruction: str) -> str | None:
        """The entity that an edit puts in another's place; None where it does something else."""
        ...

    def rewrite(self, instruction: str, subject: str) -> str:
        """The replacement with a placeholder for the source, then one for the new subject."""
        ...


class Detector(Protocol):
    """Words to boxes."""

    def detect(self, image: Image.Image, words: str) -> list[Detection]:
        """The matches, the best one first."""
        ...


class Segmenter(Protocol):
    """A box to a mask."""

    def segment(self, image: Image.Image, box: Box) -> NDArray[np.bool_]:
        """The pixels of the entity in the box, bool [height,width]."""
        ...


class Inpainter(Protocol):
    """Fills a hole in an image."""

    def inpaint(self, image: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
        """The image with new pixels where the mask, bool [height,width], is true; the others stay as they are."""
        ...


class Describer(Protocol):
    """Looks at images. Raises DroppedError where no sense can be made of its answer."""

    def is_complete(self, cut_out: Image.Image) -> bool:
        """Whether a cut-out shows a whole thing that can stand for itself."""
        ...

    def name(self, cut_out: Image.Image) -> str:
        """What it shows, in a few words."""
        ...

    def instruction(self, image: Image.Image, words: str, box: Box) -> str:
        """How to put the entity in the box into the image without it."""
        ...


class TextScorer(Protocol):
    """CLIP-T."""

    def similarity(self, image: Image.Image, text: str) -> float:
        """The cosine of both vectors."""
        ...


class AestheticScorer(Protocol):
    """How beautiful an image is."""

    def score(self, image: Image.Image) -> float:
        """About 1 to 10."""
        ...
