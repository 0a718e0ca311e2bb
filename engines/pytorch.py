"""The PyTorch engine: the model's own modules, on the CPU or on CUDA."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from engines.interface import GRAPHS, Array, Precision, Range
from mige_rt.errors import InputError, NotAvailableError
from trainer.checkpoints.model_folder import load_model
from trainer.checkpoints.weights import empty_model
from trainer.model.mige import Mige

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

CAPTURES = 4  # CUDA graphs, each of which holds the activations of one shape

# Handed from graph to graph in the engine's own precision, unlike the rest.
_INNER = {"image_tokens", "text_states", "cross_kv"}


class PyTorchEngine:
    """Takes and gives NumPy arrays on the CPU (without copies if the precision is fp32), torch tensors on CUDA."""

    name = "pytorch"
    limits: Mapping[str, Range] = MappingProxyType({})

    def __init__(
        self, model: Mige, device: str = "cpu", precision: Precision = "fp32", folder: Path | None = None
    ) -> None:
        """model is on the device and of the precision already. folder: where graphs that are released are loaded from
        again; without one, nothing is released."""
        self.model = model.eval()
        self.device = device
        self.precision = precision
        self.folder = folder
        self.captures = 0 if device == "cpu" else CAPTURES
        self.compiled = False
        self._released: set[str] = set()

    @classmethod
    def open(
        cls,
        folder: Path,
        device: str = "cpu",
        precision: Precision | Literal["auto"] = "fp32",
        low_memory: bool = False,
        compile: bool = False,
    ) -> "PyTorchEngine":
        """Open a model folder or a bundle. device auto: cuda where there is one; precision auto: fp32 on the CPU, bf16
        on CUDA. low_memory: a graph is loaded when it is first run. compile: the denoiser goes through torch.compile.

        Raises InputError when the folder is no model folder, the device is not there, or the precision is not one of
        this engine's.
        """
        device = _device(device)
        if precision == "auto":
            precision = "fp32" if device == "cpu" else "bf16"
        if precision not in _DTYPES:
            raise NotAvailableError(
                f"the pytorch engine has no precision {precision!r}; expected one of {', '.join(_DTYPES)}"
            )
        if precision == "fp32" and device != "cpu":
            torch.backends.cudnn.allow_tf32 = False  # whose 10 bits are not what fp32 promises
        first = {"vae_encoder"} if low_memory else set(GRAPHS)
        engine = cls(load_model(folder, _DTYPES[precision], device, first), device, precision, folder)
        engine._released = set(GRAPHS) - first
        engine.compiled = compile
        if compile and not low_memory:
            engine.model.denoiser.compile()
        return engine

    def array(self, values: NDArray[Any]) -> Array:
        return values if self.device == "cpu" else torch.from_numpy(values).to(self.device)

    @torch.inference_mode()
    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self._load(graph)
        tensors = []
        for port in GRAPHS[graph].inputs:
            tensor = torch.as_tensor(inputs[port.name])
            tensors.append(tensor.to(_DTYPES[self.precision]) if port.name in _INNER else tensor)
        outputs = getattr(self.model, graph)(*tensors)
        named = zip(GRAPHS[graph].outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True)
        # NumPy has no bfloat16.
        return {port.name: out.float().numpy() if self.device == "cpu" else out for port, out in named}

    def release(self, graphs: Sequence[str]) -> None:
        for graph in set(graphs) - self._released if self.folder is not None else ():
            setattr(self.model, graph, getattr(empty_model(self.model.config), graph))
            self._released.add(graph)
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def _load(self, graph: str) -> None:
        if graph not in self._released:
            return
        assert self.folder is not None
        loaded = getattr(load_model(self.folder, _DTYPES[self.precision], self.device, {graph}), graph)
        if graph == "denoiser" and self.compiled:
            loaded.compile()
        setattr(self.model, graph, loaded)
        self._released.remove(graph)


def _device(name: str) -> str:
    """The device to use: cpu, cuda or cuda:N, which is there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"{name!r} is no device; expected cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        raise NotAvailableError(
            f"there is no device {name!r} here: PyTorch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return name
