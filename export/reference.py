"""The reference that exported graphs are compared with: the model's own modules, computed in float32."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mige_rt.graphs import GRAPHS, GraphName
from trainer.checkpoints.weights import Checkpoint

Feed = Mapping[str, NDArray[Any]]  # a graph's inputs by name
Outputs = dict[str, NDArray[Any]]  # and its outputs


def run_reference(checkpoint: Checkpoint, graph: GraphName, feeds: Sequence[Feed]) -> list[Outputs]:
    """A graph's outputs for each of `feeds`, in float32, from a checkpoint's weights.

    The weights stay mapped from their files in the type they are stored in, are widened a block at a time, and take no
    memory afterwards.
    """
    module = checkpoint.load([graph]).graph(graph)
    widen_by_block(module)
    outputs = [run_module(graph, module, feed) for feed in feeds]
    del module
    checkpoint.release_pages()
    return outputs


def run_module(graph: GraphName, module: nn.Module, feed: Feed) -> Outputs:
    """A graph's outputs by its module."""
    with torch.no_grad():
        outputs: Tensor | tuple[Tensor, ...] = module(
            *(torch.as_tensor(feed[spec.name]) for spec in GRAPHS[graph].inputs)
        )
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {spec.name: output.numpy() for spec, output in zip(GRAPHS[graph].outputs, outputs, strict=True)}


def widen_by_block(module: nn.Module) -> None:
    """Let the module compute in float32, with the weights of one block at most widened at a time.

    A block is an entry of an outermost ModuleList. Between its calls its weights look like float32 zeros that take no
    memory, since modules ask for the types of each other's weights (T5 for those of its `wo`). What is in no block is
    widened for good.
    """
    blocks = list(_blocks(module))
    inside = {id(tensor) for block in blocks for tensor in _floats(block)}
    for tensor in _floats(module):
        if id(tensor) not in inside:
            tensor.data = tensor.data.float()
    for block in blocks:
        stored = [(tensor, tensor.data) for tensor in _floats(block) if tensor.dtype != torch.float32]
        _put_zeros(stored)
        block.register_forward_pre_hook(_hook(_widen, stored))
        block.register_forward_hook(_hook(_put_zeros, stored))


Stored = list[tuple[Tensor, Tensor]]  # a block's weights, each with its data as stored


def _widen(weights: Stored) -> None:
    for tensor, data in weights:
        tensor.data = data.float()


def _put_zeros(weights: Stored) -> None:
    for tensor, data in weights:
        tensor.data = torch.zeros(()).expand(data.shape)


def _hook(change: Callable[[Stored], None], weights: Stored) -> Callable[..., None]:
    return lambda *_: change(weights)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child.children()
        else:
            yield from _blocks(child)


def _floats(module: nn.Module) -> Iterator[Tensor]:
    return (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
