"""Requests: one image to make, with its prompt and the images that it refers to.

In Python and, as JSON lines with one vocabulary, in files for `run --batch`, `compare --prompts`, and training and
evaluation manifests.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from PIL.Image import Image

from mige_rt.config import PositiveInt
from mige_rt.errors import InputError, reason
from mige_rt.images import open_image
from mige_rt.instruction import (
    PLACEHOLDER,
    EditScope,
    Task,
    check_length,
    clean_caption,
    compose_prompt,
    count_placeholders,
    rewrite_instruction,
    words_before_cut,
)

MAX_LINE = 2**20  # characters of a line of a request file
MAX_FILE = 2**28  # characters of a request file
MAX_REQUESTS = 100_000  # of a request file

AnyImage = TypeVar("AnyImage")  # an image, or its path

_ONE_A_LINE = "one JSON object a line is expected"
_ID = re.compile(r"[\w.-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class Request:
    """One image to make.

    Attributes:
        prompt: With or without placeholders.
        images: RGB (see `images.normalize_image`), in the order of the placeholders.
        source: RGB; the image to edit. None: a new image is made.
        seed: Of the image's noise, 0 or more.
        task: None: the one that the images imply.
    """

    prompt: str
    images: tuple[Image, ...] = ()
    source: Image | None = None
    seed: int = 0
    task: Task | None = None


@dataclass(frozen=True)
class ResolvedRequest:
    """A request whose task is known, and whose prompt has one image for each placeholder.

    Attributes:
        prompt: Multimodal: with placeholders.
        images: RGB, one for each placeholder.
        source: RGB; None for the task subject.
        seed: Of the image's noise.
        task: Which of the three uses it is.
        text: What is tokenized: the task's prefix and the cleaned prompt.
        used_images: The images whose placeholders the clean-up has left in `text`.
        cut_after: The last words that the clean-up has left of a prompt that was too long, or None.
    """

    prompt: str
    images: tuple[Image, ...]
    source: Image | None
    seed: int
    task: Task
    text: str = field(init=False)
    used_images: tuple[Image, ...] = field(init=False)
    cut_after: str | None = field(init=False)

    def __post_init__(self) -> None:
        """Raises InputError when nothing is left of the prompt after the clean-up."""
        text = compose_prompt(self.task, self.prompt)
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "used_images", self.images[: count_placeholders(text)])
        object.__setattr__(self, "cut_after", words_before_cut(self.prompt))


def resolve(request: Request, scope: EditScope = "local") -> ResolvedRequest:
    """Which of the three uses a request is, and its multimodal prompt (paper, section 3.1).

    Without a source: subject-driven generation. With one: an edit, where every image in the prompt is the source;
    subject-driven editing, where some are not. A prompt without a placeholder is rewritten by the paper's rule, and
    `images` may be left out where each placeholder can only be the source.

    Args:
        request: What was asked for.
        scope: How the rule completes a prompt that does not name the image: 'in' (local) or 'of' it (global).

    Raises:
        InputError: Placeholders and images do not match, the prompt is empty or too long, or the task needs a source
            and there is none.
    """
    source, images = request.source, request.images
    if source is not None:
        images = tuple(source if _same(image, source) else image for image in images)
    prompt, images = complete_instruction(request.prompt, images, source, scope)
    return ResolvedRequest(prompt, images, source, request.seed, check_task(request.task, images, source))


def _same(a: Image, b: Image) -> bool:
    return a is b or (a.size == b.size and a.tobytes() == b.tobytes())


def complete_instruction(
    prompt: str, images: tuple[AnyImage, ...], source: AnyImage | None, scope: EditScope = "local"
) -> tuple[str, tuple[AnyImage, ...]]:
    """A prompt with one image for each placeholder: what is left out of an edit can only be the source.

    Args:
        prompt: With or without placeholders.
        images: Images or their paths; those that are the source are the same object.
        source: The image to edit, or None.
        scope: See `resolve`.

    Returns:
        The prompt, rewritten by the paper's rule if it had no placeholder, and its images.

    Raises:
        InputError: Placeholders and images do not match, or the prompt is empty or too long.
    """
    check_length(prompt)
    placeholders = count_placeholders(prompt)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt holds half a character at position {error.start}; write it as UTF-8") from error
    if not clean_caption(prompt):
        raise InputError(f"the prompt is empty ({prompt[:80]!r}); say in words what the image should be")
    if source is not None:
        rewritten = rewrite_instruction(prompt, scope)
        all_sources = (source,) * count_placeholders(rewritten)
        if placeholders == 0 and images in ((), (source,), all_sources):
            prompt, images = rewritten, all_sources
        elif placeholders == 1 and not images:
            images = (source,)
        placeholders = count_placeholders(prompt)
    if placeholders != len(images):
        raise InputError(
            f"the prompt has {placeholders} {PLACEHOLDER} and {len(images)} images were given; "
            "give one image for each, in their order"
        )
    return prompt, images


def check_task(task: Task | None, images: Sequence[object], source: object | None) -> Task:
    """The task that was asked for, or else the one that the images imply.

    Args:
        task: None: not said.
        images: Of the placeholders; those that are the source are the same object.
        source: The image to edit, or None.

    Raises:
        InputError: The task needs a source and there is none, or the other way round.
    """
    if source is None:
        implied: Task = "subject"
    else:
        implied = "edit" if all(image is source for image in images) else "compose"
    if task is None:
        return implied
    if (task == "subject") != (source is None):
        needs = "takes no source image" if source is not None else "needs a source image"
        raise InputError(f"the task {task!r} {needs}; the images given are those of {implied!r}")
    return task


@dataclass(frozen=True)
class RequestRecord:
    """One line of a request file; paths are relative to the file.

    Attributes:
        prompt: With or without placeholders.
        images: Paths, in the order of the placeholders.
        source: Path of the image to edit, or None.
        target: In manifests: path of the image that should be made.
        size: In manifests: (width, height) of the target in pixels.
        task: None: the one that the images imply.
        seed: 0 or more.
        id: Becomes part of file names: letters, digits, '.', '_', '-'.
        scores: In manifests: how good the sample is by measures such as `aesthetic`, see `trainer.data.filters`.
        truth: In manifests: what else is known, see `trainer.synthetic.manifest`.
    """

    prompt: str
    images: tuple[str, ...] = ()
    source: str | None = None
    target: str | None = None
    task: Task | None = None
    seed: int | None = None
    id: str | None = None
    size: tuple[PositiveInt, PositiveInt] | None = None
    scores: dict[str, float] | None = None
    truth: dict[str, Any] | None = None

    def paths(self, folder: Path) -> list[Path]:
        """Of the images and the source. folder: that the record's paths are relative to."""
        return [folder / path for path in (*self.images, *([] if self.source is None else [self.source]))]

    def open(self, folder: Path, seed: int, task: Task | None = None, *, max_pixels: int | None = None) -> Request:
        """The request with its images read.

        Args:
            folder: That the paths are relative to.
            seed: Where the record has none.
            task: Where the record has none.
            max_pixels: Of an image, see `images.normalize_image`.

        Raises:
            InputError: An image cannot be read.
        """
        return Request(
            self.prompt,
            tuple(open_image(folder / path, max_pixels=max_pixels) for path in self.images),
            None if self.source is None else open_image(folder / self.source, max_pixels=max_pixels),
            seed if self.seed is None else self.seed,
            self.task or task,
        )


