"""Which engine opens a folder: the one that is named, or the fastest that works here."""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engines.interface import Engine, Precision
from engines.plans import PLAN_ENGINES, PlanEngine
from mige_rt.bundle import is_bundle
from mige_rt.errors import InputError, NotAvailableError

Asked = Precision | Literal["auto"]


@dataclass(frozen=True)
class Options:
    """low_memory: load a graph when it is first run. compile: put PyTorch's denoiser through torch.compile."""

    low_memory: bool = False
    compile: bool = False


def _onnxruntime(folder: Path, device: str, precision: Asked, options: Options) -> Engine:
    if not is_bundle(folder):
        raise NotAvailableError(
            f"{folder} is a model folder, which only the engine pytorch runs; make a bundle of it with: "
            f"mige-rt export --ckpt {folder} --out BUNDLE"
        )
    from engines.onnx_runtime import OnnxRuntimeEngine

    return OnnxRuntimeEngine.open(folder, device, precision)


def _pytorch(folder: Path, device: str, precision: Asked, options: Options) -> Engine:
    from engines.pytorch import PyTorchEngine

    return PyTorchEngine.open(folder, device, precision, options.low_memory, options.compile)


def _tensorrt(name: PlanEngine) -> Callable[[Path, str, Asked, Options], Engine]:
    def open_plans(folder: Path, device: str, precision: Asked, options: Options) -> Engine:
        if not is_bundle(folder):
            raise NotAvailableError(
                f"{folder} is a model folder, which only the engine pytorch runs; make a bundle with plans of it with: "
                f"mige-rt export --ckpt {folder} --engine {name} --out BUNDLE"
            )
        from engines.tensorrt import TensorRTEngine

        return TensorRTEngine.open(folder, device, precision, name, options.low_memory)

    return open_plans


# In the order that `auto` tries them on one device, the fastest first.
_OPENERS: dict[str, tuple[Callable[[Path, str, Asked, Options], Engine], str]] = {
    "tensorrt": (_tensorrt("tensorrt"), "pip install 'mige-rt[tensorrt]'"),
    "tensorrt-rtx": (_tensorrt("tensorrt-rtx"), "pip install 'mige-rt[tensorrt-rtx]'"),
    "onnxruntime": (_onnxruntime, "pip install mige-rt"),
    "pytorch": (_pytorch, "pip install 'mige-rt[torch]'"),
}
ENGINES = tuple(_OPENERS)


def open_engine(
    folder: Path, engine: str, device: str, precision: Asked, low_memory: bool = False, compile: bool = False
) -> Engine:
    """Open a bundle or a model folder with the named engine.

    auto: the fastest that works here, on a GPU if there is one and the device is not cpu.
    low_memory, compile: see `Options`; only the engine pytorch compiles.
    Raises NotAvailableError when the engine, the device or the precision is not to be had here; InputError when the
    folder cannot be used.
    """
    options = Options(low_memory, compile)
    if compile and engine not in ("auto", "pytorch"):
        raise InputError(f"torch.compile is for the engine pytorch, and {engine} was given")
    if engine != "auto":
        if engine not in _OPENERS:
            raise NotAvailableError(f"there is no engine {engine!r}; expected auto or one of {', '.join(ENGINES)}")
        return _open(folder, engine, device, precision, options)
    # Looking for a GPU means importing torch, which takes seconds; without a driver there is none.
    devices = ["cuda", "cpu"] if device == "auto" and has_nvidia_driver() else [device]
    errors: dict[str, str] = {}
    for where in devices:
        for name in ("pytorch",) if compile else ENGINES:
            if name in PLAN_ENGINES and where in ("auto", "cpu"):
                continue
            try:
                return _open(folder, name, "cpu" if where == "auto" else where, precision, options)
            except InputError as error:
                if name in PLAN_ENGINES:  # that nobody built plans is no mistake, and damaged ones are no obstacle
                    continue
                if not isinstance(error, NotAvailableError):
                    raise
                errors[f"{name} on {where}"] = str(error)
    said = "\n".join(f"  {what}: {why}" for what, why in errors.items())
    raise NotAvailableError(f"no engine here can run {folder}:\n{said}")


def _open(folder: Path, engine: str, device: str, precision: Asked, options: Options) -> Engine:
    opener, install = _OPENERS[engine]
    try:
        return opener(folder, device, precision, options)
    except ImportError as error:
        raise NotAvailableError(
            f"the engine {engine} needs a package that is not here ({error}); install it with: {install}"
        ) from error


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is installed; says nothing of what it can do."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
