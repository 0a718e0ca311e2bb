"""Which engine opens a model: the one that is named, or the fastest that works here."""

import ctypes
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from engines.interface import Engine, EngineOptions
from engines.plans import PLAN_ENGINES, PlanEngine, UntrustedError
from mige_rt.bundle import OpenedModel
from mige_rt.errors import InputError, NotAvailableError

if TYPE_CHECKING:
    from engines.onnx_runtime import OnnxRuntimeEngine

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """What opens an engine, and the command that installs what it needs."""

    open: Callable[[OpenedModel, EngineOptions], Engine]
    install: str


def _onnxruntime(model: OpenedModel, options: EngineOptions) -> Engine:
    from engines.onnx_runtime import OnnxRuntimeEngine

    return OnnxRuntimeEngine.open(model, options)


def _pytorch(model: OpenedModel, options: EngineOptions) -> Engine:
    from engines.pytorch import PyTorchEngine

    return PyTorchEngine.open(model, options)


def _plan_engine(name: PlanEngine) -> Callable[[OpenedModel, EngineOptions], Engine]:
    def open_plans(model: OpenedModel, options: EngineOptions) -> Engine:
        from engines.tensorrt import TensorRTEngine

        return TensorRTEngine.open(model, options, name)

    return open_plans


_ENTRIES: dict[str, _Entry] = {
    "tensorrt": _Entry(_plan_engine("tensorrt"), "pip install 'mige-rt[tensorrt]'"),
    "tensorrt-rtx": _Entry(_plan_engine("tensorrt-rtx"), "pip install 'mige-rt[tensorrt-rtx]'"),
    "onnxruntime": _Entry(_onnxruntime, "pip install mige-rt"),
    "pytorch": _Entry(_pytorch, "pip install 'mige-rt[torch]'"),
}
ENGINES = tuple(_ENTRIES)

# In the order that `auto` tries them, the fastest first. ONNX Runtime's graphs have no fused attention, which costs
# more on a GPU than on a CPU; there, on the other hand, it runs a batch in parts.
FASTEST_ON_CUDA = (*PLAN_ENGINES, "pytorch", "onnxruntime")
FASTEST_ON_CPU = ("onnxruntime", "pytorch")


def open_engine(model: OpenedModel, engine: str, options: EngineOptions) -> Engine:
    """Open a bundle or a model folder with an engine.

    Args:
        model: What to open.
        engine: Its name; auto: the fastest that works here, on a GPU if there is one and the device is not cpu.
        options: How. Only the engine pytorch compiles, and takes a choice of attention.

    Raises:
        NotAvailableError: The engine, the device or the precision is not to be had here.
        InputError: The model cannot be used.
    """
    for meant, what in ((options.compile, "torch.compile"), (options.attention != "auto", "--attention")):
        if meant and engine not in ("auto", "pytorch"):
            raise InputError(f"{what} is for the engine pytorch, and {engine} was given")
    if engine == "auto":
        return _open_fastest(model, options)
    if engine not in _ENTRIES:
        raise NotAvailableError(f"there is no engine {engine!r}; expected auto or one of {', '.join(ENGINES)}")
    return _open(model, engine, options)


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is installed; says nothing of what it can do."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _open_fastest(model: OpenedModel, options: EngineOptions) -> Engine:
    # Looking for a GPU means importing torch, which takes seconds; without a driver there is none.
    devices = ["cuda", "cpu"] if options.device == "auto" and has_nvidia_driver() else [options.device]
    reasons: list[str] = []
    for device in devices:
        fastest = FASTEST_ON_CPU if device in ("auto", "cpu") else FASTEST_ON_CUDA
        for name in ("pytorch",) if options.compile or options.attention != "auto" else fastest:
            try:
                return _open(model, name, replace(options, device="cpu" if device == "auto" else device))
            except InputError as error:
                if isinstance(error, UntrustedError):
                    _log.warning("%s", error)
                if name in PLAN_ENGINES:  # that nobody built plans is no mistake, and damaged ones are no obstacle
                    continue
                if not isinstance(error, NotAvailableError):
                    raise
                reasons.append(f"  {name} on {device}: {error}")
    raise NotAvailableError("\n".join([f"no engine here can run {model.folder}:", *reasons]))


def _open(model: OpenedModel, engine: str, options: EngineOptions) -> Engine:
    from engines.trial import admit

    entry = _ENTRIES[engine]
    if model.manifest is None and engine != "pytorch":
        plans = f"--engine {engine} " if engine in PLAN_ENGINES else ""
        raise NotAvailableError(
            f"{model.folder} is a model folder, which only the engine pytorch runs; make a bundle of it with: "
            f"mige-rt export --ckpt {model.folder} {plans}--out BUNDLE"
        )
    if model.manifest is not None and engine != "pytorch":
        _check_precision(model.folder, model.manifest.precision, options.precision)
    try:
        opened = entry.open(model, options)
    except ImportError as error:
        raise NotAvailableError(
            f"the engine {engine} needs a package that is not here ({error}); install it with: {entry.install}"
        ) from error
    admit(model, opened, trust=options.trust)
    if engine == "onnxruntime":  # not when it is opened: no runtime is to see a graph before it is admitted
        cast("OnnxRuntimeEngine", opened).check_device()
    return opened


def _check_precision(bundle: Path, precision: str, requested: str) -> None:
    if requested not in ("auto", precision):
        raise NotAvailableError(
            f"{bundle} was exported in {precision}, and {requested} was asked for: leave --precision out, or export a "
            f"bundle with --precision {requested}"
        )
