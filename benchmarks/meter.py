"""What a call of a graph costs, counted on the meta device, without memory: floating-point operations, least bytes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mige_rt.config import ModelConfig, Precision
from mige_rt.graphs import GRAPHS, GraphName, axis_size, resolved_axes
from trainer.checkpoints.weights import empty_model
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
