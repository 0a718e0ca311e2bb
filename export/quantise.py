"""Dynamic quantisation for CPUs: weights of matrix products as int8, their inputs as uint8 at run time."""

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import (  # pyright: ignore[reportMissingTypeStubs]
    QuantType,
    quantize_dynamic,  # pyright: ignore[reportUnknownVariableType]
)

from export.context import ExportTarget
from export.graphs import strip, write_weights
from export.onnx_files import load_ir, save_ir
from export.precision import TABLES
from mige_rt.graphs import GraphName


def quantise(graph: GraphName, target: ExportTarget) -> None:
    """Replace a float32 graph's two files by quantised ones; a graph that its precision's table leaves alone stays."""
    if "int8" not in str(TABLES["int8"][graph]):
        return
    onnx_path, weights_path = target.onnx_path(graph), target.weights_path(graph)
    with tempfile.TemporaryDirectory(dir=onnx_path.parent) as scratch:
        folded, path = Path(scratch) / "folded.onnx", Path(scratch) / "quantised.onnx"
        model = load_ir(onnx_path)
        fold_transposes(model)
        exact = [str(node.name) for node in model.graph if node.op_type == "MatMul" and _is_wo(node)]
        save_ir(model, folded, external_data="folded.data")
        del model
        quantize_dynamic(
            folded,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=exact,
            per_channel=True,
            reduce_range=True,  # 7 bits: CPUs without VNNI saturate 16-bit sums of 8-bit products
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
        model = load_ir(path)
        strip(model)
        model.opset_imports.pop("ai.onnx.ml", None)
        write_weights(model, weights_path)
        save_ir(model, onnx_path)


def _is_wo(node: ir.Node) -> bool:
    """Whether it is the last product of a T5's feed-forward, which TABLES leaves in float32."""
    return any(value is not None and ".wo." in str(value.name) for value in node.inputs)


def fold_transposes(model: ir.Model) -> None:
    """Transpose weights once: the library quantises a product only where its second factor is an initializer."""
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None:
            continue
        values = weight.const_value.numpy().transpose(node.attributes["perm"].as_ints())
        name = f"{weight.name}.T"
        folded = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(values), name=name))
        model.graph.initializers.add(folded)
        ir.convenience.replace_all_uses_with(node.outputs[0], folded)
        model.graph.remove(node, safe=True)
        if not weight.uses():
            del model.graph.initializers[str(weight.name)]
