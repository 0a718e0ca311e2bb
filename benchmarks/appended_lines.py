"""JSON lines of people's judgements: only ever added to, each on the disk before the page answers."""

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
        """Write a line; it is on the disk when this returns. Raises OSError when the disk is full, for one."""
        line = json.dumps(record) + "\n"
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
