"""The source's own pixels where an edit has changed nothing.

An edit goes through the VAE, which gives no pixel back as it was, and a model changes a little everywhere. What the
edit has changed is found by comparing the result with the source after the same VAE, so that what the VAE does counts
for nothing.
"""

import numpy as np
from PIL import Image, ImageChops, ImageFilter

CHANGED = 20  # of 255, in some channel, as the mean around a pixel
REACH = 1 / 48  # of the shorter side: how far around a pixel is looked, and how wide the change's border is


def paste_back(source: Image.Image, reconstruction: Image.Image, result: Image.Image) -> Image.Image:
    """The result where it differs from the source, and the source elsewhere, with a soft border.

    Args:
        source: RGB, fitted to the result's size.
        reconstruction: The source, encoded and decoded by the VAE.
        result: The model's image.

    Returns:
        An image of that size. Pixels away from any change are the source's, to the bit.

    Raises:
        ValueError: The sizes differ.
    """
    if not source.size == reconstruction.size == result.size:
        raise ValueError(f"images of one size are expected: {source.size}, {reconstruction.size}, {result.size}")
    reach = max(1, round(min(result.size) * REACH))
    difference = np.asarray(ImageChops.difference(result, reconstruction)).max(axis=-1)
    around = np.asarray(Image.fromarray(difference).filter(ImageFilter.BoxBlur(reach)))
    changed = Image.fromarray((around > CHANGED).astype(np.uint8) * 255)
    grown = changed.filter(ImageFilter.MaxFilter(4 * reach + 1))
    return Image.composite(result, source, grown.filter(ImageFilter.BoxBlur(reach)))
