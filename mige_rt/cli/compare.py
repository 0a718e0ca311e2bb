"""`mige-rt compare`."""

import sys
from pathlib import Path
from typing import Any, get_args

import click

from engines.factory import ENGINES
from mige_rt.cli.shared import INTERRUPTED, PATH, command_line, open_pipeline, progress
from mige_rt.config import Precision
from mige_rt.errors import requires
from mige_rt.terminal import echo, report_lines

_PRECISION = click.Choice(["auto", *get_args(Precision)])


@click.command()
@click.option("--reference", type=click.Choice(ENGINES), default="pytorch", show_default=True)
@click.option("--candidate", type=click.Choice(["auto", *ENGINES]), default="auto", show_default=True)
@click.option("--model", type=PATH, help="a bundle or a model folder  [default: the model that comes with mige-rt]")
@click.option("--reference-model", type=PATH, help="the reference's, if that is another  [default: --model]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1")
@click.option("--reference-device", help="the reference's, if that is another  [default: --device]")
@click.option("--precision", type=_PRECISION, default="auto", show_default=True, help="the candidate's")
@click.option(
    "--reference-precision", type=_PRECISION, help="[default: fp32 with pytorch, a bundle's own with the others]"
)
@click.option("--prompts", type=PATH, help="JSON lines as for `run --batch`  [default: six that come with mige-rt]")
@click.option("--seeds", type=click.IntRange(1), default=4, show_default=True, help="images of each prompt")
@click.option("--num-inference-steps", "--steps", type=int, help="at least 2  [default: the model's for the task]")
@click.option("--out", type=PATH, required=True, help="folder to make: compare.json, compare.md, grid.png")
def compare(out: Path, prompts: Path | None, reference_precision: Any, **given: Any) -> None:
    """Compare two engines, or two models of one size, by the images that they make from the same noise.

    \b
      mige-rt compare --candidate onnxruntime --out report
      mige-rt compare --candidate tensorrt --model bundle --precision fp16 --out report
      mige-rt compare --model bundle-int8 --reference-model mige_rt/models/tiny --out report

    Each graph is also compared by itself, with the inputs that the reference gives it. The exit code is 0 where every
    metric is within the tolerance of the precisions, 1 where one is not, 130 after Ctrl-C, which keeps what was done.
    """
    with requires("bench", "comparing"):
        from benchmarks import compare as comparing
        from export.inputs import SAMPLES
    from mige_rt.atomic import atomic_folder
    from mige_rt.bundle import DEFAULT_MODEL
    from mige_rt.requests import read_requests
    from mige_rt.sampling_params import SamplingParams

    options = comparing.CompareOptions(
        requests=read_requests(prompts or SAMPLES / "requests.jsonl"),  # first, since it costs less than opening models
        params=SamplingParams(num_inference_steps=given["num_inference_steps"]),
        command=command_line(),
        seeds=given["seeds"],
    )
    model, device = given["model"], given["device"]
    if reference_precision is None:
        reference_precision = "fp32" if given["reference"] == "pytorch" else "auto"
    with atomic_folder(out) as folder:
        candidate = open_pipeline(model, engine=given["candidate"], device=device, precision=given["precision"])
        reference = open_pipeline(
            given["reference_model"] or model or DEFAULT_MODEL,
            engine=given["reference"],
            device=given["reference_device"] or device,
            precision=reference_precision,
        )
        with progress("images") as advance:
            parity = comparing.compare(reference, candidate, options, folder, advance)
    report_lines(f"{comparing.metrics_table(parity)}\n\n{parity.verdict}")
    echo(out)
    if not parity.complete:
        sys.exit(INTERRUPTED)
    if not parity.ok:
        sys.exit(1)
