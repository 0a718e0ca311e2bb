"""JSON lines of people's judgements: only ever added to, each on the disk before the page answers."""

import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mige_rt.atomic import atomic_file


class AppendedLines:
    """A file of JSON lines; threads may share it."""

    def __init__(self, path: Path) -> None:
        """Go on with a file, or begin one.

        A killed process may have left the beginning of a line, which nobody was told to be written; it is removed, so
        that the next line is one of its own.
        """
        self._path = path
        self._lock = threading.Lock()
        content = path.read_bytes() if path.is_file() else b""
        if content and not content.endswith(b"\n"):
            with atomic_file(path) as file:
                file.write_bytes(content[: content.rfind(b"\n") + 1])

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a line; it is on the disk when this returns.

        Raises:
            OSError: It cannot be, since the disk is full, for one. Nothing of it is left in the file.
        """
        line = (json.dumps(record) + "\n").encode()
        with self._lock, self._path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
