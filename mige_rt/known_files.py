"""Which bundles and plans were made or tried on this machine.

Each is remembered by the SHA-256 of the file that describes it, which has the hashes of all the others, as an empty
file of that name in the user's cache folder.
"""

import hashlib
import logging
import os
import sys
from pathlib import Path

from mige_rt.errors import InputError

CACHE_VARIABLE = "MIGE_RT_CACHE"  # the environment variable with another folder

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where mige-rt keeps what it found out, as the system wants it; it need not exist."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "mige-rt"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/mige-rt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mige-rt"


def sha256(path: Path) -> str:
    """A file's SHA-256 in hex. Raises InputError when it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256")  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    return digest.hexdigest()


def is_known(description: Path) -> bool:
    """Whether what a file describes was made or tried here."""
    return (cache_folder() / "known" / sha256(description)).is_file()


def remember(description: Path) -> None:
    """Remember what a file describes; where that cannot be, it is tried again, which costs time alone."""
    path = cache_folder() / "known" / sha256(description)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        _log.warning("that %s is known here cannot be remembered (%s)", description.parent, error)
