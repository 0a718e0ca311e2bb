"""One PyTorch graph to one ONNX file, whose weights lie in a safetensors file beside it.

The graph is traced on the meta device, where weights take no memory, and the weights are copied one by one from the
checkpoint. They keep the type they are stored in where that loses nothing (an fp32 graph of a bf16 checkpoint holds
bf16 weights and widens them on load), and their names in the module, so that PyTorch reads them from a bundle as well.
"""

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor

from export.precision import PreciseGraph
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, AxisRange, axis_size, resolved_axes, split_axis

OPSET = 20  # of ONNX; what was found to convert T5 with float32 parts, and the VAE
ALIGNMENT = 64  # bytes, of the first weight in its file
INLINE = 1024  # bytes of a quantised graph's constants that stay in the graph
_MOST = {"N": 4096, "M": 63, "B": 63, "R": 4096}  # diffusers' VAE branches at 64 pictures
_TYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}
_STORED = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ONNX = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


def export_graph(
    graph: str,
    module: torch.nn.Module,
    stored: Callable[[str], Tensor],
    precision: Any,
    config: ModelConfig,
    ranges: Mapping[str, AxisRange],
    onnx_path: Path,
    weights_path: Path,
) -> int:
    """Write a graph's two files; returns how many numbers its weights hold.

    module is the graph's, on the meta device, and is changed; stored(name) gives one of its weights as the checkpoint
    has it; ranges are those of the bundle. Raises InputError when a file cannot be written.
    """
    precise = PreciseGraph(graph, module, precision).eval()
    model = _trace(graph, precise, config, ranges)
    _optimise(model)
    strip(model)
    wanted = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    aliases = {name.removeprefix("module."): value for name, value in model.graph.initializers.items()}
    kept: dict[str, torch.dtype] = {}
    for name in dict.fromkeys([*(n for n in wanted if n in aliases), *_unseen(module, set(aliases))]):
        # Widening is lossless, so it waits until the weights are loaded; narrowing is done here.
        own = stored(name).dtype
        narrow = wanted[name] == torch.float32 and own.is_floating_point and precision != "int8"
        kept[name] = own if narrow else wanted[name]
    try:
        shapes = {name: tuple(module.state_dict()[name].shape) for name in kept}
        places = _write_file(weights_path, {name: (kept[name], shapes[name]) for name in kept}, stored)
        for name, value in aliases.items():
            if name in places:
                tensor = _in_file(name, kept[name], value.shape, weights_path, places[name])
                _point_to_file(model, value, wanted[name], kept[name], tensor)
        ir.save(model, onnx_path)
    except OSError as error:
        raise InputError(f"{onnx_path.parent} cannot be written ({error}): make room, or give another path") from error
    onnx.checker.check_model(str(onnx_path))
    return sum(math.prod(shape) for shape in shapes.values())


def _trace(graph: str, precise: PreciseGraph, config: ModelConfig, ranges: Mapping[str, AxisRange]) -> ir.Model:
    """The graph with named axes; the weights are still without values."""
    axes = resolved_axes(config)[graph]
    # Two axes of one length would be taken for the same, so all differ; their limits are checked where graphs are run.
    sizes: dict[str, int] = {}
    dims: dict[str, Any] = {}
    for number, (axis, span) in enumerate(ranges.items()):
        if span.min == span.max:
            sizes[axis] = span.min
        elif axis in ("h", "w", "eh", "ew"):
            patch = config.dit.patch
            sizes[axis], dims[axis] = (5 + number) * patch, patch * torch.export.Dim(f"{axis}_cells", min=1)
        else:
            sizes[axis], dims[axis] = 3 + number, torch.export.Dim(axis, min=1, max=_MOST.get(axis, config.max_tokens))
    inputs, shapes = [], []
    for port in GRAPHS[graph].inputs:
        own = axes[port.name]
        inputs.append(torch.zeros([axis_size(axis, sizes) for axis in own], dtype=_TYPES[port.dtype], device="meta"))
        shape: dict[int, Any] = {}
        for index, axis in enumerate(own):
            if isinstance(axis, str):
                factor, name = split_axis(axis)
                if name in dims:
                    shape[index] = factor * dims[name] if factor > 1 else dims[name]
        shapes.append(shape)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # of torchvision, which we do without
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                precise,
                tuple(inputs),
                input_names=[port.name for port in GRAPHS[graph].inputs],
                output_names=[port.name for port in GRAPHS[graph].outputs],
                dynamic_shapes=(tuple(shapes),),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        value.shape = ir.Shape([_axis(axis, sizes, dims) for axis in axes[str(value.name)]])
    return program.model


