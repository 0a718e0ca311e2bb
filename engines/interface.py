"""What every engine is: the six graphs of MIGE with named inputs and outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array = Any  # NumPy on the CPU, torch on CUDA; both follow the array API
Precision = Literal["fp32", "fp16", "bf16", "int8"]
GraphName = Literal["vae_encoder", "image_encoder", "text_encoder", "conditioner", "denoiser", "vae_decoder"]


@dataclass(frozen=True)
class Port:
    """One input or output: its name, its element type, and its axes; a name stands for the same size everywhere.

    N pictures referred to in the batch, M any number of pictures, B samples, R rows (B x guidance branches), L tokens,
    D text width, Q tokens a picture, h x w latent size of the output, rh x rw of references, eh x ew of an encoded
    picture (either of the two), f VAE factor, c latent channels, p ViT side.
    """

    name: str
    dtype: Literal["float32", "int64", "bool"]
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """What an axis may be: the smallest and largest size, and the usual one, which plans are tuned for."""

    smallest: int
    usual: int
    largest: int


@dataclass(frozen=True)
class Graph:
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


_CROSS_KV = Port("cross_kv", "float32", ("2", "depth", "R", "heads", "L", "head_dim"))

GRAPHS: dict[GraphName, Graph] = {
    "vae_encoder": Graph(
        (Port("pixels_vae", "float32", ("M", "3", "f*eh", "f*ew")),),
        (
            Port("latent_mean", "float32", ("M", "c", "eh", "ew")),
            Port("latent_logvar", "float32", ("M", "c", "eh", "ew")),
        ),
    ),
    "image_encoder": Graph(
        (Port("pixels_vit", "float32", ("N", "3", "p", "p")), Port("ref_latents", "float32", ("N", "c", "rh", "rw"))),
        (Port("image_tokens", "float32", ("N", "Q", "D")),),
    ),
    "text_encoder": Graph(
        (
            Port("token_ids", "int64", ("B", "L")),
            Port("image_tokens", "float32", ("N", "Q", "D")),
            Port("slot_index", "int64", ("B", "L")),
            Port("text_mask", "bool", ("B", "L")),
        ),
        (Port("text_states", "float32", ("B", "L", "D")),),
    ),
    "conditioner": Graph(
        (Port("text_states", "float32", ("R", "L", "D")), Port("has_text", "bool", ("R",))),
        (_CROSS_KV,),
    ),
    "denoiser": Graph(
        (
            Port("latents", "float32", ("R", "c", "h", "w")),
            Port("source", "float32", ("R", "c", "h", "w")),
            Port("timestep", "float32", ("R",)),
            _CROSS_KV,
            Port("text_mask", "bool", ("R", "L")),
        ),
        (Port("prediction", "float32", ("R", "c", "h", "w")),),
    ),
    "vae_decoder": Graph(
        (Port("latents", "float32", ("B", "c", "h", "w")),),
        (Port("pixels", "float32", ("B", "3", "f*h", "f*w")),),
    ),
}


class Engine(Protocol):
    """The six graphs of one model, opened by one runtime on one device.

    limits: the ranges of the named axes that it takes; an axis that is not there may be of any size. captures: how many
    CUDA graphs of its denoiser, of different shapes, may be alive at a time; 0 where none can be captured.
    """

    name: str
    device: str
    precision: str
    limits: Mapping[str, Range]
    captures: int

    def array(self, values: "NDArray[Any]") -> Array:
        """values as this engine takes them, on its device."""
        ...

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one graph; inputs and outputs by the names of GRAPHS[graph]. Tensors that one graph hands to another
        (image_tokens, text_states, cross_kv) may be of the engine's own precision."""
        ...

    def release(self, graphs: Sequence[str]) -> None:
        """Give back the memory that these graphs hold; a graph that is run later is loaded again."""
        ...


def split_axis(axis: str) -> tuple[int, str]:
    """An axis such as "h" or "4*h" as a factor and a name."""
    factor, _, name = axis.rpartition("*")
    return int(factor or 1), name


def axis_size(axis: int | str, sizes: Mapping[str, int]) -> int:
    """An axis as a number, for the sizes of the named ones."""
    if isinstance(axis, int):
        return axis
    factor, name = split_axis(axis)
    return factor * sizes[name]


def named_sizes(axes: Sequence[int | str], shape: Sequence[int]) -> dict[str, int]:
    """The inverse: the named axes' sizes, from an array's shape."""
    found = {}
    for axis, size in zip(axes, shape, strict=True):
        if isinstance(axis, str):
            factor, name = split_axis(axis)
            found[name] = size // factor
    return found


def to_numpy(values: Array) -> "NDArray[Any]":
    """An engine's array as a NumPy array of the same type, copied from the device if need be."""
    import numpy as np  # here, so that the command line can name engines in no time

    return values if isinstance(values, np.ndarray) else values.cpu().numpy()
