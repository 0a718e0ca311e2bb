"""What `gr.ImageEditor` shows of a mask and a box, and what they are after somebody has drawn.

Red is the mask; the eraser takes it away. Blue is the box: that of all new blue strokes. The editor works at a size of
its own, so only what was drawn is carried over to the target's size; the rest of a mask stays as it was.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.annotation.masks import Box, Mask, mask_box
from mige_rt.errors import InputError

SIDE = 512  # pixels of the longer side, on the canvas
RED, BLUE = (235, 30, 45), (30, 90, 235)
OPACITY = 0.55  # of the brushes
_LINE = 3  # pixels, of the box
_TOLERANCE = 24  # of 255: less is the browser's rounding
_OTHER_IMAGE = 12  # of 255: the mean difference from which on the background is that of another pair


@dataclass(frozen=True)
class Drawing:
    """What the editor was given: its images at its own size, and what they show at the target's.

    Attributes:
        background: RGB.
        layer: RGBA.
        mask: bool [height,width] at the target's size.
        box: At the target's size.
    """

    background: Image.Image
    layer: Image.Image
    mask: Mask
    box: Box | None

    def value(self) -> dict[str, Any]:
        """For `gr.ImageEditor`."""
        return {"background": self.background, "layers": [self.layer], "composite": None}


def make_drawing(target: Image.Image, mask: Mask | None, box: Box | None) -> Drawing:
    """The target with its mask and its box. A box without area is not shown."""
    scale = SIDE / max(target.size)
    size = (max(1, round(target.width * scale)), max(1, round(target.height * scale)))
    if mask is None:
        mask = np.zeros((target.height, target.width), bool)
    shown = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    layer = np.zeros((size[1], size[0], 4), np.uint8)
    layer[shown] = (*RED, round(255 * OPACITY))
    image = Image.fromarray(layer)
    if box is not None:
        left, top, right, bottom = (round(value * scale) for value in box)
        edges = (left, top, max(left, right - 1), max(top, bottom - 1))
        ImageDraw.Draw(image).rectangle(edges, outline=(*BLUE, 255), width=_LINE)
    resampling = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS
    return Drawing(target.resize(size, resampling), image, mask, box)


def read_drawing(value: dict[str, Any] | None, before: Drawing) -> tuple[Mask | None, Box | None]:
    """The mask and the box as they have been drawn.

    Args:
        value: From `gr.ImageEditor`, with images of Pillow.
        before: What the editor was given.

    Returns:
        The mask, bool [height,width] at the target's size, or None where it is empty, and the box. Of a mask that was
        drawn on, without a new box, it is the mask's own.

    Raises:
        InputError: The editor does not show the target yet, or everything was cleared.
    """
    background = None if value is None else value["background"]
    if value is None or background is None or not _same_image(background, before.background):
        raise InputError("the editor does not show this target yet; wait a moment, and try again")
    after = _pixels(value["layers"][0]) if value["layers"] else np.zeros_like(_pixels(before.layer))
    start = _pixels(before.layer)
    if after.shape != start.shape or (start.any() and not after.any()):
        raise InputError("the mask is cleared, or is still loading; wait a moment, or take back what was drawn")
    changed = np.abs(after.astype(int) - start).max(axis=-1) > _TOLERANCE
    opaque, blue = after[..., 3] > 255 * OPACITY / 2, after[..., 2] > after[..., 0]
    mask = _carry_over(before.mask, drawn=changed & opaque & ~blue, erased=changed & ~opaque)
    box = _box_at(changed & opaque & blue, (before.mask.shape[1], before.mask.shape[0]))
    if box is None:
        box = before.box if np.array_equal(mask, before.mask) else mask_box(mask)
    return (mask if mask.any() else None), box


def _carry_over(mask: Mask, *, drawn: Mask, erased: Mask) -> Mask:
    """A mask after what was drawn and erased on a canvas of another size; a pixel follows most of what is on it."""
    height, width = mask.shape
    shares = [
        np.asarray(Image.fromarray(part.astype(np.float32)).resize((width, height), Image.Resampling.BOX))
        for part in (drawn, erased)
    ]
    return (mask | (shares[0] >= 0.5)) & ~(shares[1] >= 0.5)


def _box_at(strokes: Mask, size: tuple[int, int]) -> Box | None:
    box = mask_box(strokes)
    if box is None:
        return None
    across, down = size[0] / strokes.shape[1], size[1] / strokes.shape[0]
    left, top = int(box[0] * across), int(box[1] * down)
    right, bottom = max(left + 1, round(box[2] * across)), max(top + 1, round(box[3] * down))
    return left, top, min(right, size[0]), min(bottom, size[1])


def _same_image(one: Image.Image, other: Image.Image) -> bool:
    if one.size != other.size:
        return False
    difference = np.asarray(one.convert("RGB"), np.float32) - np.asarray(other, np.float32)
    return float(np.abs(difference).mean()) < _OTHER_IMAGE


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [H,W,4]; color counts as much as it is seen, since browsers round what is transparent."""
    pixels = np.array(image.convert("RGBA"))
    pixels[pixels[..., 3] == 0] = 0
    return pixels
