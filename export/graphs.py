"""One PyTorch graph to one ONNX file, whose weights are in a safetensors file beside it.

The graph is traced on the meta device, where weights take no memory, and the weights are copied one by one from the
checkpoint. They keep the type they are stored in where that loses nothing (an fp32 graph of a bf16 checkpoint holds
bf16 weights and widens them on load), and their names in the module, so that PyTorch reads them from a bundle as well.
"""

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxscript import optimizer
from torch import Tensor, nn

from export.context import ExportTarget
from export.onnx_files import check_file, save_ir
from export.precision import PreciseGraph
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, GraphName, axis_size, resolved_axes, split_axis

Layout = tuple[torch.dtype, tuple[int, ...]]  # a weight's type and shape in its file
Place = tuple[int, int]  # its offset in the file and its bytes

OPSET = 20  # of ONNX; the one that converts T5 with float32 parts, and the VAE
ALIGNMENT = 64  # bytes, of the first weight in its file
INLINE = 1024  # bytes from which on a quantised graph's constants are not in the graph, the same as ONNX Runtime's
_MOST = {"N": 4096, "M": 63, "B": 63, "R": 4096}  # diffusers' VAE branches at 64 images
_TYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}
_STORED = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bool: "BOOL",
}
_ONNX = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.bool: ir.DataType.BOOL,
}


def export_graph(graph: GraphName, module: nn.Module, stored: Callable[[str], Tensor], target: ExportTarget) -> int:
    """Write a graph's two files.

    Args:
        graph: its name.
        module: the graph's, on the meta device; it is changed.
        stored: gives one of its weights as the checkpoint has it.
        target: what is made of it.

    Returns:
        How many numbers the weights hold.

    Raises:
        InputError: a file cannot be written.
    """
    onnx_path, weights_path = target.onnx_path(graph), target.weights_path(graph)
    model = _trace(graph, PreciseGraph(graph, module, target.precision).eval(), target)
    _optimise(model)
    strip(model)
    weights = module.state_dict()
    graph_values = {name.removeprefix("module."): value for name, value in model.graph.initializers.items()}
    names = [*(name for name in weights if name in graph_values), *_unused(module, set(graph_values))]
    layout: dict[str, Layout] = {}
    for name in dict.fromkeys(names):
        # Widening is lossless, so it waits until the weights are loaded; narrowing is done here.
        wanted, given = weights[name].dtype, stored(name).dtype
        as_stored = wanted == torch.float32 and given.is_floating_point and target.precision != "int8"
        layout[name] = (given if as_stored else wanted, tuple(weights[name].shape))
    try:
        places = _write_file(weights_path, layout, stored)
        for name, value in graph_values.items():
            if name in places:
                tensor = _in_file(name, layout[name], weights_path, places[name])
                _point_to_file(model, value, tensor, _ONNX[weights[name].dtype])
        save_ir(model, onnx_path)
    except OSError as error:
        raise InputError(f"{onnx_path.parent} cannot be written ({error}): make room, or give another path") from error
    check_file(onnx_path)
    return sum(math.prod(shape) for _, shape in layout.values())


