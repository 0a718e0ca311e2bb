"""The PyTorch engine: the model's own modules, on the CPU or on CUDA."""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.attention import attention_order
from engines.device import parse_device
from engines.float8 import CAPABILITY, from_float8, to_float8
from engines.interface import Array, EngineOptions
from mige_rt.bundle import OpenedModel
from mige_rt.config import QUANTISED, Precision
from mige_rt.errors import InputError, NotAvailableError
from mige_rt.graphs import GRAPHS, INTERNAL_TENSORS, AxisRange, GraphName
from mige_rt.lora import Lora
from trainer.checkpoints.merged import MergedCheckpoint
from trainer.checkpoints.model_folder import SafetensorsCheckpoint
from trainer.checkpoints.weights import Checkpoint
from trainer.model.dit import attention_bias, block_layers
from trainer.model.mige import Mige

_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,  # around the products of float8, whose results CUDA gives in no other type
}

MAX_CUDA_GRAPHS = 4  # each of which holds the activations of one shape
COMPILED_SHAPES = 64  # of a block; beyond its limit, which is 8, torch.compile silently goes on without compiling


def graph_dtype(graph: GraphName, precision: str) -> torch.dtype:
    """What a graph computes in.

    T5's residual and the inputs of its `wo` pass what float16 holds, 65,504, on some prompts (transformers keeps `wo`
    in float32 for it, and clamps the residual): in fp16, T5 is bfloat16.
    """
    if precision == "fp8" and graph in ("vae_encoder", "vae_decoder"):
        return torch.float16  # as in fp16: a finer rounding at the same cost
    return torch.bfloat16 if (graph, precision) == ("text_encoder", "fp16") else _DTYPES[precision]


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
        checkpoint: Checkpoint | None = None,
        compile: bool = False,
        attention: Sequence[SDPBackend] = (),
        released: Collection[GraphName] = (),
    ) -> None:
        """Prepare to run a model; `open` loads one.

        Args:
            model: On the device and of the precision already.
            device: cpu, cuda or cuda:N.
            precision: Not int8 or int8-sq; fp8: the products in the denoiser's blocks, see `engines.float8`.
            checkpoint: Where graphs that are released are loaded from again, and LoRAs are merged into; without one,
                nothing is released.
            compile: Put the denoiser's blocks and the encoders' layers through `torch.compile`.
            attention: The implementations of attention, the one to be preferred first; empty: PyTorch's own order.
            released: The graphs that are still to be loaded.
        """
        self.model = model.eval()
        self.device = device
        self.precision = precision
        self.max_cuda_graphs = 0 if device == "cpu" else MAX_CUDA_GRAPHS
        self._opened = checkpoint
        self._checkpoint = checkpoint  # the same, with LoRAs merged where there are any
        self._attention = list(attention)
        self._released: set[GraphName] = set(released)
        for graph in set(GRAPHS) - self._released:
            self._prepare(graph)
        if compile:
            _compile_layers(self.model)

    @classmethod
    def open(cls, model: OpenedModel, options: EngineOptions) -> "PyTorchEngine":
        """Open a model folder or a bundle. precision auto: fp32 on the CPU, fp16 on CUDA.

        Raises:
            NotAvailableError: The device is not there, or the precision is not one of this engine's.
            InputError: The weights cannot be read, or memory ran out.
        """
        device = torch_device(options.device)
        precision = options.precision
        if precision == "auto":
            precision = "fp32" if device == "cpu" else "fp16"
        if precision not in _DTYPES:
            raise NotAvailableError(
                f"the pytorch engine has no precision {precision!r}; expected one of {', '.join(_DTYPES)}"
            )
        if precision == "fp8" and device != "cpu" and torch.cuda.get_device_capability(device) < CAPABILITY:
            raise NotAvailableError(
                "this GPU has no fp8, which begins with compute capability 8.9 (Ada Lovelace): use fp16"
            )
        if model.manifest is not None and (quantised := model.manifest.precision) in QUANTISED:
            raise NotAvailableError(
                f"{model.folder} holds {quantised} weights, which the pytorch engine does not run: use another engine, "
                "or a bundle of another precision"
            )
        if precision == "fp32" and device != "cpu":
            torch.backends.cudnn.allow_tf32 = False  # whose 10 bits are not what fp32 promises
        checkpoint = SafetensorsCheckpoint(model)
        first: set[GraphName] = {"vae_encoder"} if options.low_memory else set(GRAPHS)
        with _out_of_memory_said(device, "loading the model"):
            loaded = checkpoint.empty()
            for graph in sorted(first):
                _load_graph(checkpoint, loaded, graph, device, precision)
        dit = model.config.dit
        shape = (2, dit.heads, dit.trained_grid**2, dit.width // dit.heads)  # of one image with two guidance branches
        return cls(
            loaded,
            device,
            precision,
            checkpoint=checkpoint,
            compile=options.compile,
            attention=attention_order(options.attention, device, _DTYPES[precision], shape),
            released=set(GRAPHS) - first,
        )

    def array(self, values: NDArray[Any]) -> Array:
        """See `Engine.array`."""
        return values if self.device == "cpu" else torch.as_tensor(values, device=self.device)

    @torch.inference_mode()
    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`.

        Raises:
            InputError: Memory runs out.
        """
        with _out_of_memory_said(self.device, graph):
            self._load(graph)
            tensors = self._denoiser_inputs(inputs) if graph == "denoiser" else self._tensors(graph, inputs)
            with self._preferred_attention():
                result = cast("Tensor | tuple[Tensor, ...]", self.model.graph(graph)(*tensors))
        outputs = result if isinstance(result, tuple) else (result,)
        by_name = zip(GRAPHS[graph].outputs, outputs, strict=True)
        # NumPy has no bfloat16.
        return {spec.name: out.float().numpy() if self.device == "cpu" else out for spec, out in by_name}

    @torch.inference_mode()
    def embed_timesteps(self, timesteps: Array) -> Array:
        """See `Engine.embed_timesteps`; E is 7 times the denoiser's width.

        Raises:
            InputError: Memory runs out.
        """
        with _out_of_memory_said(self.device, "denoiser"):
            self._load("denoiser")
            embedded = self.model.denoiser.embed_timesteps(torch.as_tensor(_writable(timesteps))).float()
        return embedded.numpy() if self.device == "cpu" else embedded

    def is_capturable(self, graph: GraphName) -> bool:
        """See `Engine.is_capturable`."""
        return self.max_cuda_graphs > 0

    def release(self, graphs: Sequence[GraphName]) -> None:
        """See `Engine.release`."""
        if self._checkpoint is not None:
            leaving = set(graphs) - self._released
            self._released |= leaving
            if "denoiser" in leaving:
                from_float8(self.model.denoiser)
            hollow: dict[Tensor, Tensor] = {}
            held = {id(part) for graph in set(GRAPHS) - self._released for part in self.model.graph(graph).modules()}
            for part in (part for graph in leaving for part in self.model.graph(graph).modules()):
                if id(part) not in held:  # the patch embedder is in two graphs
                    _drop_weights(part, hollow)
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def set_loras(self, loras: Sequence[Lora]) -> None:
        """See `LoraEngine.set_loras`."""
        if self._opened is None:
            raise InputError("the model was not opened from files, into whose weights a LoRA could be merged")
        merged = MergedCheckpoint(self._opened, loras)
        merged.close()  # what its checks have opened
        before = self._checkpoint
        adapted = before.adapted if isinstance(before, MergedCheckpoint) else frozenset[GraphName]()
        stale = (adapted | merged.adapted) - self._released
        self.release(sorted(stale))
        self._checkpoint = merged
        try:
            for graph in sorted(stale):
                self._load(graph)
        except BaseException:
            self.release(sorted(stale))
            self._checkpoint = before  # from which they are loaded when they are needed
            raise

    def _tensors(self, graph: GraphName, inputs: Mapping[str, Array]) -> list[Tensor]:
        dtype = graph_dtype(graph, self.precision)
        tensors = [(spec, torch.as_tensor(_writable(inputs[spec.name]))) for spec in GRAPHS[graph].inputs]
        return [tensor.to(dtype) if spec.name in INTERNAL_TENSORS else tensor for spec, tensor in tensors]

    def _denoiser_inputs(self, inputs: Mapping[str, Array]) -> list[Tensor | None]:
        """On the CPU no mask where all is text; on CUDA one timestep where it is the same for all.

        There the device must not be asked: a timestep for all is one that was expanded.
        """
        latents, source, timestep, cross_kv, text_mask = self._tensors("denoiser", inputs)
        if self.device == "cpu":
            return [latents, source, timestep, cross_kv, None if text_mask.all() else text_mask]
        one_for_all = timestep.stride(0) == 0
        mask = attention_bias(text_mask, cross_kv.dtype)
        return [latents, source, timestep[:1] if one_for_all else timestep, cross_kv, mask]

    def _preferred_attention(self) -> AbstractContextManager[Any]:
        if not self._attention:
            return nullcontext()
        return cast("AbstractContextManager[Any]", sdpa_kernel(self._attention, set_priority=True))

    def _load(self, graph: GraphName) -> None:
        if graph not in self._released:
            return
        assert self._checkpoint is not None
        with torch.inference_mode(False):  # weights made in it would be of another kind than those loaded at first
            _load_graph(self._checkpoint, self.model, graph, self.device, self.precision)
        self._released.remove(graph)
        self._prepare(graph)

    def _prepare(self, graph: GraphName) -> None:
        """What a graph's weights need once they are there."""
        if graph == "denoiser":
            self.model.denoiser.prepare()
            if self.precision == "fp8":
                to_float8(self.model.denoiser, block_layers(self.model.denoiser))
        if graph in ("vae_encoder", "vae_decoder") and self.device != "cpu":
            module: Any = self.model.graph(graph)  # nn.Module.to's annotations lack this form
            module.to(memory_format=torch.channels_last)  # the order that cuDNN's kernels take


def _load_graph(checkpoint: Checkpoint, model: Mige, graph: GraphName, device: str, precision: str) -> None:
    checkpoint.load([graph], dtype=graph_dtype(graph, precision), device=device, model=model)
    checkpoint.close()  # or the pages of all weights that were copied would stay in memory


def _drop_weights(part: nn.Module, hollow: dict[Tensor, Tensor]) -> None:
    """Put tensors without memory in the place of a module's own; those that are one stay one.

    Args:
        part: The module; its parts are left alone.
        hollow: What stands for which tensor so far, of all modules that are released together.
    """
    for name, weight in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
        if weight not in hollow:
            empty = torch.empty_like(weight, device="meta")
            hollow[weight] = nn.Parameter(empty, weight.requires_grad) if isinstance(weight, nn.Parameter) else empty
        setattr(part, name, hollow[weight])


def _compile_layers(model: Mige) -> None:
    """Compile the layers that repeat, each kind once for all of them, for the shapes that come."""
    from torch._dynamo import config  # pyright: ignore[reportPrivateImportUsage]

    config.recompile_limit = max(config.recompile_limit, COMPILED_SHAPES)
    encoder, qformer, t5 = (
        model.image_encoder.vision.encoder,
        model.image_encoder.qformer.encoder,
        model.text_encoder.t5,
    )
    for layers in (model.denoiser.blocks, encoder.layers, qformer.layer, t5.encoder.block):
        for layer in layers:
            layer.compile(dynamic=False)  # pyright: ignore[reportUnknownMemberType]


@contextmanager
def _out_of_memory_said(device: str, graph: str) -> Generator[None]:
    """Raises InputError where PyTorch raises that the GPU's memory ran out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise InputError(
            f"the GPU ran out of memory in {graph}; {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free: use "
            "--low-vram, make fewer or smaller images at once, or end other programs that use the GPU"
        ) from error


def _writable(values: Array) -> Any:
    """An array that PyTorch may share: an expanded one of NumPy's is read-only, and is copied."""
    if isinstance(values, np.ndarray):
        array = cast("NDArray[Any]", values)
        return array if array.flags.writeable else array.copy()
    return values


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
