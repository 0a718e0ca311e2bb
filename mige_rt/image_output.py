"""Image files with their settings inside, written whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin

from mige_rt.atomic import atomic_file
from mige_rt.errors import InputError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # by extension

_EXIF_DESCRIPTION = 0x010E
_EXIF_LIMIT = 60_000  # bytes; a JPEG holds at most 64 KiB of EXIF


def check_output(path: str | Path) -> None:
    """Find out before the work whether `save_image` could write there. Leaves nothing behind.

    Raises:
        InputError: The extension is not one of FORMATS, the path is a folder, or its folder is missing or cannot be
            written to.
    """
    path = Path(path)
    _format(path)
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; give the name of an image file in it")
    if not os.path.isdir(path.parent):
        raise InputError(f"the folder {path.parent} does not exist; make it first, or write elsewhere")
    probe = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:  # by doing it: asking for permissions is not enough, a special file system allows and then refuses
        probe.touch(exist_ok=False)
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"cannot write {path} ({error}); choose another folder or name") from error


def save_image(image: Image.Image, path: str | Path, info: Mapping[str, str]) -> None:
    """Write an image in the format that the extension names, whole or not at all.

    Args:
        image: RGB.
        path: An existing file is replaced.
        info: Becomes text chunks of a PNG, and JSON in the EXIF description of a JPEG or WebP, where it is left out if
            it is too long.

    Raises:
        InputError: It cannot be written.
    """
    path = Path(path)
    image_format = _format(path)
    info = {key: value.encode("utf-8", "replace").decode("utf-8") for key, value in info.items()}
    try:
        with atomic_file(path) as temporary, temporary.open("xb") as file:
            match image_format:
                case "PNG":
                    image.save(file, format="PNG", pnginfo=_png_text(info))
                case "JPEG":
                    image.save(file, format="JPEG", quality=95, subsampling=0, exif=_exif(info))
                case _:
                    image.save(file, format="WEBP", quality=95, exif=_exif(info))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"cannot write {path} ({error}); choose another folder or name") from error


def _format(path: Path) -> str:
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"{path} has the extension {path.suffix!r}; an image is written as one of {', '.join(FORMATS)}"
        )
    return FORMATS[path.suffix.lower()]


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
