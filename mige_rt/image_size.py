"""How large an image is made, and how images of other shapes are fitted to it. Sizes are (width, height) in pixels."""

import math
from typing import Literal

from mige_rt.errors import InputError

Fit = Literal["crop", "pad", "aspect"]


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of a text such as 512 or 768x512.

    Raises:
        InputError: It is no size.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
        raise InputError(f"{text!r} is no size; give pixels as 512, or as 768x512 (width x height)")
    return int(parts[0]), int(parts[-1])


def cropped_share(image_size: tuple[int, int], width: int, height: int) -> float:
    """The share of an image's area, 0 to below 1, that cropping it to width x height cuts away."""
    image_ratio, ratio = image_size[0] / image_size[1], width / height
    return 1 - min(image_ratio, ratio) / max(image_ratio, ratio)


def aspect_size(image_size: tuple[int, int], area: int, multiple: int) -> tuple[int, int]:
    """The size of the image's aspect ratio and of about `area` pixels.

    Args:
        image_size: (width, height) of the image.
        area: Pixels.
        multiple: Both sides become multiples of it. The shorter one is at least one multiple; the longer then stays
            within the area, however thin the image is.

    Returns:
        (width, height)
    """
    elongation = max(image_size) / min(image_size)
    short = max(math.sqrt(area / elongation), multiple)
    long = area / short
    width, height = (long, short) if image_size[0] >= image_size[1] else (short, long)
    return _nearest_multiple(width, multiple), _nearest_multiple(height, multiple)


def _nearest_multiple(length: float, multiple: int) -> int:
    return max(1, round(length / multiple)) * multiple
