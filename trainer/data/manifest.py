"""A manifest: the samples of a training set, one JSON object a line, in the vocabulary of `mige_rt.requests`.

  prompt     the instruction, with an <imagehere> for each image; one of an edit may leave them out, and is then
             rewritten by the paper's rule
  images     paths of the images, in the order of the placeholders; the source stands here, too, where the prompt refers
             to it
  source     path of the image to edit; left out where a new image is made
  target     path of the image that should be made
  task       subject, edit or compose; by default the one that the images imply
  size       [width, height] of the target in pixels; measured where it is left out
  id         unique; by default the number of the line
  scores     {name: number}, such as aesthetic, clip_t and annotation_match, see `trainer.data.filters`

Only prompt and target are needed. Paths are relative to the manifest, and may lead into a shard
(`trainer.data.tar_images`). seed and truth may be there, and mean nothing to training.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from mige_rt.errors import InputError
from mige_rt.instruction import Task
from mige_rt.requests import RequestRecord, check_task, complete_instruction, parse_request, read_lines
from trainer.data.published import PUBLISHED_NAMES, is_published, read_published
from trainer.data.tar_images import image_exists

MANIFEST = "manifest.jsonl"  # in the folders that we write


@dataclass(frozen=True, slots=True)
class ManifestSample:
    """One sample of a manifest that was opened. Paths can be opened as they are.

    Attributes:
        id: Unique in its manifest.
        task: Which of the three uses it is.
        prompt: Multimodal: with one placeholder for each image.
        images: Paths, in the order of the placeholders.
        source: Path of the image to edit; None for the task subject.
        target: Path of the image that should be made.
        size: (width, height) of the target in pixels, where the manifest has it.
        scores: By name, where the manifest has any.
    """

    id: str
    task: Task
    prompt: str
    images: tuple[str, ...]
    source: str | None
    target: str
    size: tuple[int, int] | None
    scores: Mapping[str, float]

    def paths(self) -> tuple[str, ...]:
        """Each of the sample's image files once, the target first."""
        return tuple(dict.fromkeys((self.target, *([] if self.source is None else [self.source]), *self.images)))


def open_manifest(path: Path, root: Path | None = None) -> list[ManifestSample]:
    """Read a manifest, or the published JSON (see `trainer.data.published`), and check all of it.

    Args:
        path: The file.
        root: The folder that its paths are relative to. Default: the file's, or, for the published JSON, the one above
            where the images are found from there.

    Returns:
        The samples in the file's order.

    Raises:
        InputError: Names the first line and field that cannot be used: JSON, an unknown or missing field, a wrong type,
            an unknown task, placeholders that are not as many as the images, an id that was there before, an image file
            that is not there.
    """
    if is_published(path):
        records = list(enumerate(read_published(path), 1))
        layout = _Layout(path, "entry", PUBLISHED_NAMES, root or _published_root(path, records[0][1]))
        return _samples(records, layout)
    return _samples(_records(path), _Layout(path, "line", {}, root or path.parent))


def manifest_line(record: RequestRecord) -> str:
    """The line of a record, with the line break; fields that are None or empty are left out."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return json.dumps({name: value for name, value in values.items() if value not in (None, (), {})}) + "\n"


def _records(path: Path) -> Iterator[tuple[int, RequestRecord]]:
    for number, text in read_lines(path, limited=False):
        try:
            yield number, parse_request(text)
        except InputError as error:
            raise InputError(f"{path} line {number}: {error}") from error


def _published_root(path: Path, first: RequestRecord) -> Path:
    """The published paths begin with the name of the folder that the file is in."""
    folders = (path.parent, path.parent.parent)
    return next((folder for folder in folders if (folder / str(first.target)).is_file()), path.parent)


@dataclass(frozen=True)
class _Layout:
    """A file with records: what one of them is called, its fields' names where they are not ours, where paths start."""

    path: Path
    unit: str
    names: Mapping[str, str]
    root: Path

    def name(self, field: str) -> str:
        return self.names.get(field, field)


def _samples(records: Iterable[tuple[int, RequestRecord]], layout: _Layout) -> list[ManifestSample]:
    samples: list[ManifestSample] = []
    numbers: dict[str, int] = {}  # of the records, by id
    checked: set[str] = set()  # files that are there
    for number, record in records:
        try:
            sample = _sample(record, number, layout)
            if sample.id in numbers:
                first = f"{layout.unit} {numbers[sample.id]}"
                raise InputError(f"id is {sample.id!r}, which {first} has, too; give each its own")
            _check_files(record, layout, checked)
        except InputError as error:
            raise InputError(f"{layout.path} {layout.unit} {number}: {error}") from error
        numbers[sample.id] = number
        samples.append(sample)
    return samples


def _sample(record: RequestRecord, number: int, layout: _Layout) -> ManifestSample:
    if record.target is None:
        raise InputError("missing target; give the path of the image that should be made")
    source = record.source
    # Equal paths are the same image: what follows compares objects.
    images = tuple(source if source is not None and image == source else image for image in record.images)
    try:
        prompt, images = complete_instruction(record.prompt, images, source)
    except InputError as error:
        raise InputError(f"{layout.name('prompt')} cannot be used: {error}") from error
    try:
        task = check_task(record.task, images, source)
    except InputError as error:
        raise InputError(f"task cannot be used: {error}") from error
    return ManifestSample(
        id=record.id or str(number),
        task=task,
        prompt=prompt,
        images=tuple(os.path.join(layout.root, image) for image in images),
        source=None if source is None else os.path.join(layout.root, source),
        target=os.path.join(layout.root, record.target),
        size=record.size,
        scores=record.scores or {},
    )


def _check_files(record: RequestRecord, layout: _Layout, checked: set[str]) -> None:
    named = [(f"{layout.name('images')}[{k}]", image) for k, image in enumerate(record.images)]
    named += [(layout.name("source"), record.source), (layout.name("target"), record.target)]
    for field, name in named:
        if name is None or name in checked:
            continue
        if not image_exists(os.path.join(layout.root, name)):
            raise InputError(f"{field} is {name!r}, but there is no such file in {layout.root}; correct the path")
        checked.add(name)
