"""The machine that was measured on: what it is, and the most that it was seen to do."""

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("mige-rt", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt", "tensorrt-rtx")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
REPEATS = 7  # of each measurement of a peak, of which the best counts


@dataclass(frozen=True)
class Peaks:
    """flops: floating-point operations (for int8: integer ones) a second of a large matrix product, by precision, where
    the device can do it; bytes: read and written a second by a large copy."""

    device: str
    flops: dict[str, float]
    bytes: float


def environment() -> dict[str, Any]:
    """What results depend on: processor, memory, GPUs, threads, versions, and the commit if in a git checkout."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threads": {name: os.environ.get(name) for name in THREADS},
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpus() -> list[dict[str, str]]:
    names = ("name", "driver_version", "memory.total")
    said = _output(["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"])
    rows = [line.split(", ") for line in (said or "").splitlines()]
    return [dict(zip(("name", "driver", "memory"), row, strict=True)) for row in rows if len(row) == len(names)]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the code that runs, with a + where files were changed since; None outside a checkout."""
    here = ["git", "-C", str(Path(__file__).parent)]
    tracked = _output([*here, "ls-files", "--error-unmatch", Path(__file__).name])
    commit = _output([*here, "rev-parse", "HEAD"]) if tracked else None
    if not commit:
        return None
    return commit.strip() + ("+" if _output([*here, "status", "--porcelain", "--untracked-files=no"]) else "")


def _output(command: Sequence[str]) -> str | None:
    """What a command says; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def measure_peaks(device: str, size: int | None = None) -> Peaks:
    """The best of some large matrix products in each precision, and of some large copies, by PyTorch on all cores, or
    on the GPU. size: of the matrices' sides, where the default is not wanted. Takes seconds."""
    import torch

    cuda = device != "cpu"
    if not cuda and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    wait: Callable[[], None] = (lambda: torch.cuda.synchronize(device)) if cuda else (lambda: None)
    side = size or (8192 if cuda else 2048)
    flops = {}
    for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        flops[precision] = 2 * side**3 / _best(lambda a=a, b=b: torch.mm(a, b), wait)
    whole = torch.randint(-8, 8, (side, side), dtype=torch.int8, device=device)
    with contextlib.suppress(RuntimeError):  # not on this device
        flops["int8"] = 2 * side**3 / _best(lambda: torch.ops.aten._int_mm(whole, whole), wait)
    if not cuda:
        flops["fp32"] = max(flops["fp32"], _numpy_flops(side))
    given = torch.ones((2**31 if cuda else 2**28) // (1 if size is None else 64), dtype=torch.uint8, device=device)
    taken = torch.empty_like(given)
    return Peaks(device, flops, 2 * given.numel() / _best(lambda: taken.copy_(given), wait))


def _numpy_flops(side: int) -> float:
    import numpy as np

    a, b = (np.random.default_rng(i).random((side, side), np.float32) for i in range(2))
    return 2 * side**3 / _best(lambda: np.matmul(a, b), lambda: None)


def _best(work: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Seconds of the fastest of some runs, after one that does not count. Slow ones (above 2 s) are run but twice."""
    seconds = []
    for _ in range(1 + REPEATS):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= 3 and seconds[-1] > 2:
            break
    return min(seconds[1:])
