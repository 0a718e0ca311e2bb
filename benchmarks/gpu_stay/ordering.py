"""Whether an engine on a stream of its own waits for PyTorch's kernels, and they for it."""

import contextlib
from typing import Any

import torch

from benchmarks.gpu_stay.card import synchronize
from benchmarks.gpu_stay.record import Record, Stay
from engines.factory import ENGINES, open_engine
from engines.interface import Engine, EngineOptions
from export.inputs import random_feed
from mige_rt.bundle import DEFAULT_MODEL, open_model, read_config
from mige_rt.errors import NotAvailableError

CYCLES = 100_000_000  # of the GPU's clock: about 50 ms, in which a kernel that does not wait is long done
REPEATS = 5


def measure_ordering(stay: Stay, record: Record) -> None:
    """Every engine that is here, on the default stream and on another one."""
    for name in ENGINES:
        with record.entry(name) as entry:
            try:
                engine = open_engine(open_model(DEFAULT_MODEL), name, EngineOptions(device=stay.device))
            except NotAvailableError as error:
                entry["skipped"] = str(error)
                continue
            entry["device"] = engine.device
            errors = {"default": _largest_error(stay, engine, contextlib.nullcontext())}
            if stay.cuda:
                stream = torch.cuda.Stream(stay.device)
                errors["another"] = _largest_error(stay, engine, torch.cuda.stream(stream))
            entry.update({"largest_error": errors, "ok": max(errors.values()) < 1e-2})


def _largest_error(stay: Stay, engine: Engine, stream: Any) -> float:
    """Inputs are written late and overwritten at once; the output must be that of the inputs in between."""
    sizes = {"R": 2, "L": 20, "h": 16, "w": 16}
    feed = random_feed("denoiser", read_config(DEFAULT_MODEL), sizes)
    inputs = {name: engine.array(values.copy()) for name, values in feed.items()}
    tensors: dict[str, torch.Tensor] = {name: torch.as_tensor(values) for name, values in inputs.items()}
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = torch.as_tensor(engine.run("denoiser", inputs)["prediction"]).clone()
    largest = 0.0
    for _ in range(REPEATS):
        for tensor in tensors.values():
            tensor.zero_()
        synchronize(stay.device)
        with stream:
            if stay.cuda:
                torch.cuda._sleep(CYCLES)
            for name, tensor in tensors.items():
                tensor.copy_(given[name])
            output = torch.as_tensor(engine.run("denoiser", inputs)["prediction"]).clone()
            for tensor in tensors.values():
                tensor.zero_()
        synchronize(stay.device)
        largest = max(largest, float((output - expected).abs().max()))
    return largest
