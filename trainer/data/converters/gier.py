"""GIER: real requests to photo editors, with what was made of them.

The layout is that of the authors' repository (github.com/jshi31/T2ONet, data/GIER/README.md): a JSON list beside the
folder `images`. An entry has `input` and `output`, names of images in which '/' is to be read as '_'; `expert_summary`
and `amateur_summary`, lists of instructions, each of which is a sample; and `operator`, {operation: {"local": ...}}: an
edit is global where no operation is local.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mige_rt.errors import InputError
from mige_rt.validation import validate
from trainer.data.converters.layout import ConvertedSample, ConvertOptions, Rejection, edit_sample
from trainer.data.published import known_fields

FILES = ("GIER.json", "IER2.json")  # as it is released, and as its description calls it


@dataclass(frozen=True)
class _Entry:
    input: str
    output: str
    operator: dict[str, Any]
    expert_summary: tuple[str, ...]
    amateur_summary: tuple[str, ...]


def convert_gier(data: Path, options: ConvertOptions) -> Iterator[ConvertedSample | Rejection]:
    """See `layout.Converter`. The columns are fixed."""
    if options.image_column or options.source_column or options.caption_column or options.score_columns:
        raise InputError("GIER's columns are fixed; leave out the options that name columns")
    file = data if data.is_file() else next((data / name for name in FILES if (data / name).is_file()), None)
    if file is None:
        raise InputError(f"{data} has no {FILES[0]}; give the folder that GIER was unpacked to, or the file itself")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON ({error}); download it again") from error
    if not isinstance(entries, list):
        raise InputError(f"{file} is a {type(entries).__name__}; a list of objects is expected")
    for number, entry in enumerate(cast("list[object]", entries), 1):
        yield from _samples(entry, file, number)


def _samples(data: object, file: Path, number: int) -> Iterator[ConvertedSample | Rejection]:
    entry = validate(_Entry, known_fields(_Entry, data), f"{file} entry {number}")
    source, target = (file.parent / "images" / name.replace("/", "_") for name in (entry.input, entry.output))
    local = any(isinstance(operation, dict) and operation.get("local") for operation in entry.operator.values())
    for instruction in dict.fromkeys((*entry.expert_summary, *entry.amateur_summary)):
        yield edit_sample(source, instruction, target, "local" if local else "global")
