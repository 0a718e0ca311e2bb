"""TensorRT and TensorRT for RTX: two modules with one interface, imported where they are used.

What only one of them has is looked up by name where it is used, with a comment.
"""

import dataclasses
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.device import parse_device
from engines.plans import PRODUCTS, Machine, PlanEngine, misfit, read_plans, stale
from mige_rt.bundle import Manifest
from mige_rt.errors import InputError, NotAvailableError

if TYPE_CHECKING:
    from tensorrt_rtx import ILogger

_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|bad_alloc|MemoryError|could not be allocated|cannot allocate|insufficient (device )?memory"
    r"|memory is insufficient|insufficient workspace|MemoryAllocation|failed to map segment",
    re.IGNORECASE,
)


def import_runtime(engine: PlanEngine):  # noqa: ANN201, a module's type cannot be written: it is inferred
    """The engine's module. Raises NotAvailableError, with the command that installs it, when it is not here."""
    try:
        if engine == "tensorrt":
            import tensorrt as trt  # pyright: ignore[reportMissingModuleSource]
        else:
            import tensorrt_rtx as trt
    except (ImportError, OSError) as error:  # OSError: a library that the module loads is missing
        raise NotAvailableError(
            f"the engine {engine} needs {PRODUCTS[engine]}, which cannot be imported here ({error}); "
            f"install it with: pip install 'mige-rt[{engine}]'"
        ) from error
    return trt


def make_logger(engine: PlanEngine, on_detail: Callable[[str], None] = lambda message: None):  # noqa: ANN201, its base class is only known where it is made
    """A logger for the runtime that keeps its last warnings and errors: `.lines`, and `.summary()` as one sentence.

    It must be kept for as long as what was made with it. on_detail: gets every message, also the finest.
    """
    trt = import_runtime(engine)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()  # pybind11 wants it
            self.lines: deque[str] = deque(maxlen=20)

        def log(self, severity: "ILogger.Severity", msg: str) -> None:
            on_detail(msg)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR, trt.ILogger.WARNING):
                self.lines.append(f"{severity.name}: {msg}" if severity != trt.ILogger.WARNING else msg)

        def summary(self) -> str:
            errors = [line.partition(": ")[2] for line in self.lines if line.startswith(("ERROR", "INTERNAL_ERROR"))]
            return "; ".join(errors[-3:]) or "it gave no reason"

    return Logger()


def is_out_of_memory(text: str) -> bool:
    """Whether the runtime's words mean that memory, the GPU's or the machine's, ran out."""
    return _OUT_OF_MEMORY.search(text) is not None


def capabilities(engine: PlanEngine) -> list[str]:
    """The compute capabilities that the runtime can build for without such a GPU, as 8.9; TensorRT for RTX only."""
    names = getattr(import_runtime(engine), "ComputeCapability").__members__  # noqa: B009, TensorRT does not have it
    return [f"{name[2:-1]}.{name[-1]}" for name in names if re.fullmatch(r"SM\d+", name)]


def find_machine(engine: PlanEngine, device: str = "auto") -> Machine:
    """This machine's GPU, and the installed runtime. device: auto, cuda or cuda:N.

    Raises NotAvailableError when the runtime or PyTorch is not here, or there is no such GPU.
    """
    trt = import_runtime(engine)
    index = find_device(engine, device)
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return Machine(engine, trt.__version__, torch.cuda.get_device_name(index), f"{major}.{minor}")


def find_device(engine: PlanEngine, device: str) -> int:
    """The index of the GPU that `device` (auto, cuda, cuda:N) names. Raises NotAvailableError when it is not there."""
    try:
        import torch
    except ImportError as error:
        raise NotAvailableError(
            f"the engine {engine} needs PyTorch ({error}); install it with: pip install 'mige-rt[{engine}]'"
        ) from error
    try:
        name = parse_device(device)
    except InputError:
        name = None
    if name is None or name.kind == "cpu":
        raise NotAvailableError(
            f"the engine {engine} runs on a GPU, not on {device!r}; expected --device cuda or cuda:N"
        )
    if (name.index or 0) >= torch.cuda.device_count():
        raise NotAvailableError(
            f"the engine {engine} needs an NVIDIA GPU, and PyTorch sees {torch.cuda.device_count()} here: check the "
            "driver with nvidia-smi and that PyTorch is a CUDA build, or use --engine onnxruntime"
        )
    return torch.cuda.current_device() if name.index is None else name.index


def describe_plans(bundle: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """A bundle's plans as plain data, and under `misfit` why they are not to be used here (None: they fit).

    Raises:
        InputError: A sidecar is damaged.
    """
    descriptions: list[dict[str, Any]] = []
    for plans in read_plans(bundle):
        reason = stale(plans, manifest)
        if reason is None:
            try:
                reason = misfit(plans, manifest, find_machine(plans.target.engine, "auto"))
            except NotAvailableError as error:
                reason = str(error)
        size = sum(entry.plan.bytes for entry in plans.graphs.values())
        descriptions.append(
            {"name": plans.folder.name, **dataclasses.asdict(plans.target), "bytes": size, "misfit": reason}
        )
    return descriptions
