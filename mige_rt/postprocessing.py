"""The decoder's pixels as images."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mige_rt.errors import NotFiniteError


def to_image(pixels: NDArray[np.float32]) -> Image.Image:
    """An RGB image from pixels.

    Args:
        pixels: [3,H,W], -1 black and 1 white; values outside are clipped.

    Raises:
        NotFiniteError: A value is NaN or infinite: the model overflowed, because the precision is too low or the
            guidance scales are too large.
    """
    if not np.isfinite(pixels).all():
        bad = int(np.count_nonzero(~np.isfinite(pixels)))
        raise NotFiniteError(
            f"{bad} of the image's {pixels.size} values are NaN or infinite, finite ones are expected: "
            "the model overflowed; try smaller scales, or the precision fp32"
        )
    values = np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))
