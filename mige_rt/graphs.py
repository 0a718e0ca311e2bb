"""The six graphs of MIGE: their names, their inputs and outputs, and the names of every axis.

One table for PyTorch, ONNX, engines, export and tests. Axes:

    B   images made at once            R   batch of the denoiser: guidance branches x B, branch-major
    N   images that prompts refer to   M   images given to the VAE encoder
    L   tokens of a prompt             Q   query tokens of an image          D   text width
    h, w    latent size of the output  rh, rw  of a reference                eh, ew  of an encoded image (either)
    f   pixels a latent pixel          c   latent channels                   p   side of the ViT's input in pixels
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mige_rt.config import ModelConfig

GraphName = Literal["vae_encoder", "image_encoder", "text_encoder", "conditioner", "denoiser", "vae_decoder"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph: its name, its element type, and the names of its axes."""

    name: str
    dtype: Literal["float32", "int64", "bool"]
    axes: tuple[str, ...]


@dataclass(frozen=True)
class AxisRange:
    """The sizes that an axis may have; `opt` is the one that TensorRT plans are tuned for."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class GraphSpec:
    """The inputs and outputs of a graph, in their order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


_CROSS_KV = TensorSpec("cross_kv", "float32", ("2", "depth", "R", "heads", "L", "head_dim"))

GRAPHS: dict[GraphName, GraphSpec] = {
    "vae_encoder": GraphSpec(
        (TensorSpec("pixels_vae", "float32", ("M", "3", "f*eh", "f*ew")),),
        (
            TensorSpec("latent_mean", "float32", ("M", "c", "eh", "ew")),
            TensorSpec("latent_logvar", "float32", ("M", "c", "eh", "ew")),
        ),
    ),
    "image_encoder": GraphSpec(
        (
            TensorSpec("pixels_vit", "float32", ("N", "3", "p", "p")),
            TensorSpec("ref_latents", "float32", ("N", "c", "rh", "rw")),
        ),
        (TensorSpec("image_tokens", "float32", ("N", "Q", "D")),),
    ),
    "text_encoder": GraphSpec(
        (
            TensorSpec("token_ids", "int64", ("B", "L")),
            TensorSpec("image_tokens", "float32", ("N", "Q", "D")),
            TensorSpec("slot_index", "int64", ("B", "L")),
            TensorSpec("text_mask", "bool", ("B", "L")),
        ),
        (TensorSpec("text_states", "float32", ("B", "L", "D")),),
    ),
    "conditioner": GraphSpec(
        (TensorSpec("text_states", "float32", ("R", "L", "D")), TensorSpec("has_text", "bool", ("R",))),
        (_CROSS_KV,),
    ),
    "denoiser": GraphSpec(
        (
            TensorSpec("latents", "float32", ("R", "c", "h", "w")),
            TensorSpec("source", "float32", ("R", "c", "h", "w")),
            TensorSpec("timestep", "float32", ("R",)),
            _CROSS_KV,
            TensorSpec("text_mask", "bool", ("R", "L")),
        ),
        (TensorSpec("prediction", "float32", ("R", "c", "h", "w")),),
    ),
    "vae_decoder": GraphSpec(
        (TensorSpec("latents", "float32", ("B", "c", "h", "w")),),
        (TensorSpec("pixels", "float32", ("B", "3", "f*h", "f*w")),),
    ),
}

# Slices of the queries of the VAE's attention, which are computed one after the other in its graphs. A side is a
# multiple of the DiT's patch of 2, and so the number of queries of this.
VAE_QUERY_SLICES = 4

# Handed from graph to graph in the engine's own precision; all other floating-point tensors are float32 at the border.
INTERNAL_TENSORS = frozenset({"image_tokens", "text_states", "cross_kv"})


def split_axis(axis: str) -> tuple[int, str]:
    """An axis such as "h" or "4*h" as a factor and a name."""
    factor, _, name = axis.rpartition("*")
    return int(factor or 1), name


def axis_size(axis: int | str, sizes: Mapping[str, int]) -> int:
    """An axis as a number.

    Args:
        axis: A number, or a name with or without a factor, such as "4*h".
        sizes: The sizes of the named axes.
    """
    if isinstance(axis, int):
        return axis
    factor, name = split_axis(axis)
    return factor * sizes[name]


def named_sizes(axes: Sequence[int | str], shape: Sequence[int]) -> dict[str, int]:
    """The sizes of the named axes, from an array's shape; the inverse of `axis_size`."""
    sizes: dict[str, int] = {}
    for axis, size in zip(axes, shape, strict=True):
        if isinstance(axis, str):
            factor, name = split_axis(axis)
            sizes[name] = size // factor
    return sizes


def resolved_axes(config: ModelConfig) -> dict[GraphName, dict[str, list[int | str]]]:
    """By graph and tensor the axes of GRAPHS, with numbers where this model fixes them."""
    grid = config.dit.trained_grid * config.dit.patch
    fixed: Mapping[str, int] = {
        "2": 2,
        "3": 3,
        "c": config.vae.channels,
        "depth": config.dit.depth,
        "heads": config.dit.heads,
        "head_dim": config.dit.width // config.dit.heads,
        "p": config.vision.side,
        "Q": config.qformer.queries,
        "D": config.text.width,
        "rh": grid,
        "rw": grid,
    }
    factor = config.vae.factor
    return {
        name: {
            spec.name: [fixed.get(axis, axis.replace("f*", f"{factor}*")) for axis in spec.axes]
            for spec in (*graph.inputs, *graph.outputs)
        }
        for name, graph in GRAPHS.items()
    }