def read_lines(path: Path, *, limited: bool = True) -> list[tuple[int, str]]:
    """A file's lines that are not blank, numbered from 1. They end with a line feed, a carriage return, or both.

    Args:
        path: The file.
        limited: MAX_REQUESTS and MAX_FILE are kept, too; datasets are larger than that.

    Raises:
        InputError: It has none, it is no text, or it is larger than MAX_LINE, MAX_REQUESTS and MAX_FILE allow.
    """
    lines: list[tuple[int, str]] = []
    number = characters = 0
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                characters += len(line)
                if len(line) > MAX_LINE:
                    raise InputError(f"{path} line {number} has more than {MAX_LINE:,} characters; {_ONE_A_LINE}")
                if limited and (characters > MAX_FILE or len(lines) == MAX_REQUESTS):
                    raise InputError(
                        f"{path} is too large: at most {MAX_REQUESTS:,} requests of {MAX_FILE:,} characters together "
                        "are expected; split it"
                    )
                if line.strip():
                    lines.append((number, _utf8(line, path, number)))
    except (OSError, ValueError) as error:  # InputError is a ValueError, too; others speak of the file's name
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as a text file of JSON lines: {reason(error)}") from error
    if not lines:
        raise InputError(f"{path} holds no line; {_ONE_A_LINE}")
    return lines


