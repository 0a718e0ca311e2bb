"""Requests: in Python, what they come to once everything is known, and in files as JSON lines with one vocabulary, for
`run --batch`, `compare --prompts`, and training and evaluation manifests."""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image as Picture

from mige_rt.errors import InputError
from mige_rt.images import check_picture, open_picture
from mige_rt.instruction import PLACEHOLDER, PREFIXES, Task, clean_caption, count_placeholders, rewrite_instruction

EditScope = Literal["local", "global"]

_ID = re.compile(r"[\w.-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class Request:
    """One picture to make. images in placeholder order; a source makes it an edit of that picture."""

    prompt: str
    images: tuple[Picture, ...] = ()
    source: Picture | None = None
    seed: int = 0
    task: Task | None = None  # None: read off the pictures


@dataclass(frozen=True)
class Resolved:
    """A request whose task is known, and whose prompt has one picture for each placeholder."""

    prompt: str
    images: tuple[Picture, ...]
    source: Picture | None
    seed: int
    task: Task


def _same(a: Picture, b: Picture) -> bool:
    return a is b or (a.size == b.size and a.tobytes() == b.tobytes())


def resolve(request: Request, scope: EditScope = "local") -> Resolved:
    """Which of the three uses a request is, and its multimodal prompt (paper, section 3.1).

    Without a source: subject-driven generation. With one: an edit, where every picture in the prompt is the source;
    subject-driven editing, where some are not. A prompt without a placeholder is rewritten by the paper's rule, and
    `images` may be left out where each placeholder can only be the source.

    Raises InputError when placeholders and pictures do not match, or the task needs a source and there is none.
    """
    for picture in (*request.images, request.source):
        if picture is not None and not isinstance(picture, Picture):
            raise InputError(f"a picture is a {type(picture).__name__}; a Pillow picture is expected")
    source = None if request.source is None else check_picture(request.source)
    images = tuple(check_picture(image) for image in request.images)
    if source is not None:
        images = tuple(source if _same(image, source) else image for image in images)
    prompt, placeholders = request.prompt, count_placeholders(request.prompt)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt holds half a character ({error}); write it as UTF-8") from error
    if not clean_caption(prompt):
        raise InputError(f"the prompt is empty ({prompt!r}); say in words what the picture should be")
    if source is not None:
        rewritten = rewrite_instruction(prompt, scope)
        named = (source,) * count_placeholders(rewritten)
        if placeholders == 0 and images in ((), (source,), named):
            prompt, images = rewritten, named
        elif placeholders == 1 and not images:
            images = (source,)
        placeholders = count_placeholders(prompt)
    if placeholders != len(images):
        raise InputError(
            f"the prompt has {placeholders} {PLACEHOLDER} and {len(images)} pictures were given; "
            "give one picture for each, in their order"
        )
    if source is None:
        task: Task = "subject"
    else:
        task = "edit" if all(image is source for image in images) else "compose"
    if request.task is not None:
        if (request.task == "subject") != (source is None):
            needs = "takes no source picture" if source is not None else "needs a source picture"
            raise InputError(f"the task {request.task!r} {needs}; the pictures given are those of {task!r}")
        task = request.task
    return Resolved(prompt, images, source, request.seed, task)


@dataclass(frozen=True)
class RequestLine:
    """One line; paths are relative to the file it stands in.

    In manifests: target, the picture that is right, and truth, what else is known (see `trainer.synthetic.manifest`).
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


def read_lines(path: Path) -> list[tuple[int, str]]:
    """A file's lines that are not blank, numbered from 1. Raises InputError when it has none, or is no text."""
    try:
        lines = [(n, line) for n, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a text file of JSON lines: {error}") from error
    if not lines:
        raise InputError(f"{path} holds no line; one JSON object a line is expected")
    return lines


def read_requests(path: Path) -> dict[str, Resolved]:
    """Every request of a file, by its id, or the number of its line where it has none; that is its seed's default, too.

    Raises InputError that names the first line which cannot be used.
    """
    found: dict[str, Resolved] = {}
    for number, text in read_lines(path):
        try:
            line = parse_request(text)
            name = line.id or str(number)
            if name in found:
                raise InputError(f"the id {name!r} stands in an earlier line; give each its own")
            found[name] = resolve(line.open(path.parent, number))
        except InputError as error:
            raise InputError(f"{path} line {number}: {error}") from error
    return found


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
