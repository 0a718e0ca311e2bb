"""Pillow pictures -> ViT pixels and VAE pixels, and back.

Sizes are (width, height) in pixels, as Pillow has them; arrays are [channel, height, width].
"""

import json
import math
import os
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from mige_rt.errors import InputError, NotFiniteError

Fit = Literal["crop", "pad", "aspect"]

MAX_PIXELS = 80_000_000  # 240 MB decoded; below the size from which Pillow itself warns of a decompression bomb
# Not all that Pillow reads: some formats start other programs.
READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
_EXIF_DESCRIPTION = 0x010E
_EXIF_LIMIT = 60_000  # bytes; a JPEG holds at most 64 KiB of EXIF


def open_picture(path: str | Path) -> Image.Image:
    """The picture in a file as RGB, upright, on white, its first frame if it moves: see `check_picture`.

    Raises InputError when there is no such file, it is no picture, it is damaged or incomplete, or it has more than
    `MAX_PIXELS`; the size is read from its header, and nothing of a larger one is decoded.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path's, it takes names that the system refuses
        raise InputError(f"there is no picture file at {path}; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=READABLE)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(_too_large(str(path))) from error
    except Exception as error:  # damaged files make the format readers raise nearly anything
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) is not a picture that can be read; "
            f"give one of these formats: {', '.join(READABLE)}"
        ) from error
    with image:
        return check_picture(image, name=str(path))


def check_picture(image: Image.Image, name: str = "the picture") -> Image.Image:
    """A new RGB picture from any Pillow picture, the one given is left as it is; `name` stands in the error's message.

    EXIF rotation is applied, transparency composed on white, 16-bit and floating-point values scaled to 8 bits (none
    clipped), CMYK, palette and grey converted. Raises InputError when it has no pixels, more than `MAX_PIXELS`, or
    cannot be decoded.
    """
    width, height = image.size
    if width * height == 0:
        raise InputError(f"{name} has no pixels ({width}x{height}); give a picture of at least 1x1")
    if width * height > MAX_PIXELS:
        raise InputError(_too_large(f"{name} ({width}x{height})"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(_too_large(name)) from error
    except Exception as error:  # damaged files make the decoders raise nearly anything
        raise InputError(
            f"{name} cannot be decoded ({error}); it is damaged or incomplete, save or download it again"
        ) from error


def vit_pixels(image: Image.Image, side: int) -> NDArray[np.float32]:
    """[3,side,side] from the whole RGB picture: a square (bicubic), normalised with CLIP's figures, as published."""
    resized = image.resize((side, side), Image.Resampling.BICUBIC)
    values = np.asarray(resized, dtype=np.float32) / 255  # [side,side,3]
    return np.ascontiguousarray(((values - _CLIP_MEAN) / _CLIP_STD).transpose(2, 0, 1), dtype=np.float32)


def vae_pixels(image: Image.Image, width: int, height: int, fit: Fit) -> NDArray[np.float32]:
    """[3,height,width] in [-1,1] from an RGB picture of any size.

    `crop` scales it (bilinear) until it covers width x height and cuts out the middle: for a square, the published
    preparation of sources and training pictures. `pad` scales it (bicubic) until it fits inside, on black: the
    published preparation of the references of subject-driven inference. `aspect` does as `crop`: what sets it apart
    is that the caller takes width and height from `aspect_size`.
    """
    fitted = _padded(image, width, height) if fit == "pad" else _cropped(image, width, height)
    values = np.asarray(fitted, dtype=np.float32) / 127.5 - 1  # [height,width,3]
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def cropped_share(image_size: tuple[int, int], width: int, height: int) -> float:
    """The share of a picture's area, 0 to below 1, that `crop` to width x height cuts away."""
    shape, wanted = image_size[0] / image_size[1], width / height
    return 1 - min(shape, wanted) / max(shape, wanted)


