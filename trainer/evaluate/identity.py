"""Whether the subject of a picture is the given one: it is looked for among clean pictures of all held-out concepts."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from PIL import Image

from trainer.evaluate.efficientnet_lite import NEUTRAL, SIDE, EfficientNetLite0, load_efficientnet
from trainer.synthetic.concepts import Concept, Style, paste
from trainer.synthetic.sample import Mark

MARGIN = 16  # pixels of the network's input on each side of the subject
SCALES = 16  # the gallery has its pictures at sizes that are multiples of the scene's side over this


def cut_out(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What a mask, bool [side,side], shows of a picture, uint8 [side,side,3], as the network takes it: uint8, 224 wide.

    The mask's box is in the middle and neutral grey all around: a background would tell the network more than the
    subject does.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    shown = np.where(mask[box][..., None], picture[box], np.uint8(NEUTRAL))
    height, width = shown.shape[:2]
    size = max(height, width)
    square = np.full((size, size, 3), NEUTRAL, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = shown
    inner = SIDE - 2 * MARGIN
    enlarged = Image.fromarray(square).resize((inner, inner), Image.Resampling.BICUBIC)
    whole = np.full((SIDE, SIDE, 3), NEUTRAL, np.uint8)
    whole[MARGIN:-MARGIN, MARGIN:-MARGIN] = np.asarray(enlarged)
    return whole


class Gallery:
    """The clean pictures of concepts, in the style and at the size that a subject has in its scene."""

    def __init__(self, concepts: Sequence[Concept], side: int) -> None:
        """side: of the scenes, in pixels."""
        self.concepts = list(concepts)
        self.side = side
        self._codes = {concept.code: i for i, concept in enumerate(self.concepts)}
        self._features: dict[tuple[Style, int], np.ndarray] = {}

    @cached_property
    def network(self) -> EfficientNetLite0:
        return load_efficientnet()

    def found(self, picture: np.ndarray, mark: Mark) -> bool:
        """Whether what the picture shows at the mark is nearest to the mark's own concept."""
        similarity = self.similarities(picture, mark)
        return int(similarity.argmax()) == self._codes[mark.concept.code]

    def similarities(self, picture: np.ndarray, mark: Mark) -> np.ndarray:
        """float32 [concepts]: the cosine of what the picture shows at the mark with each concept's clean picture."""
        assert mark.box is not None
        left, top, right, bottom = mark.box
        feature = self.network.embed(cut_out(picture, mark.mask)[None])[0]
        return self._clean(mark.style, max(right - left, bottom - top)) @ feature

    def _clean(self, style: Style, size: int) -> np.ndarray:
        """Features of the clean pictures, float32 [concepts,1280], at about `size` pixels; what lacks a style is there
        in the other."""
        step = self.side / SCALES
        size = round(max(round(size / step), 1) * step)
        if (style, size) not in self._features:
            pictures = []
            for concept in self.concepts:
                scene = np.full((self.side, self.side, 3), NEUTRAL, np.uint8)
                path = concept.fluent if style == "fluent" or concept.noto is None else concept.noto
                mask = paste(scene, path, (self.side / 2, self.side / 2), size)
                pictures.append(cut_out(scene, mask))
            self._features[style, size] = self.network.embed(np.stack(pictures))
        return self._features[style, size]


def flattened(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture, uint8 [side,side,3], with what the mask shows in its mean colour."""
    flat = picture.copy()
    flat[mask] = np.rint(picture[mask].mean(axis=0)).astype(np.uint8)
    return flat
