"""What a call of a graph costs, counted on the meta device, without memory.

Floating-point operations, least bytes, and for a step of the loop the operations that launch a kernel each.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mige_rt.config import ModelConfig, Precision
from mige_rt.denoise import LoopInputs, denoising_step
from mige_rt.graphs import GRAPHS, GraphName, axis_size, resolved_axes
from mige_rt.scheduler import SchedulerStep
from trainer.checkpoints.weights import empty_model
from trainer.model.dit import Denoiser, attention_bias
from trainer.model.mige import Mige

_TYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}
_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 4, "fp8": 2, "int8-sq": 2}  # bytes of a number that is not quantised
_VAE = ("vae_encoder", "vae_decoder")  # which int8 leaves in float32
_BLOCKS_ALONE = ("fp8", "int8-sq")  # which quantise the products in the denoiser's blocks alone
# What one graph hands to another is of the precision; all else at a graph's border is what its specs say.
_INNER = {spec.name for g in GRAPHS.values() for spec in g.outputs} & {
    spec.name for g in GRAPHS.values() for spec in g.inputs
}


@dataclass(frozen=True)
class Call:
    """A graph run `times` times at one shape, given by the sizes of its named axes (see `engines.interface.GRAPHS`)."""

    graph: GraphName
    sizes: tuple[tuple[str, int], ...]
    times: int = 1


def call(graph: GraphName, times: int = 1, **sizes: int) -> Call:
    return Call(graph, tuple(sizes.items()), times)


@cache
def flops(config: ModelConfig, graph: GraphName, sizes: tuple[tuple[str, int], ...]) -> int:
    """Floating-point operations of one call: matrix products, convolutions and attention, a multiply-add as two."""
    module, axes = getattr(_model(config), graph), resolved_axes(config)[graph]
    counter = FlopCounterMode(display=False)
    # Fake tensors, since T5 looks into its mask unless it is traced; they are on the meta device as the weights are.
    with FakeTensorMode(allow_non_fake_inputs=True), counter, torch.no_grad(), torch.device("meta"):
        shapes = ([axis_size(axis, dict(sizes)) for axis in axes[spec.name]] for spec in GRAPHS[graph].inputs)
        module(*(torch.empty(s, dtype=_TYPES[i.dtype]) for s, i in zip(shapes, GRAPHS[graph].inputs, strict=True)))
    return counter.get_total_flops()


@cache
def least_bytes(config: ModelConfig, graph: GraphName, sizes: tuple[tuple[str, int], ...], precision: Precision) -> int:
    """The least bytes of one call: weights in the size of the precision, inputs and outputs, each read or written once.

    Of T5's word embeddings and of the null text, only the rows that are used. int8: the weights of matrix products are
    one byte each, the rest is float32.
    """
    module, named = getattr(_model(config), graph), dict(sizes)
    total = sum(numbers * size for numbers, size in _weights(module, graph, named, precision))
    axes = resolved_axes(config)[graph]
    for spec in (*GRAPHS[graph].inputs, *GRAPHS[graph].outputs):
        size = _SIZES[precision] if spec.name in _INNER else _TYPES[spec.dtype].itemsize
        total += size * math.prod(axis_size(axis, named) for axis in axes[spec.name])
    return total


def _weights(
    module: nn.Module, graph: GraphName, sizes: Mapping[str, int], precision: Precision
) -> Iterator[tuple[int, int]]:
    """Of each weight, how many numbers are read, and the bytes of one."""
    counted: set[int] = set()
    for path, part in module.named_modules():
        product = isinstance(part, nn.Linear | nn.MultiheadAttention)
        for name, weight in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            if id(weight) in counted or not weight.is_floating_point():
                continue
            counted.add(id(weight))
            numbers = weight.numel()
            if graph == "text_encoder" and part is module.get_submodule("t5.shared"):
                numbers = min(sizes["B"] * sizes["L"], len(weight)) * weight.shape[1]
            elif name == "y_embedding":
                numbers = sizes["L"] * weight.shape[1]
            in_block = graph == "denoiser" and path.startswith("blocks.")
            narrow = (precision == "int8" and graph not in _VAE) or (precision in _BLOCKS_ALONE and in_block)
            yield numbers, 1 if narrow and product and weight.ndim == 2 else _SIZES[precision]


@cache
def graph_parameters(config: ModelConfig, graph: GraphName) -> int:
    """How many numbers the weights of a graph hold, each counted once."""
    return sum(weight.numel() for weight in getattr(_model(config), graph).parameters())


@cache
def _model(config: ModelConfig) -> Mige:
    return empty_model(config).requires_grad_(False).eval()


class _Launches(TorchDispatchMode):
    """Counts the operations that compute something: those that only look at a tensor otherwise launch no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name == "_unsafe_view" or "empty" in name)
        return func(*args, **(kwargs or {}))


class _FusedAttention(TorchFunctionMode):
    """Counts attention as what it is on CUDA, one kernel, whose output is laid out by tokens."""

    def __init__(self, launches: _Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.launches.count += 1
        batch, heads, tokens, width = args[0].shape
        return args[0].new_empty(batch, tokens, heads, width).transpose(1, 2)


def step_launches(config: ModelConfig, batch: int = 2, tokens: int = 64) -> int:
    """Operations of one step of the loop that launch a kernel each, as the engine pytorch runs it on CUDA in fp16.

    Args:
        config: The model's sizes.
        batch: R, guidance branches of one image.
        tokens: L.
    """
    denoiser = empty_model(config).requires_grad_(False).eval().denoiser.half()
    denoiser.prepare()
    launches = _Launches()
    side, channels = config.dit.trained_grid * config.dit.patch, config.vae.channels
    heads, head_dim = config.dit.heads, config.dit.width // config.dit.heads
    with torch.device("meta"), torch.no_grad():
        latents, source = torch.empty(1, channels, side, side), torch.empty(batch, channels, side, side)
        cross_kv = torch.empty(2, config.dit.depth, batch, heads, tokens, head_dim, dtype=torch.float16)
        weights = torch.empty(batch, 1, 1, 1, 1)
        inputs: Any = LoopInputs(source, cross_kv, torch.empty(batch, tokens, dtype=torch.bool), weights)  # type: ignore[arg-type]
        step: Any = denoising_step(_on_cuda(denoiser))
        row = torch.empty(len(SchedulerStep._fields) + denoiser.embed_timesteps(torch.empty(1)).shape[1])
        for _ in range(2):  # the first computes what is kept
            launches.count = 0
            with launches, _FusedAttention(launches):
                step(inputs, latents, latents, row)
    return launches.count


def _on_cuda(denoiser: Denoiser) -> Any:
    """The denoiser with its inputs as `engines.pytorch` prepares them on CUDA."""

    def run(*, latents: Tensor, source: Tensor, timestep: Tensor, cross_kv: Tensor, text_mask: Tensor) -> Tensor:
        return denoiser(latents, source, timestep[:1], cross_kv, attention_bias(text_mask, cross_kv.dtype))

    return run