def _trace(graph: GraphName, precise: PreciseGraph, target: ExportTarget) -> ir.Model:
    """The graph with named axes; the weights are still without values."""
    config, axes = target.config, resolved_axes(target.config)[graph]
    # Two axes of one length would be taken for the same, so all differ; their limits are checked where graphs are run.
    sizes: dict[str, int] = {}
    dims: dict[str, Any] = {}
    for number, (axis, span) in enumerate(target.ranges.items()):
        if span.min == span.max:
            sizes[axis] = span.min
        elif axis in ("h", "w", "eh", "ew"):
            patch = config.dit.patch
            sizes[axis], dims[axis] = (5 + number) * patch, patch * torch.export.Dim(f"{axis}_cells", min=1)
        else:
            sizes[axis], dims[axis] = 3 + number, torch.export.Dim(axis, min=1, max=_MOST.get(axis, config.max_tokens))
    inputs: list[Tensor] = []
    dynamic_shapes: list[dict[int, Any]] = []
    for spec in GRAPHS[graph].inputs:
        shape = [axis_size(axis, sizes) for axis in axes[spec.name]]
        inputs.append(torch.zeros(shape, dtype=_TYPES[spec.dtype], device="meta"))
        dynamic: dict[int, Any] = {}
        for index, axis in enumerate(axes[spec.name]):
            if isinstance(axis, str):
                factor, name = split_axis(axis)
                if name in dims:
                    dynamic[index] = factor * dims[name] if factor > 1 else dims[name]
        dynamic_shapes.append(dynamic)
    # Of torchvision, which we do without.
    with _errors_alone("torch.onnx"), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(  # pyright: ignore[reportUnknownMemberType]: untyped defaults
            precise,
            tuple(inputs),
            input_names=[spec.name for spec in GRAPHS[graph].inputs],
            output_names=[spec.name for spec in GRAPHS[graph].outputs],
            dynamic_shapes=(tuple(dynamic_shapes),),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model: ir.Model = program.model
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([_axis(axis, sizes, dims) for axis in axes[str(value.name)]])
    return model


@contextmanager
def _errors_alone(*names: str) -> Generator[None]:
    """Let these loggers report errors and nothing less."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _axis(axis: int | str, sizes: Mapping[str, int], dims: Mapping[str, Any]) -> int | str:
    """The axis as a reader of the graph sees it: its name where it may vary."""
    return axis if isinstance(axis, str) and split_axis(axis)[1] in dims else axis_size(axis, sizes)


def _optimise(model: ir.Model) -> None:
    """Fold what does not depend on inputs or weights; weights stay as they are, under their names."""
    for name, value in model.graph.initializers.items():
        if name.startswith("module."):
            value.const_value = None
    with _errors_alone("onnx_ir", "onnxscript"):
        optimizer.optimize_ir(model)


def strip(model: ir.Model) -> None:
    """Remove what describes this machine: the code's paths, and stack traces."""
    model.producer_name, model.producer_version, model.doc_string = "mige-rt", None, None
    model.metadata_props.clear()
    for part in (model.graph, *model.graph.all_nodes()):
        part.metadata_props.clear()
        part.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for value in values + [output for node in model.graph.all_nodes() for output in node.outputs]:
        value.metadata_props.clear()
        value.doc_string = None


def _unused(module: nn.Module, used: set[str]) -> list[str]:
    """Weights that the graph does not use and no other name of which it uses, kept for PyTorch's sake."""
    aliases: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        aliases.setdefault(id(tensor), []).append(name)
    return [names[0] for names in aliases.values() if not used.intersection(names)]


def _write_file(path: Path, layout: Mapping[str, Layout], values: Callable[[str], Tensor]) -> dict[str, Place]:
    """Write a safetensors file of this layout, a weight at a time; returns each one's place in it.

    The format: eight bytes of header length, a JSON header, then the weights without gaps (huggingface/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The largest types first, as the library itself orders them: so every weight is aligned to its type.
    names = sorted(layout, key=lambda name: -layout[name][0].itemsize)
    for name in names:
        dtype, shape = layout[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _STORED[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    places: dict[str, Place] = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = values(name).to(layout[name][0]).contiguous()
            places[name] = (file.tell(), tensor.nbytes)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return places


def _in_file(name: str, layout: Layout, path: Path, place: Place) -> ir.ExternalTensor:
    dtype, shape = layout
    return ir.ExternalTensor(
        path.name, *place, _ONNX[dtype], shape=ir.Shape(shape), name=name, base_dir=str(path.parent)
    )


def _point_to_file(model: ir.Model, value: ir.Value, tensor: ir.ExternalTensor, wanted: ir.DataType) -> None:
    """Let an initializer read its values from the weights' file, and widen them if they are kept narrower."""
    name = str(tensor.name)
    del model.graph.initializers[str(value.name)]
    if tensor.dtype == wanted:
        value.name, value.const_value = name, tensor
        model.graph.initializers.add(value)
        return
    narrow = ir.Value(name=name, shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers.add(narrow)
    cast = ir.node("Cast", [narrow], {"to": wanted}, name=f"widen {name}")
    wide = cast.outputs[0]
    wide.name, wide.shape, wide.type = f"{name}.wide", value.shape, ir.TensorType(wanted)
    ir.convenience.replace_all_uses_with(value, wide)
    model.graph.insert_before(model.graph[0], cast)


def write_weights(model: ir.Model, path: Path) -> None:
    """Move a graph's large initializers, which have values, to a safetensors file, and let it read them from there."""
    large = {
        name: _as_torch(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes >= INLINE
    }
    layout: dict[str, Layout] = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in large.items()}
    places = _write_file(path, layout, large.__getitem__)
    for name in large:
        model.graph.initializers[name].const_value = _in_file(name, layout[name], path, places[name])


def _as_torch(values: NDArray[Any]) -> Tensor:
    """A copy; NumPy has float8 from a package whose types PyTorch does not know."""
    if values.dtype.name == "float8_e4m3fn":
        return torch.as_tensor(values.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.as_tensor(values.copy())
