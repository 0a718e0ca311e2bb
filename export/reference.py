"""The reference that exported graphs are compared with: the model's own modules, computed in float32."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mige_rt.graphs import GRAPHS
from trainer.checkpoints.model_folder import load_model

Feed = Mapping[str, NDArray]


def run_reference(folder: Path, graph: str, feeds: Sequence[Feed]) -> list[dict[str, NDArray]]:
    """A graph's outputs for each of `feeds`, in float32, from a model folder's or a bundle's weights.

    The weights stay mapped from their files in the type they are stored in, and are widened a block at a time.
    """
    module: nn.Module = getattr(load_model(folder, dtype=None, only=[graph]), graph)
    widen_by_block(module)
    return [run_module(graph, module, feed) for feed in feeds]


@torch.no_grad()
def run_module(graph: str, module: nn.Module, feed: Feed) -> dict[str, NDArray]:
    """A graph's outputs by its module."""
    outputs = module(*(torch.from_numpy(feed[port.name]) for port in GRAPHS[graph].inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {port.name: output.numpy() for port, output in zip(GRAPHS[graph].outputs, outputs, strict=True)}


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

        def widen(*_: object, stored: list[tuple[Tensor, Tensor]] = stored) -> None:
            for tensor, data in stored:
                tensor.data = data.float()

        def put_back(*_: object, stored: list[tuple[Tensor, Tensor]] = stored) -> None:
            for tensor, data in stored:
                tensor.data = torch.zeros(()).expand(data.shape)

        put_back()
        block.register_forward_pre_hook(widen)
        block.register_forward_hook(put_back)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child.children()
        else:
            yield from _blocks(child)


def _floats(module: nn.Module) -> Iterator[Tensor]:
    return (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
