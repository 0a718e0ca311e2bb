"""The types that each kind of layer computes in.

Precision is put into the modules before export: the runtimes that we build for are strongly typed, so that the graph's
own types decide.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from mige_rt.config import Precision
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, GraphName

_HALF = {"matrix products and convolutions": "float16", "norms": "float32", "softmax": "float32"}
_BRAIN = {"matrix products and convolutions": "bfloat16", "norms": "float32", "softmax": "float32"}
_FULL = {"matrix products and convolutions": "float32", "norms": "float32", "softmax": "float32"}
_INT8 = {
    "matrix products by weights": "int8 weights a channel, uint8 inputs scaled at run time, int32 sums",
    "other matrix products and convolutions": "float32",
    "norms": "float32",
    "softmax": "float32",
}


def _for_all(layers: dict[str, str], residual: str) -> dict[GraphName, dict[str, str]]:
    return {graph: {**layers, "residual": residual} for graph in GRAPHS}


# T5's residual passes 65,504 on some prompts (export of T5 v1.1 in half precision, transformers'
# `_keep_in_fp32_modules`), hence its entry.
_FP16: dict[GraphName, dict[str, str]] = {
    **_for_all(_HALF, "float16"),
    "text_encoder": {**_HALF, "feed-forward's product and wo": "float32", "residual": "float32"},
}


def _with_quantised_blocks(products: str) -> dict[GraphName, dict[str, str]]:
    """fp16, but for the products by the weights of the denoiser's blocks."""
    return {**_FP16, "denoiser": {**_FP16["denoiser"], "matrix products by the blocks' weights": products}}


# Per graph and kind of layer, what computes in what; the borders of every graph are float32.
TABLES: dict[Precision, dict[GraphName, dict[str, str]]] = {
    "fp32": _for_all(_FULL, "float32"),
    "fp16": _FP16,
    "bf16": _for_all(_BRAIN, "bfloat16"),
    # Convolutions gain nothing from dynamic quantisation, so the VAE stays as it is. The inputs of T5's wo have
    # outliers that one scale for all of them cannot hold beside the rest.
    "int8": {
        **_for_all(_INT8, "float32"),
        "text_encoder": {**_INT8, "feed-forward's wo": "float32", "residual": "float32"},
        "vae_encoder": {**_FULL, "residual": "float32"},
        "vae_decoder": {**_FULL, "residual": "float32"},
    },
    # For NVIDIA GPUs: fp16 but for the denoiser's blocks.
    "fp8": _with_quantised_blocks("float8 e4m3 weights a channel and inputs a tensor, calibrated"),
    "int8-sq": _with_quantised_blocks("int8 weights a channel and inputs a tensor, calibrated and smoothed"),
}
_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
    "fp8": torch.float16,
    "int8-sq": torch.float16,
}
_INNER = {"image_tokens", "text_states", "cross_kv"}  # inputs that the modules want in their own precision


def check_precision(precision: str) -> Precision:
    """The precision of this name.

    Raises:
        InputError: it is none of the type `Precision`.
    """
    if precision not in TABLES:
        raise InputError(f"there is no precision {precision!r}; expected one of {', '.join(get_args(Precision))}")
    return precision


def graph_precision(precision: Precision, graph: GraphName) -> Precision:
    """What one graph of a bundle computes in: fp16 where fp8 and int8-sq leave it as it is."""
    return "fp16" if TABLES[precision][graph] == TABLES["fp16"][graph] else precision


class WideAccumulation(TorchFunctionMode):
    """Attention written out, and norms and softmax of half-precision tensors computed in float32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in _WIDE and args[0].dtype in (torch.float16, torch.bfloat16):
            wide = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
            named = {name: arg.float() if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}
            return func(*wide, **named).to(args[0].dtype)
        if func in _PRODUCTS and args[0].dtype != args[1].dtype:
            # T5's attention: a float32 mask makes its scores float32, which meet values of its own precision.
            return func(args[0].to(args[1].dtype), args[1], *args[2:], **kwargs)
        return func(*args, **kwargs)


_WIDE = {F.softmax, torch.softmax, Tensor.softmax, F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm}
_PRODUCTS = {torch.matmul, Tensor.matmul}


def _attention(  # noqa: PLR0913, PLR0917, the signature of torch's scaled_dot_product_attention, which it stands in for
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention, written out with its softmax in float32.

    It has no case for a query that may attend to nothing, which would need NaNs replaced: our masks all keep a token.

    Args:
        q: Queries, [...,T,d].
        k: Keys, [...,S,d].
        v: Values, [...,S,d].
        attn_mask: bool, broadcast to [...,T,S], true where a token is attended to.
        dropout_p: Must be 0.
        is_causal: Must be off.
        scale: The factor of the scores; None: d ** -0.5.
        enable_gqa: Must be off.

    Returns:
        [...,T,d], of the values' dtype.

    Raises:
        NotImplementedError: A flag is on.
    """
    if is_causal or enable_gqa or dropout_p:
        raise NotImplementedError("causal, grouped or dropped-out attention, which no module of ours has")
    scores = (q * (scale if scale is not None else q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    return F.softmax(scores.float(), dim=-1).to(v.dtype) @ v


class PreciseGraph(nn.Module):
    """A graph's module in one precision: float32 at its borders, WideAccumulation inside."""

    def __init__(self, graph: GraphName, module: nn.Module, precision: Precision) -> None:
        """Changes the parameters' types in place."""
        super().__init__()
        self.specs, self.dtype = GRAPHS[graph].inputs, _DTYPES[precision]
        self.module = module.to(self.dtype)
        if self.dtype == torch.float16:
            for part in module.modules():
                if isinstance(part, T5DenseGatedActDense):
                    part.wo.float()
                    for gate in (part.wi_0, part.wi_1):  # their product passes 65,504, too
                        gate.register_forward_hook(lambda _module, _inputs, output: output.float())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The graph's inputs and outputs in the order of GRAPHS."""
        typed = [x.to(self.dtype) if spec.name in _INNER else x for spec, x in zip(self.specs, inputs, strict=True)]
        with WideAccumulation():
            outputs: Tensor | tuple[Tensor, ...] = self.module(*typed)
        return tuple(x.float() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))
