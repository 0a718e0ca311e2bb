"""Files and folders written whole or not at all: under a temporary name in the same folder, then renamed."""

import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from mige_rt.errors import InputError


@contextmanager
def atomic_file(path: Path) -> Generator[Path, None, None]:
    """A temporary name beside `path`, renamed to it when the block ends, and removed when the block fails.

    Args:
        path: The file to write; an existing one is replaced at the end.

    Yields:
        The name to write to. No such file exists yet.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(out: Path, *, replace: bool = False) -> Generator[Path, None, None]:
    """A temporary folder beside `out`, which becomes `out` when the block ends, and vanishes when it fails.

    A killed run leaves `OUT.partial-PID` at most.

    Args:
        out: The folder to make.
        replace: `out` may exist; the new folder takes its place at the end, and it is removed (killed just then:
            `OUT.old-PID` is left).

    Yields:
        The folder to write into.

    Raises:
        InputError: `out` exists, or cannot be written.
    """
    if (out.exists() or out.is_symlink()) and not replace:
        raise InputError(f"{out} exists already: give a path that does not, or remove it first")
    out = Path(os.path.abspath(out))
    temporary = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir()
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error}): give a path in an existing folder of your own") from error
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
