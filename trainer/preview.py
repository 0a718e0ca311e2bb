"""Pictures to look at: what a model makes of samples of the world, beside what it should have made."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from mige_rt.pipeline import MigePipeline, Resolved, Settings
from trainer.world.concepts import Concept
from trainer.world.tasks import KINDS, Sample, make_sample

PREVIEW_SEED = 10**6  # of a series of the world that training never sees
SHOWN, MEASURED = 4, 32  # samples a kind
CELL = 128  # pixels a picture is shown at
GAP = 6
LINE = 30  # of the prompt below a row


def first_of_each_kind(concepts: list[Concept], side: int, seed: int, each: int) -> list[Sample]:
    """The first `each` samples of every kind in the series `seed`."""
    found: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
    index = 0
    while any(len(samples) < each for samples in found.values()):
        sample = make_sample(seed, index, concepts, side)
        if len(found[sample.kind]) < each:
            found[sample.kind].append(sample)
        index += 1
    return [sample for samples in found.values() for sample in samples]


def answer(pipe: MigePipeline, samples: Sequence[Sample], settings: Settings, seed: int = 0) -> list[Image.Image]:
    """The model's picture for each sample; the k-th with the seed `seed` + k."""
    results = []
    for k, sample in enumerate(samples):
        images = tuple(Image.fromarray(image) for image in sample.images)
        source = None if sample.source is None else Image.fromarray(sample.source)
        request = Resolved(sample.prompt, images, source, seed + k, sample.task)
        results += pipe.make([request], settings)
    return results


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 pictures, in dB."""
    error = (picture.astype(np.float64) - truth.astype(np.float64)) ** 2
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-9)))


def preview(concepts: list[Concept], state: Path) -> Table:
    """What the saved model makes of the first samples of a series that it was not trained on.

    Writes a grid of SHOWN a kind to state/preview.png. Returns a table: over MEASURED samples a kind, the mean PSNR of
    the result against the ground truth, beside that of the source left as it is.
    """
    pipe = MigePipeline.from_pretrained(state / "model")
    samples = first_of_each_kind(concepts, pipe.config.size, PREVIEW_SEED, MEASURED)
    results = answer(pipe, samples, Settings())
    shown = [i for first in range(0, len(samples), MEASURED) for i in range(first, first + SHOWN)]
    grid([samples[i] for i in shown], [results[i] for i in shown], state / "preview.png")
    table = Table("task", "result, dB", "source copied, dB", title=f"PSNR, {MEASURED} samples a task")
    for kind in KINDS:
        of_kind = [(s, np.asarray(r)) for s, r in zip(samples, results, strict=True) if s.kind == kind]
        made = np.mean([psnr(result, sample.target) for sample, result in of_kind])
        copied = [psnr(sample.source, sample.target) for sample, _ in of_kind if sample.source is not None]
        table.add_row(kind, f"{made:.1f}", f"{np.mean(copied):.1f}" if copied else "-")
    return table


def grid(samples: Sequence[Sample], results: Sequence[Image.Image], path: Path, columns: int = 2) -> None:
    """Write a PNG: for each sample its source and references, the result, the ground truth, and the prompt below."""
    cell_width = 5 * (CELL + GAP) + GAP
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * cell_width, LINE + rows * (CELL + LINE)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for c in range(columns):
        for k, title in enumerate(("source, references", "", "", "result", "ground truth")):
            draw.text((c * cell_width + k * (CELL + GAP), 8), title, fill="grey", font=font)
    for i, (sample, result) in enumerate(zip(samples, results, strict=True)):
        left, top = (i % columns) * cell_width, LINE + (i // columns) * (CELL + LINE)
        sources = [] if sample.source is None else [sample.source]
        given = [*sources, *(image for image in sample.images if image is not sample.source)]
        shown: list[np.ndarray | Image.Image | None] = [*given, *[None] * (3 - len(given)), result, sample.target]
        for k, picture in enumerate(shown):
            if picture is not None:
                image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
                sheet.paste(image.resize((CELL, CELL), Image.Resampling.BICUBIC), (left + k * (CELL + GAP), top))
        draw.text((left, top + CELL + 4), sample.prompt, fill="black", font=font)
    sheet.save(path)