def _utf8(line: str, path: Path, number: int) -> str:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path} cannot be read as a text file of JSON lines: line {number} is no UTF-8; save it as UTF-8"
        ) from error
    return line


@dataclass(frozen=True)
class RequestLine:
    """A line of a request file.

    Attributes:
        number: Counted from 1.
        text: What it says.
        id: The record's, or the line's number where it has none; empty where there is no record.
        record: What was read, or why the line cannot be used.
    """

    number: int
    text: str
    id: str
    record: RequestRecord | InputError


def read_records(path: Path) -> Iterator[RequestLine]:
    """Every line of a request file with its id, which no other line has.

    Raises:
        InputError: The file cannot be read, see `read_lines`. A line that cannot be used carries its error.
    """
    ids: set[str] = set()
    for number, text in read_lines(path):
        try:
            record = parse_request(text)
            line_id = record.id or str(number)
            if line_id in ids:
                raise InputError(f"the id {line_id!r} stands in an earlier line; give each its own")
        except InputError as error:
            yield RequestLine(number, text, "", error)
        else:
            ids.add(line_id)
            yield RequestLine(number, text, line_id, record)


def read_requests(path: Path) -> dict[str, ResolvedRequest]:
    """Every request of a file by its id; the number of its line is the default seed.

    Raises:
        InputError: Names the first line that cannot be used.
    """
    requests: dict[str, ResolvedRequest] = {}
    for line in read_records(path):
        try:
            if isinstance(line.record, InputError):
                raise line.record
            requests[line.id] = resolve(line.record.open(path.parent, line.number))
        except InputError as error:
            raise InputError(f"{path} line {line.number}: {error}") from error
    return requests


def parse_request(line: str) -> RequestRecord:
    """Read one line.

    Raises:
        InputError: Says what is wrong with it: which field, what was given, what is expected.
    """
    from mige_rt.validation import validate  # brings pydantic, which a single prompt does not need

    try:
        data = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise InputError(f"it is no JSON ({error.msg}, column {error.colno}); write one object a line") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # a number of very many digits, or brackets within brackets
        raise InputError(
            "its numbers are too long, or it is nested too deeply; write one plain object a line"
        ) from error
    if not isinstance(data, dict):
        raise InputError(f"it is a {type(data).__name__}; write an object, such as " + '{"prompt": "a red apple"}')
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError("it holds half a character, as \\ud800 without \\udc00 is; write it as UTF-8") from error
    values = {name: value for name, value in cast("dict[str, Any]", data).items() if value is not None}
    if type(values.get("id")) is int:
        values["id"] = str(values["id"])
    record = validate(RequestRecord, {"images": [], **values}, "it cannot be used")
    if record.seed is not None and record.seed < 0:
        raise InputError(f"seed is {record.seed}; 0 or more is expected")
    if record.id is not None and not _ID.fullmatch(record.id):
        raise InputError(f"id is {record.id!r}; it becomes part of a file name: use letters, digits, '.', '_', '-'")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What JSON calls an object; each name in it once, since one of the values would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        ((name, times),) = Counter(name for name, _ in pairs).most_common(1)
        raise InputError(f"it has {name!r} {times} times; give it once")
    return values
