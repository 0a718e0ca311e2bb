"""A comparison of two engines as files: compare.json, compare.md, grid.png.

With a small world, its evaluation by both engines on the same samples, too, in evaluation/reference and
evaluation/candidate, whose figures stand side by side in compare.json and compare.md.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Column, Table

from benchmarks.parity import Parity, PictureParity, Side, compare_each
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams
from trainer.evaluate.__main__ import EVALUATION_SEED, evaluate, held_out_concepts
from trainer.evaluate.efficientnet_lite import load_efficientnet
from trainer.preview import Strip, sheet

SHOWN = 24  # pictures in the grid
CELL = 160  # pixels a picture is shown at
MOST_AMPLIFIED = 64  # times; at that, a difference of one level of 255 is seen

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Metric:
    """One of the evaluation's figures of one kind of task, by both; each with its 95 % interval."""

    kind: str
    figure: str
    reference: Mapping[str, float]  # value, low, high
    candidate: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """What `mige-rt compare` found. metrics: None where no world was given, or it was not got to."""

    command: str
    settings: SamplingParams
    parity: Parity
    metrics: tuple[Metric, ...] | None
    complete: bool

    @property
    def verdict(self) -> str:
        """In a sentence, the figures that are out of tolerance first."""
        wrong = [figure for figure in self.parity.figures if not figure.ok]
        said = f"{self.parity.candidate} is {'not ' if wrong else ''}what {self.parity.reference} computes"
        if wrong:
            said += f": out of tolerance are {', '.join(figure.what for figure in wrong)}"
        return said + ("" if self.complete else " (incomplete: it was interrupted)")


