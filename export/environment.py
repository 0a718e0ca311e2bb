"""The machine and the packages that a measurement was made with."""

import os
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import cpuinfo  # pyright: ignore[reportMissingTypeStubs]
import psutil

PACKAGES = ("mige-rt", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt", "tensorrt-rtx")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GPU_FIELDS = {"name": "name", "driver": "driver_version", "memory": "memory.total"}


def environment() -> dict[str, Any]:
    """What results depend on: processor, memory, GPUs, threads, versions, and the commit if in a git checkout."""
    versions = {package.name: package.version for package in distributions()}
    query = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS.values())}", "--format=csv,noheader")
    gpus = [line.split(", ") for line in query.splitlines()]
    processor: dict[str, Any] = cpuinfo.get_cpu_info()  # pyright: ignore[reportUnknownMemberType]
    return {
        "cpu": processor.get("brand_raw") or platform.machine(),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [dict(zip(GPU_FIELDS, gpu, strict=True)) for gpu in gpus if len(gpu) == len(GPU_FIELDS)],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threads": {name: os.environ.get(name) for name in THREADS},
        "versions": {"python": platform.python_version(), **{p: versions[p] for p in PACKAGES if p in versions}},
        "commit": _commit(),
    }


def cores() -> int | None:
    """How many cores this process may use; None where the system does not say."""
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
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603, ours
        return ran.stdout
    except (OSError, subprocess.SubprocessError):
        return ""
