"""The JSON files of benchmarks."""

import json
from pathlib import Path
from typing import Any

from mige_rt.errors import InputError


def read_json(folder: Path, name: str, kind: type[Any]) -> Any:
    """The content of a benchmark's file.

    Args:
        folder: The benchmark's.
        name: The file's.
        kind: What the content has to be: list or dict.

    Raises:
        InputError: The file is not there, is no JSON, or holds something else.
    """
    path = folder / name
    if not path.is_file():
        raise InputError(f"{folder} lacks {name}; give the folder that holds it")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); download it again") from error
    if not isinstance(content, kind):
        raise InputError(f"{path} holds a {type(content).__name__}, a {kind.__name__} is expected; download it again")
    return content
