"""A contact sheet of records on their way through a pipeline, with masks and boxes."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from trainer.contact_sheet import Strip, sheet
from trainer.masks import Mask, cut_out, on_square
from trainer.pipelines.records import Candidate, DroppedError, Record, open_or_drop, unpack_mask

CELL = 192  # pixels
MOST_ENTITIES = 4  # of a record that are shown
REMAINING, LEFT_OUT = (0, 160, 60), (210, 40, 40)
TITLES = ("image, masks and boxes", "source", "entities", *[""] * (MOST_ENTITIES - 1))


def write_preview(records: Sequence[Record], path: Path) -> None:
    """Write the sheet as a PNG: a strip for each record, with its samples' prompts, or why it was left out."""
    sheet([_strip(record) for record in records], TITLES, path, columns=1, cell=CELL)


def _strip(record: Record) -> Strip:
    try:
        image = record.open()
    except DroppedError:
        return Strip([None] * len(TITLES), _caption(record))
    # Those that came furthest first: they say most.
    entities = sorted(record.candidates, key=lambda entity: (entity.drop is not None, entity.mask is None))
    shown = [_entity_cell(image, entity) for entity in entities[:MOST_ENTITIES]]
    cells = [_cell(_marked(image, record.candidates)), _source(record), *shown]
    return Strip([*cells, *[None] * (len(TITLES) - len(cells))], _caption(record))


def _marked(image: Image.Image, entities: Sequence[Candidate]) -> Image.Image:
    pixels = np.array(image)
    for entity in entities:
        if entity.mask is not None:
            mask: Mask = unpack_mask(entity.mask)
            pixels[mask] = (0.6 * pixels[mask] + 0.4 * np.array(_color(entity))).astype(np.uint8)
    marked = Image.fromarray(pixels)
    draw = ImageDraw.Draw(marked)
    for entity in entities:
        if entity.box is not None:
            draw.rectangle(entity.box, outline=_color(entity), width=max(1, max(image.size) // 150))
    return marked


def _source(record: Record) -> np.ndarray | None:
    background = next((entity.background for entity in record.candidates if entity.background is not None), None)
    if background is not None:
        return _cell(Image.open(io.BytesIO(background), formats=["PNG"]))
    if record.source is None:
        return None
    try:
        return _cell(open_or_drop(record.source))
    except DroppedError:
        return None


def _entity_cell(image: Image.Image, entity: Candidate) -> np.ndarray | None:
    return None if entity.mask is None else _cell(cut_out(image, unpack_mask(entity.mask)))


def _cell(image: Image.Image) -> np.ndarray:
    return np.asarray(on_square(image, CELL))


def _color(entity: Candidate) -> tuple[int, int, int]:
    return REMAINING if entity.drop is None else LEFT_OUT


def _caption(record: Record) -> str:
    if record.drop is not None:
        return f"{record.id}: left out at {record.drop.stage}: {record.drop.reason} {record.drop.detail}"
    return f"{record.id}: " + " | ".join(sample.prompt for sample in record.samples)
