"""The machine that is measured on: what it is, and the peaks that its roofline is made of."""

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import cpuinfo
import numpy as np
import psutil

PACKAGES = ("mige-rt", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt", "tensorrt-rtx")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GPU_FIELDS = {"name": "name", "driver": "driver_version", "memory": "memory.total"}
REPEATS, SLOW = 7, 2  # of each measurement of a peak, of which the best counts; seconds above which two are enough


@dataclass(frozen=True)
class Peaks:
    """flops: operations a second of a large matrix product, by precision; bytes: moved a second by a large copy."""

    device: str
    flops: dict[str, float]
    bytes: float


def environment() -> dict[str, Any]:
    """What results depend on: processor, memory, GPUs, threads, versions, and the commit if in a git checkout."""
    versions = {package.name: package.version for package in distributions()}
    query = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS.values())}", "--format=csv,noheader")
    gpus = [line.split(", ") for line in query.splitlines()]
    return {
        "cpu": cpuinfo.get_cpu_info().get("brand_raw") or platform.machine(),
        "cores": _cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [dict(zip(GPU_FIELDS, gpu, strict=True)) for gpu in gpus if len(gpu) == len(GPU_FIELDS)],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threads": {name: os.environ.get(name) for name in THREADS},
        "versions": {"python": platform.python_version(), **{p: versions[p] for p in PACKAGES if p in versions}},
        "commit": _commit(),
    }


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _commit() -> str | None:
    """The commit of the code that runs, with a + where files were changed since; None outside a checkout."""
    git = ("git", "-C", str(Path(__file__).parent))
    if not _output(*git, "ls-files", "--error-unmatch", Path(__file__).name):
        return None
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return _output(*git, "rev-parse", "HEAD").strip() + ("+" if changed else "")


def _output(*command: str) -> str:
    """What a command prints; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def measure_peaks(device: str, size: int | None = None) -> Peaks:
    """The best of some large matrix products in each precision and of some large copies, by PyTorch on all cores.

    size: of the matrices' sides, where the default is not wanted.
    """
    import torch

    cuda = device != "cpu"
    if not cuda:
        torch.set_num_threads(_cores() or 1)
    synchronize: Callable[[], None] = (lambda: torch.cuda.synchronize(device)) if cuda else (lambda: None)
    side = size or (8192 if cuda else 2048)
    flops = {}
    for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        a = torch.randn(side, side, device=device).to(dtype)
        flops[precision] = 2 * side**3 / _best(lambda a=a: torch.mm(a, a), synchronize)
    integers = torch.randint(-8, 8, (side, side), dtype=torch.int8, device=device)
    with contextlib.suppress(RuntimeError):  # not on this device
        flops["int8"] = 2 * side**3 / _best(lambda: torch.ops.aten._int_mm(integers, integers), synchronize)
    if not cuda:
        x = np.random.default_rng(0).random((side, side), np.float32)
        flops["fp32"] = max(flops["fp32"], 2 * side**3 / _best(lambda: np.matmul(x, x), synchronize))
    source = torch.ones((2**31 if cuda else 2**28) // (1 if size is None else 64), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Peaks(device, flops, 2 * source.numel() / _best(lambda: target.copy_(source), synchronize))


def _best(work: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """Seconds of the fastest of some runs, after one that does not count."""
    seconds = []
    for _ in range(1 + REPEATS):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= 3 and seconds[-1] > SLOW:
            break
    return min(seconds[1:])