def aspect_size(image_size: tuple[int, int], area: int, multiple: int) -> tuple[int, int]:
    """(width, height) of the picture's shape and about `area` pixels, both multiples of `multiple`.

    The shorter side is at least one multiple; the longer then stays within the area, however thin the picture is.
    """
    elongation = max(image_size) / min(image_size)
    short = max(math.sqrt(area / elongation), multiple)
    long = area / short
    width, height = (long, short) if image_size[0] >= image_size[1] else (short, long)
    return _nearest_multiple(width, multiple), _nearest_multiple(height, multiple)


def to_picture(pixels: NDArray[np.float32]) -> Image.Image:
    """An RGB picture from [3,H,W] values, -1 black and 1 white; what lies outside is clipped.

    Raises NotFiniteError when a value is not a finite number: the model overflowed, for want of precision or for scales
    too large.
    """
    if not np.isfinite(pixels).all():
        bad = int(np.count_nonzero(~np.isfinite(pixels)))
        raise NotFiniteError(
            f"{bad} of the picture's {pixels.size} values are NaN or infinite, finite ones are expected: "
            "the model overflowed; try smaller scales, or the precision fp32"
        )
    values = np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))


def check_output(path: str | Path) -> None:
    """Finds out before the work whether `save_picture` could write there. Leaves nothing behind.

    Raises InputError when the extension is not one of `WRITABLE`, the path is a folder, or its folder is missing or
    cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITABLE:
        raise InputError(
            f"{path} has the extension {path.suffix!r}; a picture is written as one of {', '.join(WRITABLE)}"
        )
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; give the name of a picture file in it")
    if not os.path.isdir(path.parent):
        raise InputError(f"the folder {path.parent} does not exist; make it first, or write elsewhere")
    part = _part_beside(path)
    try:  # by doing it: asking for permissions is not enough, a special file system allows and then refuses
        part.touch(exist_ok=False)
        part.unlink()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"cannot write {path} ({error}); choose another folder or name") from error


def save_picture(image: Image.Image, path: str | Path, info: Mapping[str, str]) -> None:
    """Writes a picture in the format that the extension names, whole or not at all: a killed run leaves no half of it.

    `info` becomes text chunks of a PNG, and JSON in the EXIF description of a JPEG or WebP (left out where it is too
    long). Raises InputError when it cannot be written.
    """
    path = Path(path)
    check_output(path)
    info = {key: value.encode("utf-8", "replace").decode("utf-8") for key, value in info.items()}
    part = _part_beside(path)
    try:
        with part.open("xb") as file:
            match WRITABLE[path.suffix.lower()]:
                case "PNG":
                    image.save(file, format="PNG", pnginfo=_png_text(info))
                case "JPEG":
                    image.save(file, format="JPEG", quality=95, subsampling=0, exif=_exif(info))
                case "WEBP":
                    image.save(file, format="WEBP", quality=95, exif=_exif(info))
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error}); choose another folder or name") from error
    finally:
        part.unlink(missing_ok=True)


def _too_large(name: str) -> str:
    return f"{name} is too large: pictures of at most {MAX_PIXELS:,} pixels are opened; make it smaller"


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


def _cropped(image: Image.Image, width: int, height: int) -> Image.Image:
    source_width, source_height = image.size
    if width * source_height >= height * source_width:
        covering = (width, width * source_height // source_width)
    else:
        covering = (height * source_width // source_height, height)
    left, top = round((covering[0] - width) / 2), round((covering[1] - height) / 2)
    # Resizing only what the crop shows: the rest of a very long picture would not fit into memory.
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


def _nearest_multiple(length: float, multiple: int) -> int:
    return max(1, round(length / multiple)) * multiple


def _part_beside(path: Path) -> Path:
    """A name in the same folder, so that the finished file can be renamed there in one step."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def _png_text(info: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for key, value in info.items():
        chunks.add_text(key, value)
    return chunks


def _exif(info: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    description = json.dumps(info)  # ASCII, which is all that the tag may hold
    if info and len(description) <= _EXIF_LIMIT:
        exif[_EXIF_DESCRIPTION] = description
    return exif
