"""The file of what could not be made: a JSON line each, with the reason."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from mige_rt.atomic import atomic_file, check_folder
from mige_rt.errors import InputError, reason


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A line that was not made.

    Attributes:
        line: Its number.
        id: Its id; empty where it has none because it cannot be read.
        reason: Why, in a sentence.
    """

    line: int
    id: str
    reason: str


def check_failures_file(path: Path, *, overwrite: bool) -> None:
    """Find out before the work whether `write_failures` may write there. An earlier file of failures is replaced.

    Args:
        path: The file to write.
        overwrite: Any regular file may be replaced.

    Raises:
        InputError: It is something else, or the folder cannot be written to.
    """
    try:
        if path.exists() and not (path.is_file() and (overwrite or _is_of_failures(path))):
            raise InputError(f"{path} exists already, and holds no failures of a batch; give another name")
        check_folder(path.parent)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, InputError):
            raise
        raise _cannot_write(path, error) from error


def write_failures(path: Path, failures: list[Failure]) -> None:
    """Write them, by number; the file is empty where there are none.

    Raises:
        InputError: It cannot be written.
    """
    lines = [json.dumps(asdict(failure)) + "\n" for failure in sorted(failures, key=lambda failure: failure.line)]
    try:
        with atomic_file(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error


def _is_of_failures(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline(2**20)
    if not first:
        return True
    try:
        content: Any = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and set(cast("dict[str, Any]", content)) == {"line", "id", "reason"}


def _cannot_write(path: Path, error: OSError | ValueError) -> InputError:
    return InputError(f"{path} cannot be written ({reason(error)}); give a path in an existing folder of your own")
