"""Measure in one stay on a GPU what only a GPU can show: `python -m benchmarks.gpu_stay --minutes 25 --out DIR`.

The parts run one after another, each in a process of its own with a share of the time that is left, and write their
results to DIR/PART.json as soon as they have them. A part that fails, crashes or runs out of its time does not stop the
others. The exit code is 1 where one did.

Needs mige-rt's own packages and PyTorch; parts that run the whole model need transformers and diffusers, and are left
out where these are missing. Downloads nothing.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

# The parts in their order, and their shares of the time.
PARTS = {
    "machine": 1.0,  # the card, the packages and the card's peaks
    "tests": 5.0,  # tests/gpu
    "capture": 4.0,  # CUDA graphs of every kind of run beside uncaptured ones
    "serving": 1.0,  # the server's steps, whose images come and go
    "ordering": 1.0,  # engines' streams beside PyTorch's
    "denoiser": 6.0,  # the full-size denoiser, by mode, attention backend, mask and batch
    "matrices": 1.0,  # its matrix products in bf16 and fp8: the least that a step takes
    "image": 4.0,  # a full-size image by CUDA graph, with and without low memory
    "published": 3.0,  # as published beside ours
}
LOG_LINES = 30  # of a part's own output that are kept


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=25.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="folder for the results")
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:1; cpu with --rehearsal alone")
@click.option("--rehearsal", is_flag=True, help="tiny sizes, to try the program itself where there is no GPU")
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, help="may be repeated  [default: all]")
def main(minutes: float, out: Path, device: str, rehearsal: bool, parts: tuple[str, ...]) -> None:
    if device == "cpu" and not rehearsal:
        raise click.UsageError("--device cpu is for --rehearsal: the full sizes would take a day there")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    chosen = [part for part in PARTS if part in (parts or PARTS)]
    outcomes: dict[str, Any] = {}
    for number, part in enumerate(chosen):
        remaining = sum(PARTS[other] for other in chosen[number:])
        limit = max(end - time.monotonic(), 0) * PARTS[part] / remaining  # what a part leaves over is the others'
        job = {"part": part, "out": str(out.absolute()), "device": device, "rehearsal": rehearsal}
        command = (sys.executable, "-m", "benchmarks.gpu_stay.part", json.dumps(job))
        outcomes[part] = supervise(command, out / f"{part}.json", limit, _environment(rehearsal))
        (out / "summary.json").write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
        click.echo(f"{part}: {outcomes[part]['status']} after {outcomes[part]['seconds']} s")
    if any(outcome["status"] not in ("ok", "skipped") for outcome in outcomes.values()):
        sys.exit(1)


def supervise(command: Sequence[str], results: Path, limit: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a part's process for at most `limit` seconds, and complete its file of results, whatever it comes to.

    Returns:
        status: ok, failed, skipped, timed out or crashed; seconds that it took; reason, where there is one.
    """
    results.unlink(missing_ok=True)
    log, started = results.with_suffix(".log"), time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        # In a session of its own, so that what it has started is ended with it.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    content: dict[str, Any] = {"results": []}
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(results.read_text(encoding="utf-8"))
    if code is None:
        content |= {"status": "timed out", "reason": f"it had {limit:.0f} s"}
    elif code or "status" not in content:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        content |= {"status": "crashed", "reason": f"exit code {code}", "log": lines}
    content["seconds"] = round(time.monotonic() - started, 1)
    results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return {key: content[key] for key in ("status", "seconds", "reason") if key in content}


def _environment(rehearsal: bool) -> dict[str, str]:
    """A part's variables: it imports this package wherever it is started; a rehearsal compiles nothing."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    quick = {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"} if rehearsal else {}
    return {**os.environ, "PYTHONPATH": path, **quick}


if __name__ == "__main__":
    main()
