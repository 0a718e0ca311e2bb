"""Image files and Pillow images of any kind, as the RGB images that everything else takes."""

import math
import os
import stat
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mige_rt.errors import InputError, reason

MAX_PIXELS = 80_000_000  # 240 MB decoded
# Not all that Pillow reads: some formats start other programs.
READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")

_LIMIT_OPTION = "--max-pixels"  # of `mige-rt run`
_ELONGATION = 8  # a side may be this many times that of the largest square: each row costs memory of its own
_pillow_settings = threading.Lock()  # Pillow's limit and Python's warnings are set for all threads


def open_image(path: str | Path, *, max_pixels: int | None = None) -> Image.Image:
    """The image in a file as RGB, upright, on white, its first frame if it moves: see `normalize_image`.

    Args:
        path: The file.
        max_pixels: See `normalize_image`.

    Raises:
        InputError: There is no such file, it may not be read, it is no image, it is damaged or incomplete, or it is too
            large; the size is read from its header, and nothing of a larger one is decoded.
    """
    path = Path(path)
    size = _check_file(path)
    try:
        file = path.open("rb")
    except PermissionError as error:
        raise _no_permission(path) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        return _read(file, str(path), size, max_pixels)


def decode_image(
    data: bytes, name: str, *, max_pixels: int | None = None, limit_option: str = _LIMIT_OPTION
) -> Image.Image:
    """Like `open_image`, for the content of an image file.

    Args:
        data: Of the file.
        name: What an error calls it.
        max_pixels: See `normalize_image`.
        limit_option: What an error calls the option that raises `max_pixels`.

    Raises:
        InputError: It is no image, it is damaged or incomplete, or it is too large.
    """
    return _read(BytesIO(data), name, len(data), max_pixels, limit_option)


def _read(
    file: BinaryIO, name: str, size: int, max_pixels: int | None, limit_option: str = _LIMIT_OPTION
) -> Image.Image:
    description = f"{name} ({size} bytes)"
    with _own_limits():
        try:
            image = Image.open(file, formats=READABLE)
        except Exception as error:  # damaged files make the format readers raise nearly anything
            if _is_system_error(error):
                raise _unreadable(name, error) from error
            raise InputError(
                f"{description} is not an image that can be read; give one of these formats: {', '.join(READABLE)}"
            ) from error
        _check_size(image, name, max_pixels, limit_option)
        opened = _normalized(image, name)
        if image.format == "PNG":
            _check_png_end(file, description)
        return opened


def normalize_image(image: Image.Image, name: str = "the image", *, max_pixels: int | None = None) -> Image.Image:
    """A new RGB image from any Pillow image; the one given is left as it is.

    EXIF rotation is applied, transparency composed on white, 16-bit and floating-point values scaled to 8 bits (none
    clipped), CMYK, palette and grey converted. EXIF that cannot be read is passed over.

    Args:
        image: Of any mode and size.
        name: What an error calls it.
        max_pixels: How many pixels an image may have; a side is at most eight times that of a square of as many.
            None: MAX_PIXELS.

    Raises:
        InputError: It has no pixels or too many, or cannot be decoded.
    """
    _check_size(image, name, max_pixels, _LIMIT_OPTION)
    return _normalized(image, name)


def _normalized(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return _to_rgb(_upright(image))
    except MemoryError as error:
        raise InputError(f"{name} ({image.width}x{image.height}) does not fit into memory; make it smaller") from error
    except InputError as error:
        raise InputError(f"{name} cannot be used: {error}") from error
    except Exception as error:  # damaged files make the decoders raise nearly anything
        if _is_system_error(error):
            raise _unreadable(name, error) from error
        raise InputError(f"{name} cannot be decoded: it is damaged or incomplete; save or download it again") from error


def _check_file(path: Path) -> int:
    """The size of a regular file in bytes. Raises InputError where it is something else."""
    try:
        status = os.stat(path)
    except PermissionError as error:
        raise _no_permission(path) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"there is no image file at {path}; check the path") from error
    if not stat.S_ISREG(status.st_mode):  # a device or a pipe might never end
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise InputError(f"there is no image file at {path}, it is {kind}; check the path")
    return status.st_size


def _is_system_error(error: Exception) -> TypeGuard[OSError]:
    """Whether the system could not read a file. Pillow's own errors of damaged files have no number."""
    return isinstance(error, OSError) and error.errno is not None


def _unreadable(name: str | Path, error: OSError) -> InputError:
    return InputError(f"{name} cannot be read ({reason(error)}); check the disk, or copy it elsewhere")


def _no_permission(path: Path) -> InputError:
    return InputError(f"{path} cannot be read: permission is denied; change its permissions or those of its folder")


@contextmanager
def _own_limits() -> Generator[None, None, None]:
    """Pillow neither limits pixels, which is done here, nor warns of odd metadata, which are not used."""
    with _pillow_settings, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(image: Image.Image, name: str, max_pixels: int | None, limit_option: str) -> None:
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    width, height = image.size
    if width * height == 0:
        raise InputError(f"{name} has no pixels ({width}x{height}); give an image of at least 1x1")
    max_side = _ELONGATION * math.isqrt(max_pixels)
    if width * height > max_pixels or max(width, height) > max_side:
        raise InputError(
            f"{name} ({width}x{height}) is too large: images of at most {max_pixels:,} pixels, with sides of at most "
            f"{max_side:,}, are opened; make it smaller, or raise {limit_option}"
        )


def _check_png_end(file: BinaryIO, description: str) -> None:
    """Find out whether a PNG is there to its last byte, which its pixels do not show: Pillow decodes what there is."""
    try:
        file.seek(0)
        Image.open(file, formats=["PNG"]).verify()  # every chunk but the last one, which is empty
        if len(file.read(4)) < 4:  # its checksum
            raise OSError("the last chunk is cut")
    except Exception as error:  # OSError or SyntaxError, as the damage may be
        raise InputError(
            f"{description} ends too early, or is damaged behind its pixels; save or download it again"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says. Junk there does not make a good image a bad one."""
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # junk makes Pillow raise nearly anything
        return image


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
        raise InputError("it holds values that are NaN or infinite; save it again without them")
    usual = 1.0 if mode == "F" else 65535.0
    if low >= 0 and high <= usual:
        low, high = 0.0, usual
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    return np.rint((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8)
