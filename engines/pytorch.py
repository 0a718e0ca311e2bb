"""The PyTorch engine: the model's own modules, on the CPU or on CUDA."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from engines.interface import GRAPHS, Array, Precision
from mige_rt.errors import InputError
from trainer.checkpoint import load_model

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class PyTorchEngine:
    """Takes and gives NumPy arrays on the CPU, without copies, and torch tensors on CUDA."""

    name = "pytorch"

    def __init__(self, folder: Path, device: str = "cpu", precision: Precision = "fp32") -> None:
        """Open a model folder.

        Raises InputError when the folder is no model folder, the device is not there, or the precision is not one of
        this engine's.
        """
        if precision not in _DTYPES:
            raise InputError(f"the pytorch engine has no precision {precision!r}; expected one of {', '.join(_DTYPES)}")
        if device != "cpu" and not (device.split(":")[0] == "cuda" and torch.cuda.is_available()):
            raise InputError(f"there is no device {device!r} for PyTorch here; use --device cpu")
        self.device = device
        self.model = load_model(folder, dtype=_DTYPES[precision], device=device).eval()

    def array(self, values: NDArray[Any]) -> Array:
        return values if self.device == "cpu" else torch.from_numpy(values).to(self.device)

    @torch.inference_mode()
    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        ports = GRAPHS[graph].inputs
        on_cpu = self.device == "cpu"
        tensors = [torch.as_tensor(inputs[port.name]) for port in ports]
        outputs = getattr(self.model, graph)(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        names = [port.name for port in GRAPHS[graph].outputs]
        return {n: (o.numpy() if on_cpu else o) for n, o in zip(names, outputs, strict=True)}
