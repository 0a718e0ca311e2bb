"""Files and folders written whole or not at all: under a temporary name in the same folder, then renamed.

A killed run leaves its temporary file or folder. Each is locked while its run lives (flock, which ends with the
process), so that the next run that writes to the folder knows which ones to remove. Windows has no flock; there
leftovers stay.
"""

import os
import re
import shutil
import sys
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mige_rt.errors import InputError, reason

if sys.platform != "win32":
    import fcntl

_TEMPORARY = re.compile(r"\.mige-rt-[0-9a-f]{12}\.part")


@contextmanager
def atomic_file(path: Path, *, replace: bool = True) -> Generator[Path, None, None]:
    """An empty file beside `path`, renamed to it when the block ends, and removed when the block fails.

    A killed run leaves `.mige-rt-ID.part` at most.

    Args:
        path: The file to write.
        replace: An existing file is replaced at the end. False: it is left as it is, also if it has appeared since.

    Yields:
        The file to write to, in its place.

    Raises:
        FileExistsError: `path` exists, and is not to be replaced.
    """
    _remove_leftover_files(path.parent)
    temporary, lock = _locked_file(path.parent)
    try:
        yield temporary
        if replace:
            os.replace(temporary, path)
        else:
            _rename_to_new(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        _release(lock)


def is_temporary(path: Path) -> bool:
    """Whether a file is one that `atomic_file` writes to, or that a killed run has left."""
    return _TEMPORARY.fullmatch(path.name) is not None


def check_folder(folder: Path) -> None:
    """Find out whether `atomic_file` can write in a folder. Leaves nothing behind. Raises OSError when it cannot."""
    temporary, lock = _locked_file(folder)  # by doing it: a special file system gives permission and then refuses
    temporary.unlink(missing_ok=True)
    _release(lock)


@contextmanager
def atomic_folder(out: Path, *, replace: bool = False) -> Generator[Path, None, None]:
    """A temporary folder beside `out`, which becomes `out` when the block ends, and vanishes when it fails.

    A killed run leaves `OUT.partial-PID` at most.

    Args:
        out: The folder to make.
        replace: `out` may exist; the new folder takes its place at the end, and it is removed (killed just then:
            `OUT.old-PID` is left, which the next run that makes `out` puts back or removes).

    Yields:
        The folder to write into.

    Raises:
        InputError: `out` exists, or cannot be written.
    """
    if os.path.lexists(out) and not replace:
        raise InputError(f"{out} exists already: give a path that does not, or remove it first")
    try:
        out = Path(os.path.abspath(out))
        temporary = out.with_name(f"{out.name}.partial-{os.getpid()}")
        _remove_leftover_folders(out)
        temporary.mkdir()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{out} cannot be written ({reason(error)}): give a path in an existing folder of your own"
        ) from error
    lock = _lock(temporary)
    try:
        yield temporary
        old = out.with_name(f"{out.name}.old-{os.getpid()}")
        if replace and out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        _release(lock)


def _locked_file(folder: Path) -> tuple[Path, int | None]:
    """A new temporary file, and the descriptor that holds its lock: see `_lock`."""
    while True:
        temporary = folder / f".mige-rt-{uuid.uuid4().hex[:12]}.part"
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o666))
        lock = _lock(temporary)
        if temporary.exists():
            return temporary, lock
        _release(lock)  # another run has taken it for a leftover before it was locked


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder; None where another run does, or the system has no locks."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


@cache
def _remove_leftover_files(folder: Path) -> None:
    """Remove what killed runs have left in a folder; once a process, since a folder may hold very many files."""
    try:
        leftovers = [folder / name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
    except (OSError, ValueError):
        return  # whoever writes to it will say so
    for leftover in leftovers:
        if (lock := _lock(leftover)) is not None:
            leftover.unlink(missing_ok=True)
            _release(lock)


def _remove_leftover_folders(out: Path) -> None:
    """Remove what killed runs that made `out` have left, and put back an older `out` that they had moved away."""
    pattern = re.compile(re.escape(out.name) + r"\.(partial|old)-\d+")
    for name in os.listdir(out.parent):
        if (match := pattern.fullmatch(name)) is None or (lock := _lock(out.with_name(name))) is None:
            continue
        if match[1] == "old" and not os.path.lexists(out):
            os.replace(out.with_name(name), out)
        else:
            shutil.rmtree(out.with_name(name), ignore_errors=True)
        _release(lock)


def _rename_to_new(temporary: Path, path: Path) -> None:
    """Rename, but never over a file that exists. Raises FileExistsError."""
    try:
        os.link(temporary, path)  # unlike a rename, this fails where the name is taken
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists") from None
        os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut, where the system can."""
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # not every file system syncs folders
    finally:
        os.close(descriptor)
