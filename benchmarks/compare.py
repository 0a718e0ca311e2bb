"""A comparison of two engines as files: compare.json, compare.md, grid.png.

With the assets of the synthetic data, its evaluation by both engines on the same samples, too, in evaluation/reference
and evaluation/candidate, whose metrics stand side by side in compare.json and compare.md.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import log2
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.formatting import interval, json_text, markdown_table
from benchmarks.parity import EngineId, ImageParity, Parity, compare_each
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams
from trainer.contact_sheet import Strip, sheet
from trainer.evaluate.efficientnet_lite import load_efficientnet
from trainer.evaluate.options import EVALUATION_SEED
from trainer.evaluate.run import evaluate, held_out_concepts

SHOWN = 24  # images in the grid
CELL = 160  # pixels an image is shown at
MAX_AMPLIFICATION = 64  # times; at that, a difference of one level of 255 is seen
METRICS = {
    "psnr": "PSNR against the ground truth, dB",
    "covered": "distance covered",
    "right": "edited pixels right",
    "kept": "untouched pixels kept",
    "found": "subjects found",
}

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What to compare by."""

    requests: Mapping[str, ResolvedRequest]
    seeds: int = 4  # images of each request
    params: SamplingParams = field(default_factory=SamplingParams)
    command: str = "mige-rt compare"
    assets: Path | None = None  # the synthetic data's; None for no evaluation
    samples: int = 8  # of each kind in the evaluation


@dataclass(frozen=True)
class EvaluationMetric:
    """One of the evaluation's metrics of one kind of task, by both engines; each with its 95 % interval."""

    kind: str
    metric: str
    reference: Mapping[str, float]  # value, low, high
    candidate: Mapping[str, float]


@dataclass(frozen=True)
class EngineComparison:
    """What `mige-rt compare` measured."""

    options: CompareOptions
    parity: Parity
    evaluation: tuple[EvaluationMetric, ...] | None  # None where no assets were given, or it was not got to
    complete: bool

    @property
    def verdict(self) -> str:
        """In a sentence, with the metrics that are out of tolerance."""
        failed = [metric.name for metric in self.parity.metrics if not metric.ok]
        text = f"{self.parity.candidate} is {'not ' if failed else ''}what {self.parity.reference} computes"
        if failed:
            text += f": out of tolerance are {', '.join(failed)}"
        return text + ("" if self.complete else " (incomplete: it was interrupted)")

    def to_json(self) -> dict[str, Any]:
        return {
            "command": self.options.command,
            "params": asdict(self.options.params),
            **self.parity.to_json(),
            "complete": self.complete,
            "verdict": self.verdict,
            "evaluation": self.evaluation and [asdict(metric) for metric in self.evaluation],
        }


def compare(
    reference: MigePipeline,
    candidate: MigePipeline,
    options: CompareOptions,
    folder: Path,
    on_progress: OnProgress = lambda what, done, total: None,
) -> EngineComparison:
    """Compare, and write the files into `folder`.

    Ctrl-C keeps what was done, marked as incomplete, unless that is nothing at all.

    Raises:
        InputError: As `parity.compare_each` does, and when the assets or the evaluation's network are missing.
    """
    concepts = None if options.assets is None else held_out_concepts(options.assets)
    if concepts is not None:
        load_efficientnet()  # fails here rather than after all images
    images: list[ImageParity] = []
    evaluation: tuple[EvaluationMetric, ...] | None = None
    complete = False
    total = len(options.requests) * options.seeds
    try:
        on_progress("images", 0, total)
        for image in compare_each(reference, candidate, options.requests, options.seeds, options.params):
            images.append(image)
            on_progress("images", len(images), total)
        if concepts is not None:
            for name, pipe in (("reference", reference), ("candidate", candidate)):
                (folder / "evaluation" / name).mkdir(parents=True)
                evaluate(pipe, concepts, EVALUATION_SEED, options.samples, folder / "evaluation" / name, on_progress)
            evaluation = tuple(_evaluation_metrics(folder / "evaluation"))
        complete = True
    except KeyboardInterrupt:
        if not images:
            raise
    parity = Parity(EngineId.of(reference), EngineId.of(candidate), total, tuple(images))
    comparison = EngineComparison(options, parity, evaluation, complete)
    (folder / "compare.json").write_text(json_text(comparison.to_json()), encoding="utf-8")
    amplification = write_grid(parity.images, folder / "grid.png")
    (folder / "compare.md").write_text(markdown(comparison, amplification), encoding="utf-8")
    return comparison


