"""`python -m benchmarks.runtime_settings`: what ONNX Runtime's settings for CPUs are worth, one edit a picture.

Each variant has a process of its own, so that its memory and its threads are its own, and they take turns. Writes
runtime-settings.json and runtime-settings.md.
"""
# The processes import this module, too, and are to have the memory of one that makes pictures: so what imports PyTorch
# is imported in functions.

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.machine import environment
from benchmarks.measure import CONFIDENCE, Latency, Ratio, Turns, ratio
from benchmarks.runtime_variants import DEFAULTS, VARIANTS, Variant, make_picture, open_variant
from mige_rt.bundle import DEFAULT_MODEL, read_manifest
from mige_rt.errors import InputError
from mige_rt.requests import ResolvedRequest, read_requests
from trainer.evaluate.metrics import psnr

REQUEST = "3-recolour"  # an edit with one reference, of the samples
FILES = ("runtime-settings.json", "runtime-settings.md")


@dataclass(frozen=True)
class Row:
    """One variant. gain: how many times as fast as the defaults. psnr: of its picture against the defaults', dB; None
    where nothing differs. ok: it is within the tolerance of its precision, or else the row does not count."""

    name: str
    variant: Variant
    seconds: Latency
    gain: Ratio | None  # None of the defaults themselves
    peak_bytes: int | None
    psnr: float | None
    ok: bool


