"""The metrics of an image: numbers alone; what encodes images is in `encoders`.

Similarities are cosines: of vectors of length one, dot products. Pixels are on [0,1], at the ground truth's size.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HIGHER = ("DINO", "CLIP-I", "CLIP-T", "CLIP-dir", "EfficientNet-Lite0")
SUBJECT = "subject "  # before the name of a similarity: of the subject cut out
LOWER = ("L1", "L2", "LPIPS", "background shift")
METRICS = (*HIGHER, *LOWER, *(SUBJECT + name for name in ("DINO", "CLIP-I", "EfficientNet-Lite0")))


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better."""
    return metric.removeprefix(SUBJECT) in HIGHER


def mean_similarity(image: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """The mean cosine of one vector, [D], with some, [N,D]."""
    return float((others @ image).mean())


def directional_similarity(images: Sequence[NDArray[np.float32]], texts: Sequence[NDArray[np.float32]]) -> float | None:
    """CLIP-dir (Gal et al., 2022): whether an image changes as its caption does.

    Args:
        images: Vectors, [D], of the source and the result.
        texts: Of their captions.

    Returns:
        The cosine of the two differences, 0 where the image has not changed. None where the encoder sees no difference
        between the captions.
    """
    image, text = images[1] - images[0], texts[1] - texts[0]
    norms = float(np.linalg.norm(image)), float(np.linalg.norm(text))
    if norms[1] == 0:
        return None
    return float(image @ text) / (norms[0] * norms[1]) if norms[0] else 0.0


def as_pixels(image: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
    """An RGB image as float32 [H,W,3] on [0,1], resized (bicubic) to (width, height) if it has another size."""
    resized = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32) / np.float32(255)


def l1(image: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """The mean absolute difference of pixels."""
    return float(np.abs(image - truth).mean(dtype=np.float64))


def l2(image: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """The mean squared difference of pixels, which MagicBrush calls L2."""
    return float(((image - truth) ** 2).mean(dtype=np.float64))


def background_shift(
    image: NDArray[np.float32], source: NDArray[np.float32], edited: NDArray[np.bool_]
) -> float | None:
    """How far pixels moved that the edit does not touch: their mean absolute difference. None where there are none."""
    if edited.all():
        return None
    return float(np.abs(image - source)[~edited].mean(dtype=np.float64))


def cut_out(image: Image.Image, mask: NDArray[np.bool_], box: tuple[int, int, int, int]) -> Image.Image:
    """The masked part of an image on black, cropped to a box (left, top, right, bottom)."""
    pixels = np.where(mask[..., None], np.asarray(image), np.uint8(0))
    return Image.fromarray(pixels).crop(box)
