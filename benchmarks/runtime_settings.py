"""`python -m benchmarks.runtime_settings`: what ONNX Runtime's settings for CPUs are worth, one edit an image.

Each setting has a process of its own, so that its memory and its threads are its own, and they take turns. Writes
runtime-settings.json and runtime-settings.md.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import click
import jinja2
import numpy as np
from rich.console import Console

from benchmarks.case import Candidate, Case, RuntimeSettings, WorkerConfig
from benchmarks.formatting import interval, json_text, markdown_table
from benchmarks.machine import environment
from benchmarks.measure import InterleavedRuns, Latency, OnIteration, Speedup, speedup
from benchmarks.worker import CandidateError, RunOutput, Worker
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
    "int8": RuntimeSettings(int8=True),
    "int8, batch in parallel": RuntimeSettings(int8=True, batch_parallel=True),
    f"int8, {OURS}": RuntimeSettings(int8=True, batch_parallel=True, arena=False, pattern=False),
    "int8, no spinning": RuntimeSettings(int8=True, spinning=False),
    "int8, 1 thread": RuntimeSettings(int8=True, threads=1),
}


@dataclass(frozen=True)
class SettingsResult:
    """What one setting was measured at."""

    name: str
    settings: RuntimeSettings
    latency: Latency
    speedup: Speedup | None  # over the defaults
    peak_bytes: int | None
    psnr: float | None  # of its image against the defaults', dB; None where nothing differs
    ok: bool  # within the tolerance of its precision, or else the result does not count


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """bundle and quantised: of one model, in fp32 and in int8."""

    bundle: Path
    quantised: Path
    num_inference_steps: int = 60
    iterations: int = 10
    warmup: int = 3


def measure_settings(
    options: MeasureOptions,
    settings: Mapping[str, RuntimeSettings],
    on_iteration: OnIteration = lambda name, done, total: None,
) -> tuple[list[SettingsResult], bool]:
    """A result for each setting, DEFAULTS first among them, and whether all iterations were made.

    Ctrl-C keeps whole rounds if there are two. Raises CandidateError when a bundle cannot be run.
    """
    from export.validate import MIN_PSNR

    outputs: dict[str, RunOutput] = {}
    timed: dict[str, Callable[[], float]] = {}
    side, complete = read_config(options.bundle).size, True
    case = Case(1, 1, options.num_inference_steps, (side, side), 5.0, 1.0)
    with ExitStack() as stack:
        for name, setting in settings.items():
            bundle = options.quantised if setting.int8 else options.bundle
            candidate = Candidate(WorkerConfig(bundle, "onnxruntime", "cpu", "auto", runtime=setting))
            worker = Worker(candidate.worker)
            stack.callback(worker.kill)
            outputs[name], timed[name] = worker.run(candidate, case), partial(worker.seconds, candidate, case)
        runs = InterleavedRuns(timed, ())
        try:
            runs.run(options.iterations, options.warmup, on_iteration)
        except KeyboardInterrupt:
            complete = False
            if min(map(len, runs.seconds.values())) < 2:
                raise
    results = []
    for name, setting in settings.items():
        image, expected = outputs[name].images[0], outputs[DEFAULTS].images[0]
        latency, peak = Latency.of(runs.seconds[name]), outputs[name].memory.host
        gain = None if name == DEFAULTS else speedup(runs.seconds[DEFAULTS], runs.seconds[name])
        decibels = psnr(image, expected)
        ok = decibels >= MIN_PSNR["int8" if setting.int8 else "fp32"]
        difference = None if np.array_equal(image, expected) else decibels
        results.append(SettingsResult(name, setting, latency, gain, peak, difference, ok))
    return results, complete


def markdown(content: Mapping[str, Any]) -> str:
    """The results as a table to read."""
    rows = []
    for result in content["results"]:
        gain, latency, peak, psnr = (result[name] for name in ("speedup", "latency", "peak_bytes", "psnr"))
        row = [result["name"], f"{latency['median']:.3f}", f"{latency['p10']:.3f} to {latency['p90']:.3f}"]
        row += [interval(gain), Speedup(**gain).verdict if result["ok"] else "does not count"] if gain else ["", ""]
        row += ["?" if peak is None else f"{peak / 1e6:.0f}", "no difference" if psnr is None else f"{psnr:.1f} dB"]
        rows.append(row)
    headers = ["settings", "seconds", "p10 to p90", "speedup", "verdict", "memory, MB", "PSNR"]
    template = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks")).get_template("runtime-settings.md.j2")
    return template.render(content, table=markdown_table(headers, rows, (4, 6))) + "\n"


@contextmanager
def _int8_of(bundle: Path, quantised: Path | None) -> Iterator[Path]:
    """The quantised bundle, or one made of `bundle` for the time being."""
    if quantised is not None:
        yield quantised
        return
    from export.exporter import ExportLimits, ExportOptions, export_bundle

    with tempfile.TemporaryDirectory(prefix="runtime-settings-") as scratch:
        export_bundle(
            str(bundle), Path(scratch) / "int8", "int8", ExportLimits(1, 4), options=ExportOptions(validate=False)
        )
        yield Path(scratch) / "int8"


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--model", type=click.Path(path_type=Path), default=DEFAULT_MODEL, help="a bundle in fp32")
@click.option("--int8", "quantised", type=click.Path(path_type=Path), help="the same in int8  [default: exported]")
@click.option("--only", type=click.Choice(list(SETTINGS)), multiple=True, help="settings; may be repeated")
@click.option("--num-inference-steps", "--steps", type=click.IntRange(2), default=60, show_default=True)
@click.option("--iterations", "--runs", type=click.IntRange(2), default=10, show_default=True)
@click.option("--warmup", "--warmups", type=click.IntRange(1), default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(model: Path, quantised: Path | None, only: tuple[str, ...], out: Path, **counts: int) -> None:
    settings = {name: setting for name, setting in SETTINGS.items() if not only or name in (DEFAULTS, *only)}
    defaults = {param.name: param.default for param in click.get_current_context().command.params}
    changed = [f"--{name.replace('_', '-')} {value}" for name, value in counts.items() if value != defaults[name]]
    command = " ".join(["python -m benchmarks.runtime_settings", *changed, *(f"--only '{name}'" for name in only)])
    about = {"command": command, "date": date.today().isoformat(), "machine": environment()}
    try:
        manifest = read_manifest(model)
        for bundle, precision in ((model, "fp32"), (quantised, "int8")):
            if bundle is not None and (actual := read_manifest(bundle).precision) != precision:
                raise InputError(f"{bundle} is in {actual}, and a bundle in {precision} is expected here")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{out} cannot be written ({error}): give a folder of your own") from error
        needed = any(setting.int8 for setting in settings.values())
        with _int8_of(model, quantised if needed else model) as int8, Console(stderr=True).status("") as status:
            options = MeasureOptions(bundle=model, quantised=int8, **counts)
            show = lambda name, done, total: status.update(f"{done} of {total}: {name}")  # noqa: E731
            results, complete = measure_settings(options, settings, show)
        content = {**about, "complete": complete, "model": manifest.model.name, **counts}
        content["results"] = [asdict(result) for result in results]
        for name, text in zip(FILES, (json_text(content), markdown(content)), strict=True):
            with atomic_file(out / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except (InputError, CandidateError) as error:
        raise click.UsageError(str(error)) from error
    click.echo(out / FILES[1])


if __name__ == "__main__":
    main()
