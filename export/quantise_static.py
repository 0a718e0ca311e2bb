"""Static quantisation of the denoiser's blocks for NVIDIA GPUs, as explicit Q/DQ nodes: fp8, and int8 by SmoothQuant.

Weights have a scale for each output channel, inputs one scale, which calibration has fixed. SmoothQuant (Xiao et al.,
2023): input channels with outliers are divided by a factor, and the weights that meet them multiplied by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from export.context import ExportTarget
from export.graphs import strip, write_weights
from export.onnx_files import load_ir, save_ir
from export.quantise import fold_transposes
from mige_rt.config import Precision

ALPHA = 0.5  # how much of the outliers is moved from inputs to weights; the paper's
_LEAST_SCALE = 2.0**-14  # the smallest normal number of float16
_AXIS = 1  # of a folded weight, [inputs, outputs], that has a scale each


@dataclass(frozen=True)
class _Format:
    """A quantised type: NumPy's, the largest number that is used, and whether inputs are smoothed."""

    dtype: Any
    largest: float
    smooth: bool

    def quantise(self, values: NDArray[np.float32], scale: NDArray[np.float16]) -> NDArray[Any]:
        """Values over scale, rounded to the nearest number of the type and clipped to its range."""
        scaled = np.clip(values / scale.astype(np.float32), -self.largest, self.largest)
        return (np.rint(scaled) if np.issubdtype(self.dtype, np.integer) else scaled).astype(self.dtype)

    def scale(self, magnitude: NDArray[np.float32]) -> NDArray[np.float16]:
        """The scale at which this magnitude is the largest number."""
        return np.maximum(magnitude / self.largest, _LEAST_SCALE).astype(np.float16)


_FORMATS: Mapping[Precision, _Format] = {
    "fp8": _Format(ml_dtypes.float8_e4m3fn, 448.0, smooth=False),
    "int8-sq": _Format(np.int8, 127.0, smooth=True),
}


def quantise_static(target: ExportTarget, ranges: Mapping[str, Tensor]) -> list[str]:
    """Replace the fp16 denoiser's two files by quantised ones.

    Args:
        target: what was exported.
        ranges: of the inputs of the layers to quantise, see `export.calibrate.input_ranges`.

    Returns:
        The layers that were quantised.
    """
    onnx_path, weights_path = target.onnx_path("denoiser"), target.weights_path("denoiser")
    model = load_ir(onnx_path)
    ir.external_data.load_to_model(model)  # since their file is written anew
    fold_transposes(model)
    layers: list[str] = []
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        layer = "" if weight is None else str(weight.name).removesuffix(".weight.T")
        if layer in ranges:
            _quantise_layer(model, node, ranges[layer].numpy(), _FORMATS[target.precision])
            layers.append(layer)
    strip(model)
    write_weights(model, weights_path)
    save_ir(model, onnx_path)
    return layers


def _quantise_layer(model: ir.Model, node: ir.Node, channels: NDArray[np.float32], fmt: _Format) -> None:
    """Put Q/DQ before a product's input, and its weight as quantised numbers behind a DQ. channels: the input's.

    Queries, keys and values become products of their own: TensorRT for RTX would else take their one weight apart when
    it runs, for which it widens it, and multiply in float16.
    """
    x, weight = node.inputs
    assert x is not None and weight is not None and weight.const_value is not None
    values: NDArray[np.float32] = weight.const_value.numpy().astype(np.float32)  # [inputs, outputs]
    name, new_nodes = str(weight.name), list[ir.Node]()

    def constant(suffix: str, array: NDArray[Any]) -> ir.Value:
        value = ir.val(f"{name}.{suffix}", const_value=ir.tensor(array, name=f"{name}.{suffix}"))
        model.graph.initializers.add(value)
        return value

    def add(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        new_nodes.append(ir.node(op, inputs, attributes, name=f"{name}.{op}.{len(new_nodes)}"))
        return new_nodes[-1].outputs[0]

    if fmt.smooth:
        factors = _smoothing(channels, values)
        x = add("Mul", x, constant("smoothing", (1 / factors).astype(np.float16)))
        channels, values = channels / factors, values * factors[:, None]
    scale, weight_scale = fmt.scale(channels.max()), fmt.scale(np.abs(values).max(axis=0))
    input_scale = constant("input_scale", scale)
    zero = constant("zero", np.zeros((), fmt.dtype))  # its type is what is quantised to
    quantised = add("QuantizeLinear", x, input_scale, zero)
    x = add("DequantizeLinear", quantised, input_scale, zero)
    parts = 3 if name.endswith(".qkv.weight.T") else 1
    products: list[ir.Value] = []
    stored = np.split(fmt.quantise(values, weight_scale), parts, axis=_AXIS)
    for number, (numbers, scales) in enumerate(zip(stored, np.split(weight_scale, parts), strict=True)):
        part = constant(f"quantised.{number}", numbers)
        dequantised = add("DequantizeLinear", part, constant(f"scale.{number}", scales), axis=_AXIS)
        products.append(add("MatMul", x, dequantised))
    product = products[0] if parts == 1 else add("Concat", *products, axis=-1)
    model.graph.insert_before(node, new_nodes)
    ir.convenience.replace_all_uses_with(node.outputs[0], product)
    model.graph.remove(node, safe=True)
    if not weight.uses():
        del model.graph.initializers[name]


def _smoothing(channels: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What each input channel is divided by, and its weights multiplied by; 1 where either is always zero."""
    weights = np.abs(values).max(axis=1)
    both = (channels > 0) & (weights > 0)
    factors = np.ones_like(channels)
    factors[both] = channels[both] ** ALPHA / weights[both] ** (1 - ALPHA)
    return factors
