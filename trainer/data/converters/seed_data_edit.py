"""SEED-Data-Edit: annotations as JSON lines beside folders of images.

The layout is that of AILab-CVC/SEED-Data-Edit-Part1-Openimages, -Part1-Unsplash and -Part2-3 on the Hugging Face hub,
unpacked: `KIND/annotations/split_*.jsonl` beside `KIND/images`, which paths are relative to, where KIND is
auto_editing/openimages, auto_editing/unsplash, real_editing or multi_turn_editing. A line has source_image, instruction
and target_image; one of multi_turn_editing has source_image, instruction_1, edit_image_1, instruction_2, edit_image_2
and so on, and is a sample for each turn, whose source is the turn before's result. `annotations_GPT4V`, which rewrites
some of the instructions, is not read.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from mige_rt.errors import InputError
from mige_rt.requests import read_lines
from trainer.data.converters.layout import (
    ConvertedSample,
    ConvertOptions,
    Rejection,
    check_columns,
    edit_sample,
    read_scores,
)


def convert_seed_data_edit(data: Path, options: ConvertOptions) -> Iterator[ConvertedSample | Rejection]:
    """See `layout.Converter`."""
    files = [data] if data.is_file() else sorted(data.rglob("annotations/*.jsonl"))
    if not files:
        raise InputError(f"{data} has no annotations/*.jsonl; give the folder that SEED-Data-Edit was unpacked to")
    for file in files:
        images = file.parent.parent / "images"
        for number, text in read_lines(file, limited=False):
            where = Path(f"{file} line {number}")
            try:
                line = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where} is no JSON ({error}); download it again") from error
            if not isinstance(line, dict):
                raise InputError(f"{where} is a {type(line).__name__}; an object is expected")
            yield from (_turns if "edit_image_1" in line else _pair)(line, images, options, where)


def _pair(
    line: Mapping[str, Any], images: Path, options: ConvertOptions, where: Path
) -> Iterator[ConvertedSample | Rejection]:
    source = options.source_column or "source_image"
    caption = options.caption_column or "instruction"
    target = options.image_column or "target_image"
    check_columns([source, caption, target, *options.score_columns.values()], list(line), where)
    scores = read_scores(line, options.score_columns, where)
    yield edit_sample(_path(images, line[source]), line[caption], _path(images, line[target]), options.scope, scores)


def _turns(
    line: Mapping[str, Any], images: Path, options: ConvertOptions, where: Path
) -> Iterator[ConvertedSample | Rejection]:
    check_columns(["source_image"], list(line), where)
    source = _path(images, line["source_image"])
    for turn in count(1):
        target = _path(images, line.get(f"edit_image_{turn}"))
        if target is None:
            return
        yield edit_sample(source, line.get(f"instruction_{turn}"), target, options.scope)
        source = target


def _path(images: Path, name: object) -> Path | None:
    return images / name if isinstance(name, str) and name else None
