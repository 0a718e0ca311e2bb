"""Images of a manifest that are files, or members of a shard: `shard-000000.tar/000000007.target.png`."""

import os
import tarfile
from collections.abc import Mapping
from functools import lru_cache

from PIL.Image import Image

from mige_rt.errors import InputError
from mige_rt.images import decode_image, open_image

_MARK = ".tar/"


def image_exists(path: str) -> bool:
    """Whether there is such a file, or such a member of a tar file."""
    member = _split(path)
    if member is None:
        return os.path.isfile(path)
    try:
        return member[1] in _members(member[0])
    except InputError:
        return False


def open_sample_image(path: str) -> Image:
    """The image in a file, or in a member of a tar file, see `mige_rt.images.open_image`.

    Raises:
        InputError: It is not there, or cannot be read.
    """
    return open_image(path) if _split(path) is None else decode_image(read_image_file(path), path)


def read_image_file(path: str) -> bytes:
    """The content of a file, or of a member of a tar file.

    Raises:
        InputError: It is not there, or cannot be read.
    """
    file_name, start, size = path, 0, -1
    if (member := _split(path)) is not None:
        file_name, name = member
        members = _members(file_name)
        if name not in members:
            raise InputError(f"there is no image {name} in {file_name}; make the shard again")
        start, size = members[name]
    try:
        with open(file_name, "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise InputError(f"{file_name} cannot be read ({error}); check the disk, or copy it elsewhere") from error


def _split(path: str) -> tuple[str, str] | None:
    """The tar file and the member that a path names; None where it names a file."""
    tar, mark, name = path.replace(os.sep, "/").rpartition(_MARK)
    return (tar + _MARK[:-1], name) if mark and os.path.isfile(tar + _MARK[:-1]) else None


def _members(path: str) -> Mapping[str, tuple[int, int]]:
    return _indexed(path, os.stat(path).st_mtime_ns)


@lru_cache(maxsize=64)
def _indexed(path: str, _: int) -> Mapping[str, tuple[int, int]]:
    """Where each file of a tar file starts, and how many bytes it has. Contents are not decompressed or unpacked."""
    try:
        with tarfile.open(path, "r:") as tar:
            return {member.name: (member.offset_data, member.size) for member in tar if member.isreg()}
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{path} cannot be read as a shard ({error}); make it again") from error
