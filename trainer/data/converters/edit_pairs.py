"""Datasets whose rows are a source image, an instruction and the edited image, in parquet.

The columns are those of their cards on the Hugging Face hub:

  instructpix2pix  timbrooks/instructpix2pix-clip-filtered: original_image, edit_prompt, edited_image
  magicbrush       osunlp/MagicBrush: source_img, instruction, target_img; a later turn's source is the turn before's
                   target; the mask is not used
  ultraedit        BleachNick/UltraEdit: source_image, edit_prompt, edited_image; clip_sim_target, the similarity of the
                   edited image and its caption, is the score clip_t; the mask is not used
  hq-edit          UCSC-VLAA/HQ-Edit: input_image, edit, output_image; inverse_edit leads back, and is a sample as well

A column that has a score's own name, such as `aesthetic`, is taken as the score in each of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from trainer.data.converters.layout import (
    ConvertedSample,
    Converter,
    ConvertOptions,
    Rejection,
    check_columns,
    edit_sample,
    read_scores,
)
from trainer.data.converters.parquet import image_content, open_parquet, read_columns
from trainer.data.filters import SCORES


@dataclass(frozen=True)
class EditColumns:
    """Where a row has what.

    Attributes:
        source: The image to edit.
        caption: The instruction.
        target: The edited image.
        inverse: The instruction that leads back, if there is one.
        scores: Columns of scores by their names in the manifest.
    """

    source: str
    caption: str
    target: str
    inverse: str | None = None
    scores: Mapping[str, str] = field(default_factory=dict)


def convert_edit_pairs(
    layout: EditColumns, data: Path, options: ConvertOptions
) -> Iterator[ConvertedSample | Rejection]:
    """See `layout.Converter`."""
    rows = open_parquet(data)
    known = rows.column_names or []
    source = options.source_column or layout.source
    caption = options.caption_column or layout.caption
    target = options.image_column or layout.target
    check_columns([source, caption, target, *options.score_columns.values()], known, data)
    scores = {name: name for name in SCORES} | dict(layout.scores)
    scores = {name: column for name, column in scores.items() if column in known} | dict(options.score_columns)
    inverse = [layout.inverse] if layout.inverse in known else []
    for row in read_columns(rows, [source, caption, target, *inverse, *scores.values()]):
        before, after = image_content(row, source), image_content(row, target)
        yield edit_sample(before, row[caption], after, options.scope, read_scores(row, scores, data))
        for column in inverse:
            if row[column]:
                yield edit_sample(after, row[column], before, options.scope)


EDIT_PAIRS: dict[str, Converter] = {
    name: partial(convert_edit_pairs, columns)
    for name, columns in {
        "instructpix2pix": EditColumns("original_image", "edit_prompt", "edited_image"),
        "magicbrush": EditColumns("source_img", "instruction", "target_img"),
        "ultraedit": EditColumns("source_image", "edit_prompt", "edited_image", scores={"clip_t": "clip_sim_target"}),
        "hq-edit": EditColumns("input_image", "edit", "output_image", inverse="inverse_edit"),
    }.items()
}
