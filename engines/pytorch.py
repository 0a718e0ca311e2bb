"""The PyTorch engine: the model's own modules, on the CPU or on CUDA."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.device import parse_device
from engines.interface import Array, EngineOptions
from mige_rt.bundle import OpenedModel
from mige_rt.config import Precision
from mige_rt.errors import NotAvailableError
from mige_rt.graphs import GRAPHS, INTERNAL_TENSORS, AxisRange, GraphName
from trainer.checkpoints.model_folder import load_model
from trainer.checkpoints.weights import empty_model
from trainer.model.mige import Mige

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

MAX_CUDA_GRAPHS = 4  # each of which holds the activations of one shape


class PyTorchEngine:
    """Takes and gives NumPy arrays on the CPU (without copies if the precision is fp32), torch tensors on CUDA."""

    name = "pytorch"
    limits: Mapping[str, AxisRange] = MappingProxyType({})

    def __init__(
        self,
        model: Mige,
        device: str = "cpu",
        precision: Precision = "fp32",
        *,
        folder: Path | None = None,
        compile: bool = False,
        released: Collection[GraphName] = (),
    ) -> None:
        """Prepare to run a model; `open` loads one.

        Args:
            model: On the device and of the precision already.
            device: cpu, cuda or cuda:N.
            precision: Not int8.
            folder: Where graphs that are released are loaded from again; without one, nothing is released.
            compile: Put the denoiser through `torch.compile`.
            released: The graphs that are still to be loaded.
        """
        self.model = model.eval()
        self.device = device
        self.precision = precision
        self.folder = folder
        self.max_cuda_graphs = 0 if device == "cpu" else MAX_CUDA_GRAPHS
        self.compiled = compile
        self._released: set[GraphName] = set(released)
        if compile and "denoiser" not in self._released:
            self.model.denoiser.compile()  # pyright: ignore[reportUnknownMemberType]

    @classmethod
    def open(cls, model: OpenedModel, options: EngineOptions) -> "PyTorchEngine":
        """Open a model folder or a bundle. precision auto: fp32 on the CPU, bf16 on CUDA.

        Raises:
            InputError: The device is not there, or the precision is not one of this engine's.
        """
        device = torch_device(options.device)
        precision = options.precision
        if precision == "auto":
            precision = "fp32" if device == "cpu" else "bf16"
        if precision not in _DTYPES:
            raise NotAvailableError(
                f"the pytorch engine has no precision {precision!r}; expected one of {', '.join(_DTYPES)}"
            )
        if precision == "fp32" and device != "cpu":
            torch.backends.cudnn.allow_tf32 = False  # whose 10 bits are not what fp32 promises
        first: set[GraphName] = {"vae_encoder"} if options.low_memory else set(GRAPHS)
        loaded = load_model(model.folder, _DTYPES[precision], device, first)
        return cls(
            loaded,
            device,
            precision,
            folder=model.folder,
            compile=options.compile,
            released=set(GRAPHS) - first,
        )

    def array(self, values: NDArray[Any]) -> Array:
        """See `Engine.array`."""
        return values if self.device == "cpu" else torch.as_tensor(values, device=self.device)

    @torch.inference_mode()
    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`."""
        self._load(graph)
        tensors: list[Tensor] = []
        for spec in GRAPHS[graph].inputs:
            tensor = torch.as_tensor(inputs[spec.name])
            tensors.append(tensor.to(_DTYPES[self.precision]) if spec.name in INTERNAL_TENSORS else tensor)
        result = cast("Tensor | tuple[Tensor, ...]", self.model.graph(graph)(*tensors))
        outputs = result if isinstance(result, tuple) else (result,)
        by_name = zip(GRAPHS[graph].outputs, outputs, strict=True)
        # NumPy has no bfloat16.
        return {spec.name: out.float().numpy() if self.device == "cpu" else out for spec, out in by_name}

    def release(self, graphs: Sequence[GraphName]) -> None:
        """See `Engine.release`."""
        for graph in set(graphs) - self._released if self.folder is not None else ():
            self.model.set_graph(graph, empty_model(self.model.config).graph(graph))
            self._released.add(graph)
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def _load(self, graph: GraphName) -> None:
        if graph not in self._released:
            return
        assert self.folder is not None
        loaded = load_model(self.folder, _DTYPES[self.precision], self.device, {graph}).graph(graph)
        if graph == "denoiser" and self.compiled:
            loaded.compile()  # pyright: ignore[reportUnknownMemberType]
        self.model.set_graph(graph, loaded)
        self._released.remove(graph)


def torch_device(name: str) -> str:
    """The device that PyTorch runs on: cpu, cuda or cuda:N.

    Args:
        name: One of these, or auto, which is cuda where there is a GPU.

    Raises:
        InputError: It is no such name, or the device is not there.
    """
    device = parse_device(name)
    if device.kind == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise NotAvailableError(
            f"there is no device {name!r} here: PyTorch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return name
