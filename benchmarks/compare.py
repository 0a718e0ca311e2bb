"""A comparison of two engines as files: compare.json, compare.md, grid.png."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import log2
from pathlib import Path

import numpy as np

from benchmarks.parity import ImageParity, OnProgress, Parity, Requests, compare_pipelines
from export.formatting import json_text, markdown_table
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams
from trainer.contact_sheet import Strip, sheet

SHOWN = 24  # images in the grid
CELL = 160  # pixels an image is shown at
VERDICTS = {True: "ok", False: "FAILED"}
MAX_AMPLIFICATION = 64  # times; at that, a difference of one level of 255 is seen


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What to compare by."""

    requests: Requests
    seeds: int = 4  # images of each request
    params: SamplingParams = field(default_factory=SamplingParams)
    command: str = "mige-rt compare"


def compare(
    reference: MigePipeline,
    candidate: MigePipeline,
    options: CompareOptions,
    folder: Path,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Parity:
    """Compare as `parity.compare_pipelines` does, and write the files into `folder`."""
    given = options.requests, options.seeds, options.params
    parity = compare_pipelines(reference, candidate, *given, on_progress=on_progress)
    content = {"command": options.command, "params": asdict(options.params), **parity.to_json()}
    (folder / "compare.json").write_text(json_text(content), encoding="utf-8")
    amplification = write_grid(parity.images, folder / "grid.png")
    (folder / "compare.md").write_text(_markdown(parity, options, amplification), encoding="utf-8")
    return parity


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


def metrics_table(parity: Parity) -> str:
    """The metrics as a Markdown table, which the command prints."""
    rows = [
        {"metric": m.name, "worst": m.text, "allowed": m.limit, "at": m.at, "verdict": m.limit and VERDICTS[m.ok]}
        for m in parity.metrics
    ]
    return markdown_table(rows, ("at", "verdict"))


def _markdown(parity: Parity, options: CompareOptions, amplification: int) -> str:
    """The comparison as a document to read."""
    given = ", ".join(f"{name} {value}" for name, value in asdict(options.params).items() if value is not None)
    images = [
        {"image": i.title, "task": i.task, "latents": f"{i.errors.latents:.1e}", "PSNR": i.errors.decibels}
        | {"SSIM": f"{i.errors.ssim:.4f}", "largest difference, of 255": str(i.errors.max_difference)}
        for i in parity.images
    ]
    return f"""# Comparison of two engines

**{parity.verdict}.**

`{options.command}`: {len(parity.images)} of {parity.requested} images, each from the same noise by both; \
{given or "parameters are the defaults"}. Errors are root mean squares, relative to the reference's output; a graph's \
is over all its calls for an image, each with the inputs that the reference gave it.

{metrics_table(parity)}

![reference, candidate, and their difference times {amplification}](grid.png)

{markdown_table(images, ("task",))}
"""
