"""What is asked of the device: times, memory and captured graphs. In a rehearsal the CPU answers, without capturing."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer

WARM_UPS = 3  # before a capture, as PyTorch's notes on CUDA graphs advise


def timing(work: Callable[[], Any], seconds: float = 0.5) -> dict[str, float]:
    """Milliseconds of a call: the median and the range in which half of all are, over about `seconds`."""
    measured = Timer("work()", globals={"work": work}).blocked_autorange(min_run_time=seconds)
    return {"ms": 1000 * measured.median, "iqr_ms": 1000 * measured.iqr}


def capture(work: Callable[[], Any], device: str) -> Callable[[], Any]:
    """`work` as a CUDA graph, replayed by each call; on the CPU `work` itself."""
    if device == "cpu":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def memory(device: str, reset: bool = False) -> dict[str, float]:
    """GB that PyTorch's tensors and its allocator hold, and the most that they held; empty on the CPU.

    reset: afterwards, the most counts from now on.
    """
    if device == "cpu":
        return {}
    values = {
        "allocated_gb": torch.cuda.memory_allocated(device) / 1e9,
        "reserved_gb": torch.cuda.memory_reserved(device) / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
    }
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return values


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize(device)
