"""Image files with their settings inside, written whole or not at all, and over an older file only when told to."""

import io
import itertools
import json
import os
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

from PIL import Image, PngImagePlugin

from mige_rt.atomic import atomic_file, check_folder
from mige_rt.errors import InputError, reason

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # by extension

_EXIF_DESCRIPTION = 0x010E
_EXIF_LIMIT = 60_000  # bytes; a JPEG holds at most 64 KiB of EXIF


class OutputExistsError(InputError):
    """There is a file where an image should be written, and it may not be replaced."""


def numbered(out: Path, name: object) -> Path:
    """`out-NAME.png` for `out.png`."""
    return out.with_name(f"{out.stem}-{name}{out.suffix}")


def output_paths(out: Path, images: int) -> list[Path]:
    """The files of as many images: `out.png` of one; `out-1.png`, `out-2.png`, ... of several."""
    return [out] if images == 1 else [numbered(out, i) for i in range(1, images + 1)]


def unused_paths(out: Path, images: int) -> list[Path]:
    """Like `output_paths`, but counting on until no file exists under any of the names."""
    if not any(map(os.path.lexists, paths := output_paths(out, images))):
        return paths
    for first in itertools.count(1):
        paths = [numbered(out, i) for i in range(first, first + images)]
        if not any(map(os.path.lexists, paths)):
            return paths
    raise AssertionError("numbers do not end")


def check_output(path: str | Path, *, overwrite: bool = False) -> None:
    """Find out before the work whether `save_image` could write there. Leaves nothing behind.

    Args:
        path: The image file to write.
        overwrite: An existing file may be replaced.

    Raises:
        OutputExistsError: There is a file already, and `overwrite` is false.
        InputError: See `check_name` and `check_existing`.
    """
    path = Path(path)
    check_name(path)
    check_existing(path, overwrite=overwrite)


def check_name(path: Path) -> None:
    """Find out whether image files named like `path` can be written in its folder.

    Raises:
        InputError: The extension is not one of FORMATS, or the folder is missing or cannot be written to.
    """
    _format(path)
    try:
        is_folder = stat.S_ISDIR(os.stat(path.parent).st_mode)
    except FileNotFoundError as error:
        raise InputError(f"the folder {path.parent} does not exist; make it first, or write elsewhere") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise _cannot_write(path, error) from error
    if not is_folder:
        raise InputError(f"{path.parent} is no folder; write elsewhere")
    try:
        check_folder(path.parent)
        with suppress(FileNotFoundError):
            os.lstat(path)  # refuses a name that is too long, or holds a zero byte
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error


def check_existing(path: Path, *, overwrite: bool = False) -> None:
    """Find out whether what is at a path already, if anything, may be replaced.

    Raises:
        OutputExistsError: It is a file, and `overwrite` is false.
        InputError: It is never replaced: a folder, a device, a read-only file, a symbolic link that leads nowhere.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise InputError(
                f"{path} is a symbolic link to {os.readlink(path)}, which does not exist; remove it, or write elsewhere"
            ) from error
        return
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder; give the name of an image file in it")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is no regular file; give the name of an image file")
    if not overwrite:
        raise OutputExistsError(f"{path} exists already; give another name, or --overwrite to replace it")
    # Permission bits, too, since the administrator may write all files.
    if not mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) or not os.access(path, os.W_OK):
        raise InputError(f"{path} is read-only; change its permissions, or write elsewhere")


def save_image(image: Image.Image, path: str | Path, info: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Write an image in the format that the extension names, whole or not at all.

    It is written under a temporary name, forced to the disk, and decoded again, before it gets its name.

    Args:
        image: RGB.
        path: Where a symbolic link leads to a file, that is replaced, and not the link.
        info: Becomes text chunks of a PNG, and JSON in the EXIF description of a JPEG or WebP, where it is left out if
            it is too long.
        overwrite: An existing file is replaced.

    Raises:
        OutputExistsError: There is a file, and `overwrite` is false.
        InputError: It cannot be written.
    """
    path = Path(path)
    try:
        content = _encoded(image, _format(path), info)
        target = Path(os.path.realpath(path)) if overwrite else path
        with atomic_file(target, replace=overwrite) as temporary:
            if overwrite and target.exists():
                shutil.copymode(target, temporary)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _check_written(temporary, content, image)
    except FileExistsError as error:
        raise OutputExistsError(f"{path} has appeared meanwhile, and was left as it is; give another name") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, InputError):
            raise
        raise _cannot_write(path, error) from error


def read_settings(path: Path) -> dict[str, str]:
    """The `info` that `save_image` has put into a file; empty where there is none, or no image."""
    try:
        with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            if image.format == "PNG":
                info: object = image.info
            else:
                info = json.loads(image.getexif().get(_EXIF_DESCRIPTION, "{}"))
    except Exception:  # damaged files make the format readers raise nearly anything
        return {}
    if not isinstance(info, dict):
        return {}
    settings = cast("dict[object, object]", info)
    return {key: str(value) for key, value in settings.items() if isinstance(key, str) and isinstance(value, str)}


def _cannot_write(path: Path, error: OSError | ValueError) -> InputError:
    return InputError(f"cannot write {path} ({reason(error)}); choose another folder or name")


def _encoded(image: Image.Image, image_format: str, info: Mapping[str, str]) -> bytes:
    """The content of a file. Encoded in memory, since Pillow overlooks errors where it writes files itself."""
    info = {key: value.encode("utf-8", "replace").decode("utf-8") for key, value in info.items()}
    file = io.BytesIO()
    match image_format:
        case "PNG":
            image.save(file, format="PNG", pnginfo=_png_text(info))
        case "JPEG":
            image.save(file, format="JPEG", quality=95, subsampling=0, exif=_exif(info))
        case _:
            image.save(file, format="WEBP", quality=95, exif=_exif(info))
    return file.getvalue()


def _check_written(path: Path, content: bytes, image: Image.Image) -> None:
    """Raises OSError when a file does not hold what was written, or that does not decode to an image of this size."""
    written = path.read_bytes()
    if written != content:
        raise OSError(f"{len(written)} of {len(content)} bytes were kept")
    with Image.open(io.BytesIO(written)) as decoded:
        decoded.load()
        if decoded.size != image.size or (decoded.format == "PNG" and decoded.tobytes() != image.tobytes()):
            raise OSError("another image was read back")


def _format(path: Path) -> str:
    if not path.name or path.name == "..":
        raise InputError(f"{str(path)!r} names no file; give the name of an image file, such as out.png")
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
