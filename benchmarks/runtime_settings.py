"""`python -m benchmarks.runtime_settings`: what ONNX Runtime's settings for CPUs are worth, one edit an image.

Each setting has a process of its own, so that its memory and its threads are its own, and they take turns. Writes
runtime-settings.json and runtime-settings.md.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import click
import jinja2
import numpy as np
from rich.console import Console

from benchmarks.case import Candidate, Case, RuntimeSettings, WorkerConfig
from benchmarks.measure import InterleavedRuns, Latency, OnIteration, speedup
from benchmarks.worker import CandidateError, RunOutput, Worker
from export.environment import environment
from export.formatting import amount, interval, json_text
from mige_rt.atomic import atomic_file
from mige_rt.bundle import DEFAULT_MODEL, read_config, read_manifest
from mige_rt.errors import InputError
from trainer.evaluate.metrics import psnr

FILES = ("runtime-settings.json", "runtime-settings.md")
DEFAULTS = "defaults"
LEAN, OURS = "neither arena nor pattern", "batch in parallel, neither arena nor pattern"  # OURS: what the engine sets
SETTINGS: dict[str, RuntimeSettings] = {
    DEFAULTS: RuntimeSettings(),
    "1 thread": RuntimeSettings(threads=1),
    "2 threads": RuntimeSettings(threads=2),
    "no arena": RuntimeSettings(arena=False),
    "no memory pattern": RuntimeSettings(pattern=False),
    LEAN: RuntimeSettings(arena=False, pattern=False),
    "extended optimisation": RuntimeSettings(optimisation="extended"),
    "basic optimisation": RuntimeSettings(optimisation="basic"),
    "no spinning": RuntimeSettings(spinning=False),
    f"1 thread, {LEAN}": RuntimeSettings(threads=1, arena=False, pattern=False),
    "batch in parallel": RuntimeSettings(batch_parallel=True),
    OURS: RuntimeSettings(batch_parallel=True, arena=False, pattern=False),
}


def measure_settings(
    bundle: Path,
    settings: Mapping[str, RuntimeSettings],
    on_iteration: OnIteration,
    *,
    num_inference_steps: int,
    iterations: int,
    warmup: int,
) -> tuple[list[dict[str, Any]], bool]:
    """For a bundle in fp32 a result for each setting, DEFAULTS first among them, and whether all iterations were made.

    A result counts (`ok`) where its image is the defaults' within the tolerance; psnr, in dB, is None for the same.

    Ctrl-C keeps whole rounds if there are two. Raises CandidateError when a bundle cannot be run.
    """
    from export.validate import MIN_PSNR  # here, since workers import this module, and it loads PyTorch

    outputs: dict[str, RunOutput] = {}
    timed: dict[str, Callable[[], float]] = {}
    side, complete = read_config(bundle).size, True
    case = Case(1, 1, num_inference_steps, (side, side), 5.0, 1.0)
    with ExitStack() as stack:
        for name, setting in settings.items():
            candidate = Candidate(WorkerConfig(bundle, "onnxruntime", "cpu", "auto", runtime=setting))
            worker = Worker(candidate.worker)
            stack.callback(worker.kill)
            outputs[name], timed[name] = worker.run(candidate, case), partial(worker.seconds, candidate, case)
        runs = InterleavedRuns(timed, ())
        try:
            runs.run(iterations, warmup, on_iteration)
        except KeyboardInterrupt:
            complete = False
            if min(map(len, runs.seconds.values())) < 2:
                raise
    results, expected = [], outputs[DEFAULTS].images[0]
    for name, setting in settings.items():
        image, gain = outputs[name].images[0], speedup(runs.seconds[DEFAULTS], runs.seconds[name])
        decibels = psnr(image, expected)
        result = {"name": name, "settings": asdict(setting), "latency": asdict(Latency.of(runs.seconds[name]))}
        result |= {"speedup": None if name == DEFAULTS else {**asdict(gain), "verdict": gain.verdict}}
        result |= {"peak_bytes": outputs[name].memory.host}
        result |= {"psnr": None if np.array_equal(image, expected) else decibels}
        results.append({**result, "ok": decibels >= MIN_PSNR["fp32"]})
    return results, complete


def markdown(content: Mapping[str, Any]) -> str:
    """The results as a table to read."""
    templates = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks"), trim_blocks=True)
    return templates.get_template("runtime-settings.md.j2").render(content, amount=amount, interval=interval) + "\n"


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--model", type=click.Path(path_type=Path), default=DEFAULT_MODEL, help="a bundle in fp32")
@click.option("--only", type=click.Choice(list(SETTINGS)), multiple=True, help="settings; may be repeated")
@click.option("--num-inference-steps", "--steps", type=click.IntRange(2), default=60, show_default=True)
@click.option("--iterations", "--runs", type=click.IntRange(2), default=10, show_default=True)
@click.option("--warmup", "--warmups", type=click.IntRange(1), default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(model: Path, only: tuple[str, ...], out: Path, **counts: int) -> None:
    settings = {name: SETTINGS[name] for name in SETTINGS if not only or name in (DEFAULTS, *only)}
    try:
        if (precision := read_manifest(model).precision) != "fp32":
            raise InputError(f"{model} is in {precision}, and a bundle in fp32 is expected here")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{out} cannot be written ({error}): give a folder of your own") from error
        with Console(stderr=True).status("") as status:
            show = lambda name, done, total: status.update(f"{done} of {total}: {name}")  # noqa: E731
            results, complete = measure_settings(model, settings, show, **counts)
    except (InputError, CandidateError) as error:
        raise click.UsageError(str(error)) from error
    words = [f"--{name.replace('_', '-')} {value}" for name, value in counts.items()]
    content = {
        "command": " ".join(["python -m benchmarks.runtime_settings", *words, *(f"--only '{name}'" for name in only)]),
        "date": date.today().isoformat(),
        "machine": environment(),
        "complete": complete,
        "model": read_config(model).name,
        **counts,
        "results": results,
    }
    for name, text in zip(FILES, (json_text(content), markdown(content)), strict=True):
        with atomic_file(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    click.echo(out / FILES[1])


if __name__ == "__main__":
    main()
