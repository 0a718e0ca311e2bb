"""CUDA graphs of every kind of run, beside the same runs without them.

The default model is used: what is asked here does not depend on its size.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_stay.card import memory, synchronize
from benchmarks.gpu_stay.record import Record, Stay
from export.inputs import sample_requests
from export.validate import measure
from mige_rt.graphs import GraphName
from mige_rt.pipeline import MigePipeline

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "low memory": {"low_memory": True},
    "compile": {"compile": True},
    "compile, low memory": {"compile": True, "low_memory": True},
}
CASES: dict[str, dict[str, Any]] = {
    "first": {},
    "another seed": {"seed": 2},
    "new length": {"prompt": "remove the thing that stands on the left of the image and paint the wall behind it"},
    "new batch": {"prompt": ["make it blue"] * 3},
    "new number of branches": {"guidance_scale": 3.0, "image_guidance_scale": 1.5},
    "guidance range": {"guidance_range": (0.2, 0.7)},
    "reuse": {"reuse": 0.05},
    "the first again": {},
}
WAITS = ("reuse",)  # which reads a number from the device at every step
LENGTHS = 20
MAX_ERROR = 1e-3  # relative RMS error of the final latents: the same kernels, in another order at most
MAX_GROWTH = 0.01  # of the memory held, when the same lengths come again
PRECISION = "fp16"


def measure_capture(stay: Stay, record: Record) -> None:
    """The matrix of options and cases; then memory over many lengths, and a capture that fails."""
    for name, options in OPTIONS.items():
        pipes: tuple[MigePipeline, MigePipeline] | None = None
        with record.entry(f"{name}: opening"):
            pipes = _open(stay, cuda_graphs=False, **options), _open(stay, cuda_graphs=True, **options)
        if pipes is None:
            continue
        for case in list(CASES)[: 1 if stay.rehearsal and options else None]:
            with record.entry(f"{name}: {case}") as entry:
                entry.update(_compare(stay, *pipes, CASES[case]))
                if case not in WAITS:
                    _run(stay, pipes[1], CASES[case], no_waiting=True)
        with record.entry(f"{name}: a capture that fails") as entry:
            entry.update(_failed_capture(stay, *pipes))
        if not options:
            with record.entry(f"memory over {LENGTHS} lengths, twice") as entry:
                entry.update(_memory_over_lengths(stay, pipes[1]))


def _open(stay: Stay, **options: Any) -> MigePipeline:
    precision = PRECISION if stay.cuda else "fp32"
    return MigePipeline.from_pretrained(engine="pytorch", device=stay.device, precision=precision, **options)


def _run(stay: Stay, pipe: MigePipeline, arguments: Mapping[str, Any], no_waiting: bool = False) -> Any:
    """The final latents. no_waiting: PyTorch raises at a call between two steps that waits for the device."""
    steps = 3 if stay.rehearsal else 12
    latents: Any = None

    def watch(_pipe: MigePipeline, step: int, _timestep: float, values: dict[str, Any]) -> None:
        nonlocal latents
        if step == steps - 1:
            latents = values["latents"] + 0  # a copy: the next run overwrites it
        if no_waiting and stay.cuda:
            torch.cuda.set_sync_debug_mode("error" if step < steps - 1 else "default")

    source = next(request.source for request in sample_requests() if request.task == "edit")
    given = {"prompt": "make it blue", "seed": 1, **arguments}
    try:
        pipe(source=source, num_inference_steps=steps, callback_on_step_end=watch, **given)
    finally:
        if stay.cuda:
            torch.cuda.set_sync_debug_mode("default")
    return torch.as_tensor(latents).float().cpu().numpy()


def _compare(stay: Stay, plain: MigePipeline, captured: MigePipeline, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The captured run, made twice, beside the other: the first captures, the second replays from the first step on."""
    expected = _run(stay, plain, arguments)
    errors = [measure(_run(stay, captured, arguments), expected)[0] for _ in range(2)]
    graphs = getattr(captured, "_cuda_graphs", None)
    return {
        "errors": errors,
        "ok": max(errors) <= MAX_ERROR,
        "graphs_held": None if graphs is None else len(graphs),
        **memory(stay.device),
    }


def _failed_capture(stay: Stay, plain: MigePipeline, captured: MigePipeline) -> dict[str, Any]:
    """The image is the uncaptured one although the capture of its step is made to fail, and so is the next."""
    captured.clear_cache()
    run, failures = captured.engine.run, 0

    def failing(graph: GraphName, inputs: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal failures
        if graph == "denoiser" and stay.cuda and torch.cuda.is_current_stream_capturing():
            failures += 1
            torch.cuda.synchronize()  # which no capture allows
        return run(graph, inputs)

    expected = _run(stay, plain, {})
    captured.engine.run = failing  # type: ignore[method-assign]
    try:
        error = measure(_run(stay, captured, {}), expected)[0]
    finally:
        captured.engine.run = run  # type: ignore[method-assign]
    after = measure(_run(stay, captured, {}), expected)[0]
    torch.rand(1, device=stay.device)  # which a capture that failed must not have made impossible
    failed = failures > 0 or not stay.cuda
    return {"failures": failures, "errors": [error, after], "ok": failed and max(error, after) <= MAX_ERROR}


def _memory_over_lengths(stay: Stay, pipe: MigePipeline) -> dict[str, Any]:
    """GB that are held after each of many lengths of prompt, which then come again and must need no more."""
    lengths = 2 if stay.rehearsal else LENGTHS
    held: list[float] = []
    for number in [*range(lengths)] * 2:
        _run(stay, pipe, {"prompt": " ".join(["make it blue"] * (1 + number))})
        synchronize(stay.device)
        held.append(memory(stay.device).get("reserved_gb", 0.0))
    most = [max(half) for half in np.array_split(held, 2)]
    return {"held_gb": held, "ok": bool(most[1] <= (1 + MAX_GROWTH) * most[0])}
