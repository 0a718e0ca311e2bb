"""JSON lines of people's judgements: only ever added to, each on the disk before the page answers."""

import errno
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mige_rt.atomic import atomic_file
from mige_rt.errors import InputError
from mige_rt.requests import read_lines
from mige_rt.validation import validate

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def read_appended(path: Path, kind: type[T], what: str) -> list[T]:
    """The records of a file, in their order.

    Args:
        path: The file.
        kind: The dataclass that a line is.
        what: What the lines are, for messages: `votes of mige-rt eval user-study`.

    Raises:
        InputError: Names the first line that is none. The last line may be cut, as a killed page leaves it.
    """
    return _read(path, kind, what)[0]


def _read(path: Path, kind: type[T], what: str) -> tuple[list[T], str]:
    """The records, and the cut line behind them, or an empty text."""
    records: list[T] = []
    lines = read_lines(path, limited=False)
    for number, line in lines:
        where = f"{path} line {number}"
        try:
            content = json.loads(line)
        except ValueError as error:
            if number == lines[-1][0] and _is_cut(line, kind, is_first=not records):
                return records, line
            raise InputError(f"{where} is no JSON; give {what}") from error
        records.append(validate(kind, content, where))
    return records, ""


def _is_cut(line: str, kind: type[T], *, is_first: bool) -> bool:
    """Whether a line is the beginning of one of ours; behind none of them, it has to begin as they do."""
    beginning = json.dumps({fields(kind)[0].name: ""})[:-2]
    is_ours = line.startswith(beginning) or beginning.startswith(line)
    return not line.endswith("\n") and (is_ours or not is_first)


class AppendedLines(Generic[T]):
    """A file of JSON lines; threads may share it.

    Attributes:
        before: What was in it when it was opened.
    """

    def __init__(self, path: Path, kind: type[T], what: str) -> None:
        """Go on with a file, or begin one: see `read_appended`.

        A killed process may have left the beginning of a line, which nobody was told to be written; it is removed, so
        that the next line is one of its own.

        Raises:
            InputError: The file holds something else, and is left as it is.
        """
        self._path = path
        self._lock = threading.Lock()
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no regular file; give the name of a file, which need not be there yet")
        content = path.read_bytes() if path.exists() else b""
        self.before, cut = _read(path, kind, what) if content else ([], "")
        if content and not content.endswith((b"\n", b"\r")):
            whole = content.removesuffix(cut.encode())
            with atomic_file(path) as file:
                file.write_bytes(whole if cut else whole + b"\n")

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
