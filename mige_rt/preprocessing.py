"""Images as the two image encoders take them: ViT pixels and VAE pixels, [channel, height, width]."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mige_rt.image_size import Fit

_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def vit_pixels(image: Image.Image, side: int) -> NDArray[np.float32]:
    """The whole image resized to a square (bicubic) and normalised with CLIP's mean and deviation, as published.

    Args:
        image: RGB, of any size.
        side: Of the square, in pixels.

    Returns:
        float32 [3,side,side].
    """
    resized = image.resize((side, side), Image.Resampling.BICUBIC)
    values = np.asarray(resized, dtype=np.float32) / 255  # [side,side,3]
    return np.ascontiguousarray(((values - _CLIP_MEAN) / _CLIP_STD).transpose(2, 0, 1), dtype=np.float32)


def vae_pixels(image: Image.Image, width: int, height: int, fit: Fit) -> NDArray[np.float32]:
    """An image fitted to a size, in [-1,1].

    Args:
        image: RGB, of any size.
        width: Pixels.
        height: Pixels.
        fit: `crop` scales it (bilinear) until it covers the size and cuts out the middle: for a square, the published
            preparation of sources and training images. `pad` scales it (bicubic) until it fits inside, on black: the
            published preparation of the references of subject-driven inference. `aspect` does as `crop`; what sets it
            apart is that the caller takes the size from `image_size.aspect_size`.

    Returns:
        float32 [3,height,width].
    """
    fitted = _padded(image, width, height) if fit == "pad" else crop(image, width, height)
    values = np.asarray(fitted, dtype=np.float32) / 127.5 - 1  # [height,width,3]
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale an image (bilinear) until it covers a size in pixels, and cut out the middle."""
    source_width, source_height = image.size
    if width * source_height >= height * source_width:
        covering = (width, width * source_height // source_width)
    else:
        covering = (height * source_width // source_height, height)
    left, top = round((covering[0] - width) / 2), round((covering[1] - height) / 2)
    # Resizing only what the crop shows: the rest of a very long image would not fit into memory.
    scale_x, scale_y = source_width / covering[0], source_height / covering[1]
    box = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def _padded(image: Image.Image, width: int, height: int) -> Image.Image:
    source_width, source_height = image.size
    if width * source_height <= height * source_width:
        inside = (width, max(1, width * source_height // source_width))
    else:
        inside = (max(1, height * source_width // source_height), height)
    canvas = Image.new("RGB", (width, height), "black")
    resized = image.resize(inside, Image.Resampling.BICUBIC)
    canvas.paste(resized, ((width - inside[0]) // 2, (height - inside[1]) // 2))
    return canvas
