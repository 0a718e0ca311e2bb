"""Contact sheets: many small images on one PNG with captions, to look a model's results over at a glance."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mige_rt.atomic import atomic_file

if TYPE_CHECKING:
    from trainer.synthetic.tasks import Sample

CELL = 128  # pixels, the width and height at which an image is shown
GAP = 6  # pixels between cells
LINE = 17  # pixels, the height of a line of text
FONT_SIZE = 13
WEBP_QUALITY = 85


@dataclass(frozen=True)
class Strip:
    """Images in a row, with a caption below them.

    Attributes:
        images: uint8 [H,W,3]; None leaves a cell empty.
        caption: Wrapped to the width of the row.
    """

    images: Sequence[np.ndarray | None]
    caption: str


def sheet(strips: Sequence[Strip], titles: Sequence[str], path: Path, columns: int = 2, cell: int = CELL) -> None:
    """Write strips side by side as a PNG, or as a WebP.

    Args:
        strips: In reading order.
        titles: A title above each cell of a strip; as many as a strip has images.
        path: Where it is written; .webp: a WebP.
        columns: Strips in a row of the sheet.
        cell: Width and height of an image on the sheet, in pixels.
    """
    strip_width = len(titles) * (cell + GAP) + 2 * GAP
    font = ImageFont.load_default(FONT_SIZE)
    captions = [_wrap(strip.caption, font, strip_width - 2 * GAP) for strip in strips]
    heights = [
        cell + GAP + LINE * max(len(lines) for lines in captions[first : first + columns]) + GAP
        for first in range(0, len(strips), columns)
    ]
    canvas = Image.new("RGB", (columns * strip_width, LINE + GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for column in range(columns):
        for k, title in enumerate(titles):
            draw.text((GAP + column * strip_width + k * (cell + GAP), 3), title, fill="grey", font=font)
    for i, strip in enumerate(strips):
        row, column = divmod(i, columns)
        left, top = GAP + column * strip_width, LINE + GAP + sum(heights[:row])
        for k, image in enumerate(strip.images):
            if image is not None:
                resized = Image.fromarray(image).resize((cell, cell), Image.Resampling.BICUBIC)
                canvas.paste(resized, (left + k * (cell + GAP), top))
        for k, line in enumerate(captions[i]):
            draw.text((left, top + cell + 3 + k * LINE), line, fill="black", font=font)
    with atomic_file(path) as temporary:
        canvas.save(temporary, format="WEBP" if path.suffix == ".webp" else "PNG", quality=WEBP_QUALITY)


def grid(
    samples: "Sequence[Sample]", results: Sequence[Image.Image], path: Path, columns: int = 2, cell: int = CELL
) -> None:
    """Write samples with a model's results: source, references, result, ground truth; kind and prompt below.

    Args:
        samples: Synthetic samples.
        results: The model's image for each sample.
        path: Where it is written; .webp: a WebP.
        columns: Samples in a row of the sheet.
        cell: Width and height of an image on the sheet, in pixels.
    """
    references = [[image for image in sample.images if image is not sample.source] for sample in samples]
    most = max(len(images) for images in references)
    titles = ["source", *(["references"] + [""] * (most - 1))[:most], "result", "ground truth"]
    strips = []
    for sample, images, result in zip(samples, references, results, strict=True):
        padding = [None] * (most - len(images))
        cells = [sample.source, *images, *padding, np.asarray(result), sample.target]
        strips.append(Strip(cells, f"{sample.kind}: {sample.prompt}"))
    sheet(strips, titles, path, columns, cell)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break text into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
