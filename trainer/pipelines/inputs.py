"""The raw records of each pipeline."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mige_rt.errors import InputError
from mige_rt.requests import read_lines
from mige_rt.validation import validate
from trainer.data.instance_images import SUFFIXES
from trainer.data.manifest import open_manifest
from trainer.pipelines.records import Candidate, Record


@dataclass(frozen=True)
class GroundedEntity:
    """An entity that a caption names, and its box: left, top, right, bottom in pixels."""

    words: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class CaptionLine:
    """A line of captions: a path relative to the file, its caption, and, in grounded captions, entities with boxes."""

    image: str
    caption: str
    id: str | None = None
    entities: tuple[GroundedEntity, ...] | None = None


def read_records(pipeline: str, data: Path, *, is_grounded: bool = False) -> list[Record]:
    """The raw records of a pipeline, in the same order every time.

    Args:
        pipeline: subject: a file of `CaptionLine`s as JSON lines. edit, replace: a manifest. add: a folder in SA-1B's
            layout, images with a JSON file of the same name each.
        data: The file or folder.
        is_grounded: Nobody finds entities in captions, so they have to come with them.

    Raises:
        InputError: The data are not there, or it names what is wrong with them. Image files are not opened.
    """
    if not data.exists():
        raise InputError(f"there is nothing at {data}; check the path")
    if pipeline == "subject":
        records = list(_captions(data, is_grounded))
    elif pipeline == "add":
        records = _segmented_images(data)
    else:
        records = _edits(data)
    if not records:
        raise InputError(f"{data} holds no record")
    return records


def _captions(path: Path, is_grounded: bool) -> Iterator[Record]:
    for number, (line, text) in enumerate(read_lines(path, limited=False)):
        where = f"{path} line {line}"
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is no JSON ({error}); one object a line is expected") from error
        caption = validate(CaptionLine, content, where)
        if caption.entities is None and is_grounded:
            raise InputError(f"{where} has no entities; give them with their boxes, or name a tagger and a detector")
        entities = [Candidate(entity.words, entity.box) for entity in caption.entities or ()]
        yield Record(
            number=number,
            id=caption.id or str(line),
            image=os.path.abspath(os.path.join(path.parent, caption.image)),
            text=caption.caption,
            is_grounded=caption.entities is not None,
            candidates=entities,
        )


def _edits(path: Path) -> list[Record]:
    return [
        Record(
            number=number,
            id=sample.id,
            image=os.path.abspath(sample.target),
            text=sample.prompt,
            source=None if sample.source is None else os.path.abspath(sample.source),
            images=tuple(map(os.path.abspath, sample.images)),
            scores=dict(sample.scores),
        )
        for number, sample in enumerate(open_manifest(path))
    ]


def _segmented_images(folder: Path) -> list[Record]:
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not images:
        raise InputError(f"{folder} holds no image; images with a JSON file each are expected, as in SA-1B")
    records: list[Record] = []
    for number, path in enumerate(images):
        annotation = path.with_suffix(".json")
        records.append(
            Record(
                number=number,
                id=path.relative_to(folder).with_suffix("").as_posix(),
                image=os.path.abspath(path),
                annotation=os.path.abspath(annotation) if annotation.is_file() else None,
            )
        )
    return records
