"""The JSON that the authors' training script reads, as published: a list of objects with six fields.

  image        path of the target
  width        of the target in pixels
  height       of the target in pixels
  entity_path  paths of the images that the instruction refers to, in the order of its placeholders
  multi_prompt the multimodal instruction, with <imagehere>
  source_path  a list with the path of the source image; empty for subject-driven generation

Source: `example_data/example_data.json` and `diffusion/data/datasets/MixData.py` of github.com/Eureka-Maggie/MIGE. The
published script tells the task from words in the paths; here it is what the images imply. More fields, as the published
data pipeline leaves them, are passed over.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from mige_rt.config import PositiveInt
from mige_rt.errors import InputError
from mige_rt.requests import RequestRecord
from mige_rt.validation import validate


@dataclass(frozen=True)
class _Entry:
    image: str
    width: PositiveInt
    height: PositiveInt
    entity_path: tuple[str, ...]
    multi_prompt: str
    source_path: tuple[str, ...]


PUBLISHED_NAMES = {  # of the fields of a record
    "prompt": "multi_prompt",
    "images": "entity_path",
    "source": "source_path",
    "target": "image",
}


def known_fields(model: type[Any], data: object) -> object:
    """An object of published JSON without the fields that a dataclass has not; what is no object stays as it is."""
    names = {field.name for field in fields(model)}
    if not isinstance(data, dict):
        return data
    return {name: value for name, value in cast("dict[str, Any]", data).items() if name in names}


def is_published(path: Path) -> bool:
    """Whether a file holds a JSON list, and not one object a line.

    Raises:
        InputError: It cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if line.strip():
                    return line.lstrip().startswith("[")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a manifest: {error}; give a file of JSON lines") from error
    return False


def read_published(path: Path) -> Iterator[RequestRecord]:
    """The entries of the published JSON, in its order.

    Raises:
        InputError: It is no such list, or names the entry (the first is 1) and field that cannot be used.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); a list of objects is expected") from error
    if not isinstance(content, list) or not content:
        raise InputError(f"{path} holds no list with an entry; the published JSON is a list of objects")
    for number, data in enumerate(cast("list[object]", content), 1):
        where = f"{path} entry {number}"
        entry = validate(_Entry, known_fields(_Entry, data), where)
        if len(entry.source_path) > 1:
            raise InputError(f"{where}: source_path has {len(entry.source_path)} paths; give at most one")
        yield RequestRecord(
            prompt=entry.multi_prompt,
            images=entry.entity_path,
            source=next(iter(entry.source_path), None),
            target=entry.image,
            size=(entry.width, entry.height),
        )
