"""Folders written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mige_rt.errors import InputError


@contextmanager
def whole_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out`, which becomes `out` when the block ends, and vanishes when it fails.

    A killed run leaves `OUT.partial-PID` at most. Raises InputError when `out` exists, or it cannot be written.
    replace: `out` may exist; the new folder takes its place at the end, and it is removed (killed just then:
    `OUT.old-PID` is left).
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
