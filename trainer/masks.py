"""Masks of things in images: COCO's run lengths, boxes, cut-outs on white."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Mask = NDArray[np.bool_]  # [height,width]


def decode_rle(counts: str | Sequence[int], size: Sequence[int]) -> Mask:
    """A mask from COCO's run lengths, as SA-1B has them.

    The lengths alternate between background and thing, down the columns, from the left. As text, each is a number in
    groups of five bits from the lowest one, plus 48, with a sixth bit where more follow; from the fourth one on it is
    the difference from the length two before. pycocotools reads the same, but trusts the numbers.

    Args:
        counts: The lengths, or the text that they are packed in.
        size: (height, width) in pixels.

    Raises:
        ValueError: The lengths do not come to the size.
    """
    height, width = size
    lengths = _unpack(counts) if isinstance(counts, str) else list(counts)
    if min(lengths, default=-1) < 0 or sum(lengths) != height * width:
        raise ValueError(f"the run lengths do not come to {width}x{height} pixels")
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape((width, height)).T


def _unpack(text: str) -> list[int]:
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            raise ValueError(f"the run lengths hold {character!r}")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the run lengths end within a number")
    return lengths


def mask_box(mask: Mask) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom in pixels, the last two exclusive; None where the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def clip_box(box: Box, size: tuple[int, int]) -> Box | None:
    """A box without what lies outside of an image of (width, height); None where nothing is left."""
    left, top, right, bottom = box
    width, height = size
    inside = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
    return inside if inside[2] > inside[0] and inside[3] > inside[1] else None


def box_share(box: Box, size: tuple[int, int]) -> float:
    """The part of an image of (width, height) that a box in it covers."""
    return (box[2] - box[0]) * (box[3] - box[1]) / (size[0] * size[1])


def iou(first: Mask, second: Mask) -> float:
    """Intersection over union; 0 where both are empty."""
    return float((first & second).sum() / max((first | second).sum(), 1))


def cut_out(image: Image.Image, mask: Mask) -> Image.Image:
    """A thing on white, cut to its mask's box. The mask is not empty."""
    pixels = np.where(mask[..., None], np.asarray(image), np.uint8(255))
    return Image.fromarray(pixels).crop(mask_box(mask))


def on_square(image: Image.Image, side: int) -> Image.Image:
    """The whole image in the middle of a white square of `side` pixels, as large as it can be."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGB", (side, side), "white")
    resized = image.resize(size, Image.Resampling.BICUBIC)
    square.paste(resized, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def long_side_size(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    """(width, height) of the same shape, whose larger side is `long_side`."""
    scale = long_side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """The mask at (width, height) in pixels."""
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
