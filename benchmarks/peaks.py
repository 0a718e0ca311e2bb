"""The peaks of the machine, which rooflines are made of."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.environment import cores


@dataclass(frozen=True)
class Peaks:
    """flops: operations a second of a large matrix product, by precision; bytes: moved a second by a large copy."""

    device: str
    flops: dict[str, float]
    bytes: float


def measure_peaks(device: str, size: int | None = None) -> Peaks:
    """The best of large matrix products (sides of `size`) in each precision and of large copies, on all cores."""
    import torch
    from torch.utils.benchmark import Timer

    def best(work: Callable[[], Any]) -> float:
        """Seconds of the fastest run."""
        timer = Timer("work()", globals={"work": work}, num_threads=cores() or 1)
        return min(timer.blocked_autorange(min_run_time=0.5).times)

    cuda = device != "cpu"
    side = size or (8192 if cuda else 2048)
    operations, flops = 2 * side**3, {}
    for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        a = torch.randn(side, side, device=device).to(dtype)
        flops[precision] = operations / best(lambda a=a: torch.mm(a, a))
    integers = torch.randint(-8, 8, (side, side), dtype=torch.int8, device=device)
    with contextlib.suppress(RuntimeError):  # not on this device
        flops["int8"] = operations / best(lambda: torch.ops.aten._int_mm(integers, integers))
    if not cuda:
        x = np.random.default_rng(0).random((side, side), np.float32)
        flops["fp32"] = max(flops["fp32"], operations / best(lambda: np.matmul(x, x)))
    source = torch.ones((2**31 if cuda else 2**28) // (1 if size is None else 64), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Peaks(device, flops, 2 * source.numel() / best(lambda: target.copy_(source)))