def compare(
    reference: MigePipeline,
    candidate: MigePipeline,
    requests: Mapping[str, ResolvedRequest],
    seeds: int,
    settings: SamplingParams,
    command: str,
    folder: Path,
    world: Path | None = None,
    samples: int = 8,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Comparison:
    """Compare, and write the files into `folder`. samples: of the world, a kind.

    Ctrl-C keeps what was done, marked as incomplete, unless that is nothing at all. Raises InputError as
    `parity.compare_each` does, and when the folder `world` is none or the
    evaluation's network is missing.
    """
    concepts = None if world is None else held_out_concepts(world)
    if concepts is not None:
        load_efficientnet()  # fails here rather than after all pictures
    pictures: list[PictureParity] = []
    metrics: tuple[Metric, ...] | None = None
    interrupted = False
    total = len(requests) * seeds
    try:
        on_progress("pictures", 0, total)
        for picture in compare_each(reference, candidate, requests, seeds, settings):
            pictures.append(picture)
            on_progress("pictures", len(pictures), total)
        if concepts is not None:
            evaluations = []
            for name, pipe in (("reference", reference), ("candidate", candidate)):
                own = folder / "evaluation" / name
                own.mkdir(parents=True)
                evaluate(pipe, concepts, EVALUATION_SEED, samples, own, on_progress)
                evaluations.append(json.loads((own / "evaluation.json").read_text()))
            metrics = _metrics(*evaluations)
    except KeyboardInterrupt:
        if not pictures:
            raise
        interrupted = True
    parity = Parity(Side.of(reference), Side.of(candidate), total, tuple(pictures))
    found = Comparison(command, settings, parity, metrics, not interrupted)
    content = {
        "command": command,
        "settings": vars(settings),
        **parity.to_json(),
        "complete": found.complete,
        "verdict": found.verdict,
        "metrics": None if metrics is None else [vars(metric) for metric in metrics],
    }
    (folder / "compare.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    gain = write_grid(parity.pictures, folder / "grid.png")
    (folder / "compare.md").write_text(markdown(found, gain), encoding="utf-8")
    return found


def _metrics(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> tuple[Metric, ...]:
    """What two evaluations say of the model's own pictures; each kind's figures in the order of Figures."""
    rows = []
    for kind, first in reference["kinds"].items():
        second = candidate["kinds"][kind]
        for name, title in _METRICS.items():
            pair = [of[name] if name == "covered" else of[name].get("result") for of in (first, second)]
            if None not in pair:
                rows.append(Metric(kind, title, *pair))
    return tuple(rows)


_METRICS = {
    "psnr": "PSNR against the ground truth, dB",
    "covered": "distance covered",
    "right": "edited pixels right",
    "kept": "untouched pixels kept",
    "found": "subjects found",
}


def write_grid(pictures: Sequence[PictureParity], path: Path) -> int:
    """Write a PNG: reference, candidate and their difference, the prompt below them; of more than SHOWN pictures, those
    of the lowest PSNR. Returns by how much the difference is amplified, the same for all."""
    shown = sorted(sorted(range(len(pictures)), key=lambda k: pictures[k].psnr)[:SHOWN])
    largest = max(pictures[k].max for k in shown)
    gain = min(2 ** int(log2(255 / max(largest, 1))), MOST_AMPLIFIED)
    strips = []
    for k in shown:
        of = pictures[k]
        truth, made = np.asarray(of.reference), np.asarray(of.candidate)
        difference = np.abs(truth.astype(np.int16) - made.astype(np.int16)) * gain
        what = f"{of.title}, {of.decibels}: {of.prompt}"
        strips.append(Strip([truth, made, np.clip(difference, 0, 255).astype(np.uint8)], what))
    sheet(strips, ["reference", "candidate", f"difference x {gain}"], path, cell=CELL)
    return gain


def tables(found: Comparison) -> list[Table]:
    """What the command prints."""
    parity = Table(Column("figure", no_wrap=True), "worst", "allowed", "at", "", title="Parity")
    for figure in found.parity.figures:
        parity.add_row(figure.what, figure.text, figure.allowed, figure.at, figure.judged)
    if found.metrics is None:
        return [parity]
    metrics = Table("kind", "figure", "reference", "candidate", title="The world's evaluation")
    for metric in found.metrics:
        values = (f"{estimate['value']:.3g}" for estimate in (metric.reference, metric.candidate))
        metrics.add_row(metric.kind, metric.figure, *values)
    return [parity, metrics]


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3g} ({estimate['low']:.3g} to {estimate['high']:.3g})"


def markdown(found: Comparison, gain: int) -> str:
    """The comparison as tables to read."""
    parity = found.parity
    asked = ", ".join(f"{name} {value}" for name, value in vars(found.settings).items() if value is not None)
    lines = [
        "# Comparison of two engines",
        "",
        f"**{found.verdict}.**",
        "",
        f"`{found.command}`: {len(parity.pictures)} of {parity.asked} pictures, each from the same noise by both; "
        f"{asked or 'settings are the defaults'}. Errors are root mean squares, relative to the reference's output; a "
        "graph's is over all its calls for a picture, each with the inputs that the reference gave it.",
        "",
        "| figure | worst | allowed | at | |",
        "| --- | ---: | ---: | --- | --- |",
        *(f"| {f.what} | {f.text} | {f.allowed} | {f.at} | {f.judged} |" for f in parity.figures),
        "",
        f"![reference, candidate, and their difference times {gain}](grid.png)",
        "",
        "| picture | task | latents | PSNR | SSIM | largest difference, of 255 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {p.title} | {p.task} | {p.latents:.1e} | {p.decibels} | {p.similarity:.4f} | {p.max} |"
            for p in parity.pictures
        ),
        "",
    ]
    if found.metrics is not None:
        lines += [
            "## The world's evaluation",
            "",
            "By both on the same samples of things held out from training, in brackets 95 % intervals over samples; "
            "[reference](evaluation/reference/evaluation.md), [candidate](evaluation/candidate/evaluation.md).",
            "",
            "| kind | figure | reference | candidate |",
            "| --- | --- | ---: | ---: |",
            *(
                f"| {m.kind} | {m.figure} | {_interval(m.reference)} | {_interval(m.candidate)} |"
                for m in found.metrics
            ),
            "",
        ]
    return "\n".join(lines)
