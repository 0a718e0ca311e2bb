"""Dynamic quantisation for CPUs: weights of matrix products as int8, their inputs as uint8 at run time."""

import tempfile
from pathlib import Path

import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic

from export.graphs import strip, write_weights
from export.precision import TABLES


def quantise(graph: str, onnx_path: Path, weights_path: Path) -> None:
    """Replace a float32 graph's two files by quantised ones; a graph that its precision's table leaves alone stays."""
    if "int8" not in str(TABLES["int8"][graph]):
        return
    with tempfile.TemporaryDirectory(dir=onnx_path.parent) as scratch:
        path = Path(scratch) / "quantised.onnx"
        quantize_dynamic(
            onnx_path,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,  # 7 bits: CPUs without VNNI saturate 16-bit sums of 8-bit products
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
        model = ir.load(path)
        strip(model)
        model.opset_imports.pop("ai.onnx.ml", None)
        write_weights(model, weights_path)
        ir.save(model, onnx_path)
