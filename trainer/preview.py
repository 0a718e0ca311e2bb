"""Pictures to look at: what a model makes of samples of the world, beside what it should have made."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mige_rt.pipeline import MigePipeline, Resolved, Settings
from trainer.world.concepts import Concept
from trainer.world.tasks import KINDS, Sample, make_sample

PREVIEW_SEED = 10**6  # of a series of the world that training never sees
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


def preview(concepts: list[Concept], state: Path) -> Path:
    """A grid of what the saved model makes of the first samples of a series that it was not trained on, in
    state/preview.png; returns it."""
    pipe = MigePipeline.from_pretrained(state / "model")
    samples = first_of_each_kind(concepts, pipe.config.size, PREVIEW_SEED, 4)
    grid(samples, answer(pipe, samples, Settings()), state / "preview.png")
    return state / "preview.png"


def grid(samples: Sequence[Sample], results: Sequence[Image.Image], path: Path, columns: int = 2) -> None:
    """Write a PNG: for each sample its source, its references, the result, the ground truth, and the prompt below."""
    cell_width = 5 * (CELL + GAP) + GAP
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * cell_width, LINE + rows * (CELL + LINE)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for c in range(columns):
        for k, title in enumerate(("source", "references", "", "result", "ground truth")):
            draw.text((c * cell_width + k * (CELL + GAP), 8), title, fill="grey", font=font)
    for i, (sample, result) in enumerate(zip(samples, results, strict=True)):
        left, top = (i % columns) * cell_width, LINE + (i // columns) * (CELL + LINE)
        references = [image for image in sample.images if image is not sample.source][:2]
        shown: list[np.ndarray | Image.Image | None] = [sample.source, *references]
        shown += [None] * (3 - len(shown)) + [result, sample.target]
        for k, picture in enumerate(shown):
            if picture is not None:
                image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
                sheet.paste(image.resize((CELL, CELL), Image.Resampling.BICUBIC), (left + k * (CELL + GAP), top))
        draw.text((left, top + CELL + 4), sample.prompt, fill="black", font=font)
    sheet.save(path)
