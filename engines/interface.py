"""What every engine is: the six graphs of one model, run by one runtime on one device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from mige_rt.config import Precision
from mige_rt.graphs import AxisRange, GraphName
from mige_rt.lora import Lora, require_pytorch

if TYPE_CHECKING:
    from numpy.typing import NDArray

Attention = Literal["auto", "cudnn", "flash", "efficient", "math"]


class Array(Protocol):
    """What NumPy arrays (engines on the CPU) and torch tensors (engines on CUDA) have in common.

    Functions beyond operators and indexing come from `array_api_compat`, which knows both.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...

    @property
    def dtype(self) -> Any:
        """NumPy's or PyTorch's."""
        ...

    def __getitem__(self, key: Any, /) -> Any: ...
    def __add__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def __rmul__(self, other: Any, /) -> Any: ...
    def __truediv__(self, other: Any, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is opened.

    Attributes:
        device: cpu, cuda, cuda:N; auto: cuda where there is one.
        precision: auto: a bundle's own; PyTorch's default for the device.
        low_memory: Load a graph when it is first run.
        compile: Put the layers of PyTorch's denoiser through `torch.compile`.
        attention: Which implementation of attention PyTorch uses on CUDA; auto: the fastest, measured at opening.
        trust: Run graphs and plans that were not made here without trying them first.
    """

    device: str = "auto"
    precision: Precision | Literal["auto"] = "auto"
    low_memory: bool = False
    compile: bool = False
    attention: Attention = "auto"
    trust: bool = False


class Engine(Protocol):
    """The six graphs of one model, opened by one runtime on one device.

    Attributes:
        name: One of `engines.factory.ENGINES`.
        device: cpu or cuda:N.
        precision: What the graphs compute in.
        limits: The ranges of the named axes that it takes; an axis that is not there may be of any size.
        max_cuda_graphs: How many CUDA graphs of its denoiser, of different shapes, may be alive at a time; 0 where none
            can be captured.
    """

    name: str
    device: str
    precision: str
    limits: Mapping[str, AxisRange]
    max_cuda_graphs: int

    def array(self, values: "NDArray[Any]") -> Array:
        """`values` as this engine takes them, on its device."""
        ...

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one graph.

        Args:
            graph: Which.
            inputs: By the names in GRAPHS[graph].

        Returns:
            The outputs by their names. Those in INTERNAL_TENSORS may be of the engine's own precision.
        """
        ...

    def embed_timesteps(self, timesteps: Array) -> Array:
        """What the denoiser takes in the place of timesteps, so that no step of the loop computes it.

        Args:
            timesteps: float32 [S], on this engine's device.

        Returns:
            float32 [S,E], or the timesteps themselves where the denoiser's graph takes nothing else.
        """
        ...

    def is_capturable(self, graph: GraphName) -> bool:
        """Whether a run of `graph` can be captured on the current CUDA stream; asked after a run of the same shapes."""
        ...

    def release(self, graphs: Sequence[GraphName]) -> None:
        """Give back the memory that these graphs hold; a graph that is run later is loaded again."""
        ...


@runtime_checkable
class LoraEngine(Engine, Protocol):
    """An engine whose weights can be changed after it was opened."""

    def set_loras(self, loras: Sequence[Lora]) -> None:
        """Merge LoRAs into the weights as they were opened, in place of those that were merged before.

        Raises:
            InputError: A LoRA cannot be used with this model; nothing is changed then.
        """
        ...


def lora_engine(engine: Engine) -> LoraEngine:
    """The engine itself, if its weights can be changed.

    Raises:
        NotAvailableError: They cannot.
    """
    require_pytorch(engine.name)
    assert isinstance(engine, LoraEngine)
    return engine


def array_namespace(*arrays: Array) -> Any:
    """The array API of these arrays' library (`array_api_compat`): NumPy's or PyTorch's functions."""
    from array_api_compat import array_namespace as namespace

    return namespace(*arrays)


def device(array: Array) -> Any:
    """Where an array lies, as its library's functions take it."""
    from array_api_compat import device as device_of  # pyright: ignore[reportUnknownVariableType]

    return device_of(array)  # pyright: ignore[reportUnknownVariableType, reportArgumentType]


def to_numpy(values: Array) -> "NDArray[Any]":
    """An engine's array as a NumPy array of the same type, copied from the device if need be."""
    import numpy as np  # here, so that the command line can name engines in no time

    return values if isinstance(values, np.ndarray) else values.cpu().numpy()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