def _evaluation_metrics(folder: Path) -> Iterator[EvaluationMetric]:
    """What both evaluations say of the model's own images, kind by kind."""
    paths = [folder / name / "evaluation.json" for name in ("reference", "candidate")]
    both = [json.loads(path.read_text(encoding="utf-8"))["kinds"] for path in paths]
    for kind in both[0]:
        for name, title in METRICS.items():
            pair = [kinds[kind][name] if name == "covered" else kinds[kind][name].get("result") for kinds in both]
            if None not in pair:
                yield EvaluationMetric(kind, title, *pair)


def write_grid(images: Sequence[ImageParity], path: Path) -> int:
    """Write a PNG of reference, candidate and their difference; of more than SHOWN images, the worst by PSNR.

    Returns by how much the difference is amplified, the same for all.
    """
    worst = sorted(range(len(images)), key=lambda k: images[k].errors.psnr)[:SHOWN]
    shown = [images[k] for k in sorted(worst)]
    largest = max(image.errors.max_difference for image in shown)
    amplification = min(2 ** int(log2(255 / max(largest, 1))), MAX_AMPLIFICATION)
    strips = []
    for image in shown:
        truth, result = np.asarray(image.reference), np.asarray(image.candidate)
        difference = np.abs(truth.astype(np.int16) - result.astype(np.int16)) * amplification
        caption = f"{image.title}, {image.errors.decibels}: {image.prompt}"
        strips.append(Strip([truth, result, np.clip(difference, 0, 255).astype(np.uint8)], caption))
    sheet(strips, ["reference", "candidate", f"difference x {amplification}"], path, cell=CELL)
    return amplification


def summary(comparison: EngineComparison) -> list[str]:
    """The metrics and the evaluation as Markdown tables, which the command prints."""
    metrics = [[m.name, m.text, m.limit, m.at, m.verdict] for m in comparison.parity.metrics]
    tables = [markdown_table(["metric", "worst", "allowed", "at", ""], metrics, (3, 4))]
    if comparison.evaluation is not None:
        values = [
            [m.kind, m.metric, interval(m.reference, ".3g"), interval(m.candidate, ".3g")]
            for m in comparison.evaluation
        ]
        tables += [
            "## Evaluation on synthetic samples",
            "By both on the same samples of concepts held out from training, in brackets 95 % intervals over samples; "
            "[reference](evaluation/reference/evaluation.md), [candidate](evaluation/candidate/evaluation.md).",
            markdown_table(["kind", "metric", "reference", "candidate"], values, (1,)),
        ]
    return tables


def markdown(comparison: EngineComparison, amplification: int) -> str:
    """The comparison as a document to read."""
    parity, params = comparison.parity, asdict(comparison.options.params)
    given = ", ".join(f"{name} {value}" for name, value in params.items() if value is not None)
    images = [
        [i.title, i.task, f"{e.latents:.1e}", e.decibels, f"{e.ssim:.4f}", str(e.max_difference)]
        for i in parity.images
        for e in [i.errors]
    ]
    metrics, *evaluation = summary(comparison)
    parts = [
        "# Comparison of two engines",
        f"**{comparison.verdict}.**",
        f"`{comparison.options.command}`: {len(parity.images)} of {parity.requested} images, each from the same noise "
        f"by both; {given or 'parameters are the defaults'}. Errors are root mean squares, relative to the reference's "
        "output; a graph's is over all its calls for an image, each with the inputs that the reference gave it.",
        metrics,
        f"![reference, candidate, and their difference times {amplification}](grid.png)",
        markdown_table(["image", "task", "latents", "PSNR", "SSIM", "largest difference, of 255"], images, (1,)),
        *evaluation,
    ]
    return "\n\n".join(parts) + "\n"
