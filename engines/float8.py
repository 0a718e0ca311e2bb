"""Linear layers in float8 (e4m3), with a scale for each output channel, and one for each row of the input when it runs.

This is what torchao calls Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), by PyTorch's own product.
torchao itself quantises on GPUs alone, so that nothing of it can be tested without one.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

CAPABILITY = (8, 9)  # the least compute capability that multiplies in float8: Ada Lovelace
_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max
_LEAST_SCALE = torch.finfo(torch.float32).tiny  # for rows of zeros


class Float8Linear(nn.Module):
    """A linear layer whose product is of float8; bias and result have the type of the input, bfloat16 on CUDA."""

    weight: Tensor  # float8 [out,in]
    scales: Tensor  # float32 [1,out]

    def __init__(self, linear: nn.Linear) -> None:
        """Quantise a layer's weight; the bias is shared."""
        super().__init__()
        weight = linear.weight.detach()
        scales = _row_scales(weight)
        self.register_buffer("weight", _to_float8(weight, scales))
        self.register_buffer("scales", scales.t().contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [...,in] to [...,out]."""
        rows = x.flatten(0, -2)
        scales = _row_scales(rows)
        product: Any = F.scaled_mm(
            _to_float8(rows, scales),
            self.weight.t(),
            scales,
            ScalingType.RowWise,
            self.scales,
            ScalingType.RowWise,
            bias=self.bias,
            output_dtype=x.dtype,
            use_fast_accum=x.is_cuda,
        )
        return product.unflatten(0, x.shape[:-1])


def to_float8(module: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Put `Float8Linear`s in the place of a module's layers, given by name."""
    for name, layer in layers.items():
        module.set_submodule(name, Float8Linear(layer))


def from_float8(module: nn.Module) -> None:
    """Put layers without weights in the place of a module's `Float8Linear`s, to be loaded again."""
    modules: Any = module.named_modules()  # pyright: ignore[reportUnknownVariableType]
    for name, layer in list(modules):
        if isinstance(layer, Float8Linear):
            width_out, width_in = layer.weight.shape
            module.set_submodule(name, nn.Linear(width_in, width_out, device="meta"))


def _row_scales(values: Tensor) -> Tensor:
    """Float32 [rows,1]: what makes each row's largest magnitude float8's largest number."""
    return (values.abs().amax(dim=1, keepdim=True).float() / _LARGEST).clamp(min=_LEAST_SCALE)


def _to_float8(values: Tensor, scales: Tensor) -> Tensor:
    return (values.float() / scales).clamp(-_LARGEST, _LARGEST).to(_FLOAT8)
