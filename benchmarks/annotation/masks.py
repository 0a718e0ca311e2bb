"""Masks as text for JSON lines, their boxes, and subjects cut out by them."""

import base64
import binascii
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mige_rt.errors import InputError
from mige_rt.images import decode_image

Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]


def encode_mask(mask: Mask) -> str:
    """A mask [height,width] as the base64 of a PNG of one bit."""
    file = BytesIO()
    Image.fromarray(mask).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def decode_mask(text: str, name: str) -> Mask:
    """The mask [height,width] that `encode_mask` was given.

    Args:
        text: Its base64.
        name: What an error calls it.

    Raises:
        InputError: It is no base64, or no image.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name} is no base64 ({error}); it should be a PNG of one bit") from error
    return np.asarray(decode_image(content, name).convert("L")) > 127


def mask_box(mask: Mask) -> Box | None:
    """(left, top, right, bottom) of what a mask has, the last two exclusive; None where it has nothing."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def cut_out(image: Image.Image, mask: Mask, box: Box, ground: Literal["black", "white"]) -> Image.Image:
    """The masked part of an image on one color, cropped to the box; the judge's cut-outs are the black ones."""
    color = np.uint8(255 if ground == "white" else 0)
    return Image.fromarray(np.where(mask[..., None], np.asarray(image), color)).crop(box)