def measure_settings(
    bundle: Path,
    quantised: Path,
    request: ResolvedRequest,
    variants: Mapping[str, Variant],
    steps: int,
    runs: int,
    warmups: int,
    on_run: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> tuple[list[Row], bool]:
    """A row for each variant, DEFAULTS first among them, and whether all runs were made: Ctrl-C keeps whole rounds if
    there are two.

    bundle and quantised: of one model, in fp32 and in int8. Raises InputError when one cannot be run.
    """
    seen: dict[str, tuple[NDArray[np.uint8], int | None]] = {}
    complete = True
    with ExitStack() as stack:

        def make(name: str, process: ProcessPoolExecutor) -> float:
            seconds, picture, peak = process.submit(make_picture, request, steps).result()
            seen[name] = picture, peak
            return seconds

        candidates = {}
        for name, variant in variants.items():
            opened = (quantised if variant.int8 else bundle, variant)
            process = ProcessPoolExecutor(1, get_context("spawn"), open_variant, opened)
            candidates[name] = partial(make, name, stack.enter_context(process))
        turns = Turns(candidates, ())
        try:
            turns.run(runs, warmups, on_run)
        except KeyboardInterrupt:
            complete = False
            if min(map(len, turns.seconds.values())) < 2:
                raise
    from export.validate import MIN_PSNR

    base, base_seconds = seen[DEFAULTS][0], turns.seconds[DEFAULTS]
    rows = []
    for name, variant in variants.items():
        picture, peak = seen[name]
        found = psnr(picture, base)
        same, ok = np.array_equal(picture, base), found >= MIN_PSNR["int8" if variant.int8 else "fp32"]
        gain = None if name == DEFAULTS else ratio(base_seconds, turns.seconds[name])
        rows.append(Row(name, variant, Latency.of(turns.seconds[name]), gain, peak, None if same else found, ok))
    return rows, complete


def markdown(content: Mapping[str, Any], rows: list[Row]) -> str:
    machine = content["machine"]
    lines = [
        "# ONNX Runtime's settings on a CPU",
        "",
        f"`{content['command']}`, {content['date']}: {machine['cores']} cores of {machine['cpu']}, ONNX Runtime "
        f"{machine['versions']['onnxruntime']}"
        + ("." if content["complete"] else "; **incomplete: it was interrupted**."),
        "",
        f"One edit of the model {content['model']} with one reference and {content['steps']} steps at the published "
        "guidance scales, in a process for "
        f"each variant. They took turns, {content['warmups']} rounds to warm up and {content['runs']} measured. A gain "
        "is how many times as fast as the defaults it is, the median over rounds, in brackets its "
        f"{CONFIDENCE:.0%} interval; where that spans 1, no difference was shown. Memory is the most that the process "
        "had resident. PSNR is that of the picture against the defaults'.",
        "",
        "| variant | seconds | p10 to p90 | gain | | memory, MB | PSNR |",
        "| --- | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    for row in rows:
        gain = verdict = ""
        if row.gain is not None:
            gain = f"{row.gain.value:.2f} ({row.gain.low:.2f} to {row.gain.high:.2f})"
            verdict = row.gain.verdict if row.ok else "does not count"
        memory = "?" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        picture = "no difference" if row.psnr is None else f"{row.psnr:.1f} dB"
        took = f"{row.seconds.median:.3f} | {row.seconds.p10:.3f} to {row.seconds.p90:.3f}"
        lines.append(f"| {row.name} | {took} | {gain} | {verdict} | {memory} | {picture} |")
    return "\n".join(lines) + "\n"


@contextmanager
def _int8_of(bundle: Path, given: Path | None) -> Iterator[Path]:
    """The quantised bundle that was given, or one made of `bundle` for the time being."""
    if given is not None:
        yield given
        return
    from export.exporter import ExportLimits, ExportOptions, export_bundle

    with tempfile.TemporaryDirectory(prefix="runtime-settings-") as scratch:
        export_bundle(
            str(bundle), Path(scratch) / "int8", "int8", ExportLimits(1, 4), options=ExportOptions(validate=False)
        )
        yield Path(scratch) / "int8"


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=DEFAULT_MODEL,
    help="a bundle in fp32  [default: the one with mige-rt]",
)
@click.option("--int8", "quantised", type=click.Path(path_type=Path), help="the same in int8  [default: exported]")
@click.option("--only", type=click.Choice(list(VARIANTS)), multiple=True, help="a variant; may be repeated")
@click.option("--steps", type=click.IntRange(2), default=60, show_default=True, help="of the solver")
@click.option("--runs", type=click.IntRange(2), default=10, show_default=True)
@click.option("--warmups", type=click.IntRange(1), default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(
    model: Path, quantised: Path | None, only: tuple[str, ...], steps: int, runs: int, warmups: int, out: Path
) -> None:
    from export.inputs import SAMPLES

    console = Console(stderr=True)
    request = read_requests(SAMPLES / "requests.jsonl")[REQUEST]
    variants = {name: v for name, v in VARIANTS.items() if not only or name in (DEFAULTS, *only)}
    command = "python -m benchmarks.runtime_settings"
    for name, value, default in (("steps", steps, 60), ("runs", runs, 10), ("warmups", warmups, 3)):
        command += f" --{name} {value}" if value != default else ""
    command += "".join(f" --only '{name}'" for name in only)
    try:
        manifest = read_manifest(model)
        for bundle, precision in ((model, "fp32"), (quantised, "int8")):
            if bundle is not None and (found := read_manifest(bundle).precision) != precision:
                raise InputError(f"{bundle} is in {found}, and a bundle in {precision} is expected here")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{out} cannot be written ({error}): give a folder of your own") from error
        needed = any(variant.int8 for variant in variants.values())
        with _int8_of(model, quantised if needed else model) as int8, console.status("") as status:
            rows, complete = measure_settings(
                model,
                int8,
                request,
                variants,
                steps,
                runs,
                warmups,
                lambda name, k, n: status.update(f"{k} of {n}: {name}"),
            )
    except InputError as error:
        raise click.UsageError(str(error)) from error
    content = {
        "command": command,
        "date": date.today().isoformat(),
        "complete": complete,
        "machine": environment(),
        "model": manifest.model.name,
        "steps": steps,
        "runs": runs,
        "warmups": warmups,
        "variants": [asdict(row) for row in rows],
    }
    for name, text in zip(FILES, (json.dumps(content, indent=1) + "\n", markdown(content, rows)), strict=True):
        part = out / f".{name}.{os.getpid()}"
        part.write_text(text, encoding="utf-8")
        os.replace(part, out / name)
    click.echo(out / FILES[1])


if __name__ == "__main__":
    main()
