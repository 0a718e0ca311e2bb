"""Image files and Pillow images of any kind, as the RGB images that everything else takes."""

import math
import os
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mige_rt.errors import InputError

MAX_PIXELS = 80_000_000  # 240 MB decoded; below the size from which Pillow itself warns of a decompression bomb
# Not all that Pillow reads: some formats start other programs.
READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")


def open_image(path: str | Path) -> Image.Image:
    """The image in a file as RGB, upright, on white, its first frame if it moves: see `normalize_image`.

    Raises:
        InputError: There is no such file, it is no image, it is damaged or incomplete, or it has more than MAX_PIXELS;
            the size is read from its header, and nothing of a larger one is decoded.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path's, it takes names that the system refuses
        raise InputError(f"there is no image file at {path}; check the path")
    return _read(path, f"{path} ({path.stat().st_size} bytes)", str(path), MAX_PIXELS)


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Like `open_image`, for an image file's content.

    Args:
        data: Of the file.
        name: What an error calls it.
        max_pixels: At most MAX_PIXELS.

    Raises:
        InputError: It is no image, it is damaged or incomplete, or it has more than `max_pixels`.
    """
    return _read(BytesIO(data), f"{name} ({len(data)} bytes)", name, max_pixels)


def _read(file: Path | BytesIO, description: str, name: str, max_pixels: int) -> Image.Image:
    """description: what an error calls a file that is no image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=READABLE)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(_too_large(name, max_pixels)) from error
    except Exception as error:  # damaged files make the format readers raise nearly anything
        raise InputError(
            f"{description} is not an image that can be read; give one of these formats: {', '.join(READABLE)}"
        ) from error
    with image:
        if image.width * image.height > max_pixels:
            raise InputError(_too_large(f"{name} ({image.width}x{image.height})", max_pixels))
        return normalize_image(image, name=name)


def normalize_image(image: Image.Image, name: str = "the image") -> Image.Image:
    """A new RGB image from any Pillow image; the one given is left as it is.

    EXIF rotation is applied, transparency composed on white, 16-bit and floating-point values scaled to 8 bits (none
    clipped), CMYK, palette and grey converted.

    Args:
        image: Of any mode and size.
        name: What an error calls it.

    Raises:
        InputError: It has no pixels, more than MAX_PIXELS, or cannot be decoded.
    """
    width, height = image.size
    if width * height == 0:
        raise InputError(f"{name} has no pixels ({width}x{height}); give an image of at least 1x1")
    if width * height > MAX_PIXELS:
        raise InputError(_too_large(f"{name} ({width}x{height})", MAX_PIXELS))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(_too_large(name, MAX_PIXELS)) from error
    except Exception as error:  # damaged files make the decoders raise nearly anything
        raise InputError(
            f"{name} cannot be decoded ({error}); it is damaged or incomplete, save or download it again"
        ) from error


def _too_large(name: str, max_pixels: int) -> str:
    return f"{name} is too large: images of at most {max_pixels:,} pixels are opened; make it smaller"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image, dtype=np.float32), image.mode)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: NDArray[np.float32], mode: str) -> NDArray[np.uint8]:
    """Grey values of wider types to 0..255, by the range usual for their type, or by their own where they leave it."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("it holds values that are NaN or infinite")
    usual = 1.0 if mode == "F" else 65535.0
    if low >= 0 and high <= usual:
        low, high = 0.0, usual
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    return np.rint((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8)
