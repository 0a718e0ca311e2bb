"""Pictures to look at: what a model makes of samples of the world, beside what it should have made.

A quick look at a model in training, on things that it knows; `python -m trainer.evaluate` measures on those held out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from mige_rt.pipeline import MigePipeline
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams
from trainer.evaluate.metrics import psnr
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import KINDS, Sample, make_sample

PREVIEW_SEED = 10**6  # of a series of the world that training never sees
SHOWN, MEASURED = 4, 32  # samples a kind
BATCH = 8  # pictures made at once, where the engine takes as many; more are no faster on a CPU
CELL = 128  # pixels a picture is shown at
GAP = 6
LINE = 17  # of text


def first_of_each_kind(concepts: Sequence[Concept], side: int, seed: int, each: int) -> list[Sample]:
    """The first `each` samples of every kind in the series `seed`, kind by kind; more of them begin with the same."""
    return [
        make_sample(seed, i * len(KINDS) + k, concepts, side, {kind: 1})
        for k, kind in enumerate(KINDS)
        for i in range(each)
    ]


def answer(
    pipe: MigePipeline,
    samples: Sequence[Sample],
    settings: SamplingParams,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """The model's picture for each sample; the k-th with the seed `seed` + k. on_progress takes how many are done."""
    requests = []
    for k, sample in enumerate(samples):
        images = tuple(Image.fromarray(image) for image in sample.images)
        source = None if sample.source is None else Image.fromarray(sample.source)
        requests.append(ResolvedRequest(sample.prompt, images, source, seed + k, sample.task))
    results: dict[int, Image.Image] = {}
    batch = min(BATCH, pipe.max_batch_size)
    for task in dict.fromkeys(request.task for request in requests):
        of_task = [k for k, request in enumerate(requests) if request.task == task]
        for first in range(0, len(of_task), batch):
            chosen = of_task[first : first + batch]
            results |= zip(chosen, pipe.make([requests[k] for k in chosen], settings), strict=True)
            if on_progress is not None:
                on_progress(len(results))
    return [results[k] for k in range(len(samples))]


def preview(concepts: list[Concept], state: Path) -> Table:
    """What the saved model makes of the first samples of a series that it was not trained on.

    Writes a grid of SHOWN a kind to state/preview.png. Returns a table: over MEASURED samples a kind, the mean PSNR of
    the result against the ground truth, beside that of the source left as it is.
    """
    pipe = MigePipeline.from_pretrained(state / "model")
    samples = first_of_each_kind(concepts, pipe.config.size, PREVIEW_SEED, MEASURED)
    results = answer(pipe, samples, SamplingParams())
    shown = [i for first in range(0, len(samples), MEASURED) for i in range(first, first + SHOWN)]
    grid([samples[i] for i in shown], [results[i] for i in shown], state / "preview.png")
    table = Table("task", "result, dB", "source copied, dB", title=f"PSNR, {MEASURED} samples a task")
    for kind in KINDS:
        of_kind = [(s, np.asarray(r)) for s, r in zip(samples, results, strict=True) if s.kind == kind]
        made = np.mean([psnr(result, sample.target) for sample, result in of_kind])
        copied = [psnr(sample.source, sample.target) for sample, _ in of_kind if sample.source is not None]
        table.add_row(kind, f"{made:.1f}", f"{np.mean(copied):.1f}" if copied else "-")
    return table


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """text in lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@dataclass(frozen=True)
class Strip:
    """Pictures side by side, uint8 [H,W,3], of which None leaves a place empty, and the text below them."""

    pictures: Sequence[np.ndarray | None]
    text: str


def sheet(strips: Sequence[Strip], titles: Sequence[str], path: Path, columns: int = 2, cell: int = CELL) -> None:
    """Write a PNG of strips in columns, each picture `cell` pixels wide, with a title above each place of a strip."""
    strip_width = len(titles) * (cell + GAP) + 2 * GAP
    font = ImageFont.load_default(13)
    texts = [_wrapped(strip.text, font, strip_width - 2 * GAP) for strip in strips]
    heights = [
        cell + GAP + LINE * max(len(lines) for lines in texts[first : first + columns]) + GAP
        for first in range(0, len(strips), columns)
    ]
    image = Image.new("RGB", (columns * strip_width, LINE + GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(image)
    for c in range(columns):
        for k, title in enumerate(titles):
            draw.text((GAP + c * strip_width + k * (cell + GAP), 3), title, fill="grey", font=font)
    for i, strip in enumerate(strips):
        row, column = divmod(i, columns)
        left, top = GAP + column * strip_width, LINE + GAP + sum(heights[:row])
        for k, picture in enumerate(strip.pictures):
            if picture is not None:
                shown = Image.fromarray(picture).resize((cell, cell), Image.Resampling.BICUBIC)
                image.paste(shown, (left + k * (cell + GAP), top))
        for k, line in enumerate(texts[i]):
            draw.text((left, top + cell + 3 + k * LINE), line, fill="black", font=font)
    image.save(path)


def grid(samples: Sequence[Sample], results: Sequence[Image.Image], path: Path, columns: int = 2) -> None:
    """Write a PNG: for each sample its source, its references, the result, the ground truth, and below them its kind
    and its prompt."""
    references = [[image for image in sample.images if image is not sample.source] for sample in samples]
    most = max(len(images) for images in references)
    titles = ["source", *(["references"] + [""] * (most - 1))[:most], "result", "ground truth"]
    strips = []
    for sample, own, result in zip(samples, references, results, strict=True):
        empty = [None] * (most - len(own))
        pictures = [sample.source, *own, *empty, np.asarray(result), sample.target]
        strips.append(Strip(pictures, f"{sample.kind}: {sample.prompt}"))
    sheet(strips, titles, path, columns)
