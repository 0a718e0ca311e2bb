"""Runs a model on synthetic samples, and shows its results beside the ground truth.

A quick look at a model in training, on concepts that it was trained on; `python -m trainer.evaluate` measures it on
held-out ones.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.table import Table

from mige_rt.pipeline import MigePipeline
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams
from trainer.contact_sheet import grid
from trainer.evaluate.metrics import psnr
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import KINDS, Sample, make_sample

PREVIEW_SEED = 10**6  # of a series of samples that training never sees
SAMPLES_SHOWN, SAMPLES_MEASURED = 4, 32  # of each kind
BATCH = 8  # images made at once, if the engine takes as many; a larger batch is not faster on a CPU


def first_of_each_kind(
    concepts: Sequence[Concept], side: int, seed: int, samples_per_kind: int, kinds: Sequence[str] = tuple(KINDS)
) -> list[Sample]:
    """The first samples of some kinds in a series, ordered by kind.

    Args:
        concepts: What the samples show.
        side: Width and height of the images, in pixels.
        seed: Of the series.
        samples_per_kind: A larger number gives the same samples first.
        kinds: More of them leave the samples of the first ones as they are.
    """
    return [
        make_sample(seed, i * len(KINDS) + k, concepts, side, {kind: 1})
        for k, kind in enumerate(kinds)
        for i in range(samples_per_kind)
    ]


def answer(
    pipe: MigePipeline,
    samples: Sequence[Sample],
    params: SamplingParams,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """The model's image for each sample.

    Args:
        pipe: The model.
        samples: What it is asked for; samples of one task share a batch.
        params: How to sample; the same for all samples.
        seed: Of the first sample's noise; sample k has `seed` + k.
        on_progress: Called after each batch with the number of images made so far.
    """
    requests = []
    for k, sample in enumerate(samples):
        images = tuple(Image.fromarray(image) for image in sample.images)
        source = None if sample.source is None else Image.fromarray(sample.source)
        requests.append(ResolvedRequest(sample.prompt, images, source, seed + k, sample.task))
    results: dict[int, Image.Image] = {}
    batch_size = min(BATCH, pipe.max_batch_size)
    for task in dict.fromkeys(request.task for request in requests):
        of_task = [k for k, request in enumerate(requests) if request.task == task]
        for first in range(0, len(of_task), batch_size):
            batch = of_task[first : first + batch_size]
            results |= zip(batch, pipe.generate([requests[k] for k in batch], params), strict=True)
            if on_progress is not None:
                on_progress(len(results))
    return [results[k] for k in range(len(samples))]


def preview(concepts: list[Concept], state: Path) -> Table:
    """Run the saved model on the first samples of a series that it was not trained on.

    Args:
        concepts: What the samples show.
        state: The state folder of a training, after the stage `save`. preview.png is written there: SAMPLES_SHOWN
            samples of each kind with the results.

    Returns:
        For each kind, over SAMPLES_MEASURED samples, the mean PSNR in dB of the results against the ground truth, and
        that of the unchanged source.
    """
    pipe = MigePipeline.from_pretrained(state / "model")
    samples = first_of_each_kind(concepts, pipe.config.size, PREVIEW_SEED, SAMPLES_MEASURED)
    results = answer(pipe, samples, SamplingParams())
    shown = [i for first in range(0, len(samples), SAMPLES_MEASURED) for i in range(first, first + SAMPLES_SHOWN)]
    grid([samples[i] for i in shown], [results[i] for i in shown], state / "preview.png")
    table = Table("task", "result, dB", "source copied, dB", title=f"PSNR, {SAMPLES_MEASURED} samples a task")
    for kind in KINDS:
        of_kind = [(s, np.asarray(r)) for s, r in zip(samples, results, strict=True) if s.kind == kind]
        result_psnr = np.mean([psnr(result, sample.target) for sample, result in of_kind])
        source_psnr = [psnr(sample.source, sample.target) for sample, _ in of_kind if sample.source is not None]
        table.add_row(kind, f"{result_psnr:.1f}", f"{np.mean(source_psnr):.1f}" if source_psnr else "-")
    return table
