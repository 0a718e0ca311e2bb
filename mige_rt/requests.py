"""Requests in files: JSON lines with one vocabulary, for `run --batch` and for training and evaluation manifests."""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mige_rt.errors import InputError
from mige_rt.instruction import PREFIXES, Task
from mige_rt.pictures import open_picture
from mige_rt.pipeline import Request

_ID = re.compile(r"[\w.-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class RequestLine:
    """One line; paths are relative to the file it stands in.

    In manifests: target, the picture that is right, and truth, what else is known (`trainer.world.manifest` says what).
    """

    prompt: str
    images: tuple[str, ...] = ()  # in placeholder order
    source: str | None = None
    target: str | None = None
    task: Task | None = None
    seed: int | None = None
    id: str | None = None
    truth: dict[str, Any] | None = None

    def open(self, folder: Path, seed: int) -> Request:
        """With the pictures read, and `seed` where the line has none. Raises InputError as `open_picture` does."""
        return Request(
            self.prompt,
            tuple(open_picture(folder / path) for path in self.images),
            None if self.source is None else open_picture(folder / self.source),
            seed if self.seed is None else self.seed,
            self.task,
        )


def parse_request(line: str) -> RequestLine:
    """Read one line. Raises InputError that says what is wrong with it."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is no JSON ({error}); write one object a line") from error
    if not isinstance(data, dict):
        raise InputError(f"it is a {type(data).__name__}; write an object, such as " + '{"prompt": "a red apple"}')
    known = [field.name for field in fields(RequestLine)]
    if unknown := [name for name in data if name not in known]:
        raise InputError(f"unknown fields {', '.join(unknown)}; known are {', '.join(known)}")
    values = {name: value for name, value in data.items() if value is not None}
    images = values.get("images", [])
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise InputError(f"images is {images!r}; a list of paths is expected")
    if type(values.get("id")) is int:
        values["id"] = str(values["id"])
    kinds = {"prompt": str, "source": str, "target": str, "task": str, "id": str, "seed": int, "truth": dict}
    for name, kind in kinds.items():
        if name in values and type(values[name]) is not kind:
            expected = {str: "a text", int: "a whole number", dict: "an object"}[kind]
            raise InputError(f"{name} is {values[name]!r}; expected {expected}")
    if "prompt" not in values:
        raise InputError('it has no "prompt"')
    if values.get("task", "edit") not in PREFIXES:
        raise InputError(f"task is {values['task']!r}; expected one of {', '.join(PREFIXES)}")
    if values.get("seed", 0) < 0:
        raise InputError(f"seed is {values['seed']}; 0 or more is expected")
    if not _ID.fullmatch(values.get("id", "x")):
        raise InputError(f"id is {values['id']!r}; it becomes part of a file name: use letters, digits, '.', '_', '-'")
    return RequestLine(**{**values, "images": tuple(images)})
