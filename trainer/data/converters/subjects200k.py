"""Subjects200K: two images of one subject side by side, each with a description, in parquet.

The columns are those of Yuanshi/Subjects200K's card on the Hugging Face hub: `image`; `description` with `item`,
`description_0` (of the left image) and `description_1` (of the right one); `quality_assessment` with
compositeStructure, objectConsistency and imageQuality, each up to 5. The two images have sides of 512 or 1024 pixels;
what is left of the height is a border, which lies twice between the two, as the data's authors cut them out
(github.com/Yuanshi9815/OminiControl). Each row is two samples: the one image is made from the other's subject.
"""

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from PIL import Image

from mige_rt.errors import InputError
from mige_rt.images import READABLE
from mige_rt.instruction import PLACEHOLDER
from trainer.data.converters.layout import ConvertedSample, ConvertOptions, Rejection, check_columns
from trainer.data.converters.parquet import image_content, open_parquet, read_columns

SIDES = (1024, 512)  # of the images, in pixels
MIN_QUALITY = 5  # of the highest 5, as the data's authors train


def convert_subjects200k(data: Path, options: ConvertOptions) -> Iterator[ConvertedSample | Rejection]:
    """See `layout.Converter`. There is no source; the caption column is that of the descriptions."""
    if options.source_column or options.score_columns:
        raise InputError("Subjects200K has neither sources nor scores; leave out the options that name their columns")
    rows = open_parquet(data)
    known = rows.column_names or []
    image, caption = options.image_column or "image", options.caption_column or "description"
    check_columns([image, caption], known, data)
    quality = [name for name in ("quality_assessment",) if name in known]
    for row in read_columns(rows, [image, caption, *quality]):
        scores = row[quality[0]] if quality else None
        yield from _samples(image_content(row, image), row[caption], scores)


def _samples(
    content: bytes | None, description: object, quality: Mapping[str, Any] | None
) -> Iterator[ConvertedSample | Rejection]:
    if quality and any((value or 0) < MIN_QUALITY for value in quality.values()):
        yield from [Rejection(f"quality_assessment below {MIN_QUALITY}")] * 2
        return
    texts = cast("dict[str, Any]", description) if isinstance(description, dict) else {}
    try:
        pair = _halves(content)
    except Exception:  # damaged files make the format readers raise nearly anything
        yield from [Rejection("unreadable image")] * 2
        return
    for k, target in enumerate(pair):
        prompt = name_subject(texts.get(f"description_{k}") or "", texts.get("item") or "")
        if prompt is None:
            yield Rejection("the description does not name its subject")
        else:
            yield ConvertedSample("subject", prompt, (pair[1 - k],), None, target)


def _halves(content: bytes | None) -> tuple[Image.Image, Image.Image]:
    image = Image.open(io.BytesIO(content or b""), formats=READABLE).convert("RGB")
    side = next((side for side in SIDES if side <= image.height), image.height)
    border = (image.height - side) // 2
    lefts = (border, side + 2 * border)
    first, second = (image.crop((left, border, left + side, border + side)) for left in lefts)
    return first, second


def name_subject(description: str, item: str) -> str | None:
    """Put the subject's image in the place of its name, as in the published subject-driven data.

    Args:
        description: Of the whole image.
        item: The subject's name, such as "Eames Lounge Chair".

    Returns:
        The description with one placeholder, for the first mention of the name, of its last word, or of "this item",
        with the article before it; None where there is no mention.
    """
    words = item.split()
    for name in (item, *words[-1:], "item"):
        pattern = re.compile(rf"\b(?:(?:an?|the|this)\s+)?{re.escape(name.strip())}\b", re.IGNORECASE)
        if name.strip() and pattern.search(description):
            return pattern.sub(PLACEHOLDER, description, count=1)
    return None
