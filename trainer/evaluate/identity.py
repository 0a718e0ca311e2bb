"""Subject identity: does the subject of an image look like the concept asked for, or more like another one?"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from trainer.evaluate.efficientnet_lite import NEUTRAL, SIDE, load_efficientnet
from trainer.synthetic.concepts import Concept, Style, paste
from trainer.synthetic.sample import Mark

MARGIN = 16  # pixels of the network's input on each side of the subject
SCALES = 16  # reference images have sizes that are multiples of the scene's side divided by this


def cut_out(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The masked part of an image as the network takes it: centred, enlarged, with neutral grey all around.

    The grey is needed because a background would tell the network more than the subject does.

    Args:
        image: uint8 [side,side,3].
        mask: bool [side,side], true somewhere.

    Returns:
        uint8 [224,224,3].
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    subject = np.where(mask[box][..., None], image[box], np.uint8(NEUTRAL))
    height, width = subject.shape[:2]
    size = max(height, width)
    square = np.full((size, size, 3), NEUTRAL, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = subject
    inner = SIDE - 2 * MARGIN
    enlarged = Image.fromarray(square).resize((inner, inner), Image.Resampling.BICUBIC)
    padded = np.full((SIDE, SIDE, 3), NEUTRAL, np.uint8)
    padded[MARGIN:-MARGIN, MARGIN:-MARGIN] = np.asarray(enlarged)
    return padded


def flattened(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image, uint8 [side,side,3], with the masked part in its mean colour."""
    flat = image.copy()
    flat[mask] = np.rint(image[mask].mean(axis=0)).astype(np.uint8)
    return flat


class Gallery:
    """Reference images of concepts, among which the subject of an image is looked up by its nearest neighbour.

    A reference has the style and about the size of the subject that is looked up.
    """

    def __init__(self, concepts: Sequence[Concept], side: int) -> None:
        """Load the network that compares images.

        Args:
            concepts: Those to tell apart.
            side: Width and height of the images in which subjects are looked up, in pixels.

        Raises:
            InputError: The network's weights are not installed.
        """
        self.concepts = list(concepts)
        self.side = side
        self._network = load_efficientnet()
        self._codes = {concept.code: i for i, concept in enumerate(self.concepts)}
        self._features: dict[tuple[Style, int], np.ndarray] = {}

    def recognizes(self, image: np.ndarray, mark: Mark) -> bool:
        """Whether the marked part of an image, uint8 [side,side,3], is nearest to the mark's own concept."""
        return int(self.similarities(image, mark).argmax()) == self._codes[mark.concept.code]

    def similarities(self, image: np.ndarray, mark: Mark) -> np.ndarray:
        """Cosine similarity of the marked part of an image to each concept's reference.

        Args:
            image: uint8 [side,side,3].
            mark: A subject with a box.

        Returns:
            float32 [concepts].
        """
        assert mark.box is not None
        left, top, right, bottom = mark.box
        feature = self._network.embed(cut_out(image, mark.mask)[None])[0]
        return self._reference_features(mark.style, max(right - left, bottom - top)) @ feature

    def _reference_features(self, style: Style, size: int) -> np.ndarray:
        """Features of all references at about `size` pixels, float32 [concepts,1280].

        A concept that lacks the style is there in the other one.
        """
        step = self.side / SCALES
        size = round(max(round(size / step), 1) * step)
        if (style, size) not in self._features:
            references = []
            for concept in self.concepts:
                scene = np.full((self.side, self.side, 3), NEUTRAL, np.uint8)
                path = concept.fluent if style == "fluent" or concept.noto is None else concept.noto
                mask = paste(scene, path, (self.side / 2, self.side / 2), size)
                references.append(cut_out(scene, mask))
            self._features[style, size] = self._network.embed(np.stack(references))
        return self._features[style, size]