def _axis(axis: int | str, sizes: Mapping[str, int], dims: Mapping[str, Any]) -> int | str:
    """The axis as a reader of the graph sees it: its name where it may vary."""
    return axis if isinstance(axis, str) and split_axis(axis)[1] in dims else axis_size(axis, sizes)


def _optimise(model: ir.Model) -> None:
    """Fold what does not depend on inputs or weights; weights are kept as they are, to be found again by name."""
    weights = {name: value for name, value in model.graph.initializers.items() if name.startswith("module.")}
    for value in weights.values():
        value.const_value = None
    quiet = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    levels = [logger.level for logger in quiet]
    try:
        for logger in quiet:
            logger.setLevel(logging.ERROR)
        optimizer.optimize_ir(model)
    finally:
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)


def strip(model: ir.Model) -> None:
    """Take out what tells of this machine: where the code lies, and stack traces."""
    model.producer_name, model.producer_version, model.doc_string = "mige-rt", None, None
    model.metadata_props.clear()
    for part in (model.graph, *model.graph.all_nodes()):
        part.metadata_props.clear()
        part.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for value in values + [output for node in model.graph.all_nodes() for output in node.outputs]:
        value.metadata_props.clear()
        value.doc_string = None


def _unseen(module: torch.nn.Module, seen: set[str]) -> list[str]:
    """Weights that the graph does not use and no other name of which it uses, kept for PyTorch's sake."""
    by_identity: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        by_identity.setdefault(id(tensor), []).append(name)
    return [names[0] for names in by_identity.values() if not seen.intersection(names)]


def _write_file(
    path: Path, kept: Mapping[str, tuple[torch.dtype, Sequence[int]]], values: Callable[[str], Tensor]
) -> dict[str, tuple[int, int]]:
    """Write a safetensors file, a weight at a time, of kept's types and shapes; returns each one's offset in the file
    and its bytes.

    The format: eight bytes of header length, a JSON header, then the weights without gaps (huggingface/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The largest types first, as the library itself orders them: so every weight is aligned to its type.
    names = sorted(kept, key=lambda name: -kept[name][0].itemsize)
    for name in names:
        dtype, shape = kept[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _STORED[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    places = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = values(name).to(kept[name][0]).contiguous()
            places[name] = (file.tell(), tensor.nbytes)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return places


def _in_file(name: str, dtype: torch.dtype, shape: Any, path: Path, place: tuple[int, int]) -> ir.ExternalTensor:
    offset, length = place
    return ir.ExternalTensor(path.name, offset, length, _ONNX[dtype], shape=shape, name=name, base_dir=str(path.parent))


def _point_to_file(
    model: ir.Model, value: ir.Value, wanted: torch.dtype, kept: torch.dtype, tensor: ir.ExternalTensor
) -> None:
    """Let an initializer read its values from the weights' file, and widen them if they are kept narrower."""
    name = str(tensor.name)
    del model.graph.initializers[str(value.name)]
    if kept == wanted:
        value.name, value.const_value = name, tensor
        model.graph.initializers.add(value)
        return
    narrow = ir.Value(name=name, shape=value.shape, type=ir.TensorType(_ONNX[kept]), const_value=tensor)
    model.graph.initializers.add(narrow)
    cast = ir.node("Cast", [narrow], {"to": _ONNX[wanted]}, name=f"widen {name}")
    cast.outputs[0].name, cast.outputs[0].shape = f"{name}.wide", value.shape
    cast.outputs[0].type = ir.TensorType(_ONNX[wanted])
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    model.graph.insert_before(model.graph[0], cast)


def write_weights(model: ir.Model, path: Path) -> None:
    """Move a graph's large initializers, which have values, to a safetensors file, and let it read them from there."""
    large = {
        name: torch.from_numpy(value.const_value.numpy().copy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > INLINE
    }
    places = _write_file(path, {n: (tensor.dtype, tensor.shape) for n, tensor in large.items()}, large.__getitem__)
    for name, tensor in large.items():
        value = model.graph.initializers[name]
        value.const_value = _in_file(name, tensor.dtype, value.shape, path, places[name])
