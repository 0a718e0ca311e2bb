"""Runs an evaluation or a guidance sweep, and writes its report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams
from trainer import preview
from trainer.contact_sheet import CELL, grid
from trainer.evaluate.identity import Gallery
from trainer.evaluate.measure import EVALUATED_KINDS, SampleMetrics, measure, reconstruct, summarize, thresholds
from trainer.evaluate.options import (
    EVALUATION_SAMPLES,
    EVALUATION_SEED,
    GUIDANCE_SAMPLES,
    GUIDANCE_SEED,
    EvaluationOptions,
)
from trainer.evaluate.report import Evaluation, describe_run, markdown, to_json, write_json
from trainer.evaluate.sweep import known_concepts, sweep, write_sweep
from trainer.plotting import check_matplotlib
from trainer.synthetic.concepts import Concept, load_concepts
from trainer.synthetic.sample import Sample

PREVIEWED, SAMPLES_SHOWN = 2, 8  # of each kind, in preview.png and in grid.webp
LEAST_CONCEPTS = 3  # a scene has up to three subjects

OnProgress = Callable[[str, int, int], None]  # what is made, how many are done, of how many


def held_out_concepts(assets: Path) -> list[Concept]:
    """The concepts that training never shows.

    Args:
        assets: Folder of emoji images made by `python -m trainer.synthetic.fetch`.

    Raises:
        InputError: The folder is no such folder, or has fewer than LEAST_CONCEPTS held-out concepts.
    """
    held_out = [concept for concept in load_concepts(assets) if concept.held_out]
    if len(held_out) < LEAST_CONCEPTS:
        raise InputError(
            f"{assets} has {len(held_out)} held-out concepts, {LEAST_CONCEPTS} are needed; make the folder again with: "
            f"python -m trainer.synthetic.fetch --out {assets}"
        )
    return held_out


def run(options: EvaluationOptions, folder: Path, on_progress: OnProgress) -> str | None:
    """Evaluate a model, or sweep its guidance scales.

    Args:
        options: What `python -m trainer.evaluate` was asked for.
        folder: An existing folder for the report; `options.out` is left alone.
        on_progress: Called as the work goes on.

    Returns:
        evaluation.md; None after a sweep.

    Raises:
        InputError: The assets, the model or the engine cannot be used, or a package is missing.
    """
    if options.guidance:
        check_matplotlib()
        concepts = known_concepts(load_concepts(options.assets))
        pipe = _open_pipeline(options)
        seed = GUIDANCE_SEED if options.seed is None else options.seed
        samples_per_kind = options.samples or GUIDANCE_SAMPLES
        points = sweep(pipe, concepts, seed, samples_per_kind, on_progress)
        write_sweep(points, describe_run(pipe, seed, samples_per_kind), folder)
        return None
    concepts = held_out_concepts(options.assets)
    pipe = _open_pipeline(options)
    seed = EVALUATION_SEED if options.seed is None else options.seed
    params = SamplingParams(paste_back=options.paste_back)
    series = Series(concepts, seed, options.samples or EVALUATION_SAMPLES)
    return evaluate(pipe, series, folder, on_progress, params=params)


def _open_pipeline(options: EvaluationOptions) -> MigePipeline:
    return MigePipeline.from_pretrained(
        options.model or DEFAULT_MODEL, engine=options.engine, device=options.device, precision=options.precision
    )


@dataclass(frozen=True)
class Series:
    """What a model is measured on.

    Attributes:
        concepts: What the samples show; subjects are told apart among them.
        seed: Of the series of samples; sample k's noise has `seed` + k.
        samples_per_kind: The first so many of the series.
        change: Of each sample, before the model sees it.
    """

    concepts: Sequence[Concept]
    seed: int
    samples_per_kind: int
    change: Callable[[Sample], Sample] | None = None

    def samples(self, side: int) -> list[Sample]:
        """Those of each kind, at this side in pixels."""
        samples = preview.first_of_each_kind(self.concepts, side, self.seed, self.samples_per_kind, EVALUATED_KINDS)
        return samples if self.change is None else [self.change(sample) for sample in samples]


def evaluate(
    pipe: MigePipeline,
    series: Series,
    folder: Path,
    on_progress: OnProgress,
    *,
    params: SamplingParams = SamplingParams(),  # noqa: B008, frozen
) -> str:
    """Measure a model, and write evaluation.json, evaluation.md, preview.png and grid.webp.

    Args:
        pipe: The model.
        series: What it is measured on.
        folder: An existing folder for the files.
        on_progress: Called after each batch of images and each measured sample.
        params: How images are sampled.

    Returns:
        evaluation.md.

    Raises:
        InputError: The weights of the network that recognizes subjects are not installed.
    """
    gallery, samples = Gallery(series.concepts, pipe.config.size), series.samples(pipe.config.size)
    samples_per_kind = series.samples_per_kind
    results = preview.answer(pipe, samples, params, series.seed, lambda done: on_progress("images", done, len(samples)))
    truths = reconstruct(pipe, [sample.target for sample in samples])
    with_source = [(k, sample.source) for k, sample in enumerate(samples) if sample.source is not None]
    reconstructed = reconstruct(pipe, [source for _, source in with_source])
    sources = {k: image for (k, _), image in zip(with_source, reconstructed, strict=True)}
    measured: dict[str, list[SampleMetrics]] = {}
    for k, (sample, result, truth) in enumerate(zip(samples, results, truths, strict=True)):
        metrics = measure(sample, np.asarray(result), truth, sources.get(k), gallery)
        measured.setdefault(sample.kind, []).append(metrics)
        on_progress("metrics", k + 1, len(samples))
    kinds = {kind: summarize(of_kind) for kind, of_kind in measured.items()}
    described = describe_run(pipe, series.seed, samples_per_kind) | ({"paste_back": True} if params.paste_back else {})
    evaluation = Evaluation(
        run=described,
        kinds=kinds,
        thresholds=[t for kind, metrics in kinds.items() for t in thresholds(kind, metrics, 1 / len(series.concepts))],
        concepts=len(series.concepts),
    )
    write_json(folder / "evaluation.json", to_json(evaluation))
    text = markdown(evaluation)
    (folder / "evaluation.md").write_text(text, encoding="utf-8")
    for name, number, cell in (("preview.png", PREVIEWED, CELL), ("grid.webp", SAMPLES_SHOWN, 2 * CELL)):
        shown = [
            first + i
            for first in range(0, len(samples), samples_per_kind)
            for i in range(min(samples_per_kind, number))
        ]
        grid([samples[k] for k in shown], [results[k] for k in shown], folder / name, cell=cell)
    return text
