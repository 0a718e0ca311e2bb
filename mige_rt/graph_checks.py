"""A bundle's ONNX files against its manifest and against what the exporter writes, before a runtime sees them.

An ONNX file is a program: it may loop, call functions of its own, read files, or ask a runtime for any operator. Those
that `mige-rt export` writes do none of it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mige_rt.bundle import GraphEntry, Manifest
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, AxisRange, GraphName, TensorSpec, split_axis
from mige_rt.onnx_file import OnnxModel, OnnxTensor, OnnxValue, read_onnx

MOST_NODES = 50_000  # of a graph; the published sizes' largest has about 5,000
OPSETS = range(17, 26)  # of ONNX's own operators

# All that the exporter writes, over all precisions and sizes. tests/hostile/test_bundles.py compares exported bundles.
OPERATORS = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "Clip",
        "Concat",
        "Conv",
        "Cos",
        "DequantizeLinear",
        "Div",
        "DynamicQuantizeLinear",
        "Expand",
        "Gather",
        "GatherND",
        "Gelu",
        "Gemm",
        "Greater",
        "GreaterOrEqual",
        "InstanceNormalization",
        "LayerNormalization",
        "Less",
        "Log",
        "MatMul",
        "MatMulInteger",
        "Max",
        "Min",
        "Mul",
        "Not",
        "Pad",
        "Pow",
        "QuantizeLinear",
        "Range",
        "Reciprocal",
        "ReduceMean",
        "Reshape",
        "Resize",
        "Shape",
        "Sigmoid",
        "Sin",
        "Slice",
        "Softmax",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)

# Of the types that it writes, by onnx.proto's number.
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 16: 2, 17: 1}
_DATA_TYPES = {"float32": 1, "int64": 7, "bool": 9}

# Sizes of the configuration: the weight that has each, and in which axis.
_SIZES: dict[str, tuple[GraphName, str, int]] = {
    "vision.patch": ("image_encoder", "vision.embeddings.patch_embedding.weight", 3),
    "vision.width": ("image_encoder", "vision.embeddings.patch_embedding.weight", 0),
    "vision.mlp": ("image_encoder", "vision.encoder.layers.0.mlp.fc1.bias", 0),
    "qformer.queries": ("image_encoder", "query_tokens", 1),
    "qformer.width": ("image_encoder", "query_tokens", 2),
    "qformer.mlp": ("image_encoder", "qformer.encoder.layer.0.intermediate_query.dense.bias", 0),
    "text.vocabulary": ("text_encoder", "t5.encoder.embed_tokens.weight", 0),
    "text.width": ("text_encoder", "t5.encoder.embed_tokens.weight", 1),
    "text.heads": ("text_encoder", "t5.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1),
    "max_tokens": ("conditioner", "y_embedding", 0),
    "dit.width": ("denoiser", "x_embedder.proj.weight", 0),
    "dit.patch": ("denoiser", "x_embedder.proj.weight", 3),
    "dit.mlp": ("denoiser", "blocks.0.mlp.fc1.bias", 0),
    "vae.channels": ("vae_decoder", "post_quant_conv.weight", 0),
}
# Numbers of layers: the weights whose numbers count them.
_DEPTHS: dict[str, tuple[GraphName, str]] = {
    "vision.depth": ("image_encoder", r"vision\.encoder\.layers\.(\d+)\."),
    "qformer.depth": ("image_encoder", r"qformer\.encoder\.layer\.(\d+)\."),
    "text.depth": ("text_encoder", r"t5\.encoder\.block\.(\d+)\."),
    "dit.depth": ("denoiser", r"blocks\.(\d+)\."),
}


def check_graphs(folder: Path, manifest: Manifest) -> None:
    """Check a bundle's graphs without running them.

    Args:
        folder: The bundle.
        manifest: Its manifest.

    Raises:
        InputError: A graph is not what the manifest says, or not what the exporter writes.
    """
    weights: dict[GraphName, Mapping[str, Sequence[int]]] = {}
    for graph, entry in manifest.graphs.items():
        path = folder / entry.onnx.path
        model = read_onnx(path)
        problems = [
            *_forbidden(model),
            *_tensors(model.tensors, entry),
            *_borders(graph, model, entry, manifest.ranges),
        ]
        if problems:
            raise InputError(f"{path} is no graph that mige-rt wrote: {problems[0]}; do not use this bundle")
        weights[graph] = {tensor.name: tensor.dims for tensor in model.tensors}
    if wrong := _other_sizes(manifest.model, weights):
        raise InputError(
            f"the manifest of {folder} says {', '.join(wrong)}: do not use this bundle, or export it again"
        )


def _forbidden(model: OnnxModel) -> list[str]:
    problems: list[str] = []
    if others := sorted(model.operators.keys() - OPERATORS):
        problems.append(f"it has the operators {_listed(others)}, which the exporter never writes")
    if (nodes := sum(model.operators.values())) > MOST_NODES:
        problems.append(f"it has {nodes} nodes, at most {MOST_NODES} are expected")
    if model.opsets.keys() - {"", "ai.onnx"} or not model.opsets or not all(v in OPSETS for v in model.opsets.values()):
        stated = _listed([f"{domain or 'ai.onnx'} {version}" for domain, version in model.opsets.items()])
        problems.append(
            f"its operators are of {stated or 'no version'}, ai.onnx {OPSETS[0]} to {OPSETS[-1]} is expected"
        )
    return problems


def _tensors(tensors: Sequence[OnnxTensor], entry: GraphEntry) -> list[str]:
    """What is wrong with weights and constants; most of all where they are read from."""
    problems: list[str] = []
    file = Path(entry.weights.path).name
    for tensor in tensors:
        name = repr(tensor.name or "a constant")[:100]
        item = _ITEM_BYTES.get(tensor.data_type)
        if item is None:
            problems.append(f"{name} is of ONNX's type {tensor.data_type}, which the exporter never writes")
            continue
        size = math.prod(tensor.dims) * item
        if tensor.external is not None:
            place = _place(tensor.external)
            if tensor.external.get("location") != file:
                problems.append(f"{name} is read from {tensor.external.get('location')!r}, {file!r} is expected")
            elif place is None or place[1] != size or sum(place) > entry.weights.bytes:
                problems.append(f"{name} of {size} bytes is not within the {entry.weights.bytes} bytes of {file}")
        elif tensor.raw_bytes not in (None, size) or size > item * tensor.bytes:
            problems.append(f"{name} of shape {list(tensor.dims)} has another number of values")
    return problems


def _place(external: Mapping[str, str]) -> tuple[int, int] | None:
    """(offset, length) of a weight in its file; None if they are no numbers."""
    texts = external.get("offset", "0"), external.get("length", "")
    if not all(re.fullmatch("[0-9]{1,15}", text) for text in texts) or external.keys() - {
        "location",
        "offset",
        "length",
    }:
        return None
    return int(texts[0]), int(texts[1])


def _borders(graph: GraphName, model: OnnxModel, entry: GraphEntry, ranges: Mapping[str, AxisRange]) -> list[str]:
    """What is wrong with the inputs and outputs."""
    inputs = [_expected(spec, entry.axes[spec.name], ranges) for spec in GRAPHS[graph].inputs]
    outputs = [_expected(spec, entry.axes[spec.name], ranges) for spec in GRAPHS[graph].outputs]
    problems: list[str] = []
    if list(model.inputs) != inputs:
        problems.append(f"its inputs are {_described(model.inputs)}, expected are {_described(inputs)}")
    # The tracer has names of its own for what an output's axis comes to; its size is compared when the graph is run.
    if [*map(_unnamed, model.outputs)] != [*map(_unnamed, outputs)]:
        problems.append(f"its outputs are {_described(model.outputs)}, expected are {_described(outputs)}")
    return problems


def _expected(spec: TensorSpec, axes: Sequence[int | str], ranges: Mapping[str, AxisRange]) -> OnnxValue:
    """A tensor as the exporter declares it: an axis that may vary by its name, any other as a number."""
    dims: list[int | str] = []
    for axis in axes:
        if isinstance(axis, str):
            factor, name = split_axis(axis)
            span = ranges[name]
            dims.append(factor * span.min if span.min == span.max else axis)
        else:
            dims.append(axis)
    return OnnxValue(spec.name, _DATA_TYPES[spec.dtype], tuple(dims))


def _unnamed(value: OnnxValue) -> OnnxValue:
    return replace(value, dims=tuple("any" if isinstance(dim, str) else dim for dim in value.dims))


def _described(values: Sequence[OnnxValue]) -> str:
    names = {number: name for name, number in _DATA_TYPES.items()}
    return _listed(
        [
            f"{value.name} {names.get(value.data_type, 'of another type')} [{', '.join(map(str, value.dims))}]"
            for value in values
        ]
    )


def _listed(texts: Sequence[str]) -> str:
    """The first ten of some foreign texts, shortened."""
    return ", ".join(ascii(text[:80])[1:-1] for text in texts[:10]) + (", ..." if len(texts) > 10 else "")


def _other_sizes(config: ModelConfig, weights: Mapping[GraphName, Mapping[str, Sequence[int]]]) -> list[str]:
    """Sizes of the configuration that the weights do not have, in words.

    Quantised products have other names than in PyTorch; sizes that only those have are not compared.
    """
    wrong: list[str] = []
    for field, (graph, weight, axis) in _SIZES.items():
        dims = weights[graph].get(weight)
        if dims is not None and dims[axis : axis + 1] != (_value(config, field),):
            wrong.append(f"{field} {_value(config, field)} and {weight} of {graph} has the shape {list(dims)}")
    for field, (graph, pattern) in _DEPTHS.items():
        layers = {match[1] for name in weights[graph] if (match := re.match(pattern, name))}
        if len(layers) != _value(config, field):
            wrong.append(f"{field} {_value(config, field)} and {graph} has {len(layers)} such layers")
    return wrong


def _value(config: ModelConfig, field: str) -> int:
    value: object = config
    for part in field.split("."):
        value = getattr(value, part)
    assert isinstance(value, int)
    return value
