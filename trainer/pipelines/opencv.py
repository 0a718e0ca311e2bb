"""Roles that OpenCV fills without any weights: GrabCut, and inpainting after Telea; and the widening of masks."""

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.masks import Box, Mask


def dilate(mask: Mask, pixels: int) -> Mask:
    """A mask that reaches `pixels` further in every direction."""
    size = 2 * pixels + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)


class GrabCut:
    """See `roles.Segmenter`: GrabCut (Rother et al., 2004), which tells what is in a box from what is around it."""

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations

    def segment(self, image: Image.Image, box: Box) -> NDArray[np.bool_]:
        """See `roles.Segmenter`. Empty where the box covers the whole image, or nothing of it."""
        left, top = (max(round(x), 0) for x in box[:2])
        width, height = min(round(box[2]), image.width) - left, min(round(box[3]), image.height) - top
        labels = np.zeros((image.height, image.width), np.uint8)
        if width < 1 or height < 1 or (width, height) == image.size:
            return labels.astype(bool)
        cv2.setRNGSeed(0)  # its clusters begin at random
        models = np.zeros((2, 1, 65))
        bgr = np.ascontiguousarray(np.asarray(image)[..., ::-1])
        rectangle = (left, top, width, height)
        cv2.grabCut(bgr, labels, rectangle, models[0], models[1], self._iterations, cv2.GC_INIT_WITH_RECT)
        return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


class Telea:
    """See `roles.Inpainter`: Telea (2004). It carries colours inwards and makes nothing up."""

    def __init__(self, radius: float) -> None:
        self._radius = radius

    def inpaint(self, image: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
        """See `roles.Inpainter`."""
        pixels = np.ascontiguousarray(np.asarray(image))  # each channel by itself, so their order means nothing
        return Image.fromarray(cv2.inpaint(pixels, mask.astype(np.uint8), self._radius, cv2.INPAINT_TELEA))
