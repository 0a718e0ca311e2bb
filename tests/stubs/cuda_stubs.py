"""CUDA's streams and graphs on the CPU: a capture notes operations, and a replay runs them again on the same tensors.

What a capture forbids is an error here as there: waiting for the device, reading a value on the host, giving memory
back.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CaptureError(RuntimeError):
    """What CUDA says to an operation that a capture does not take."""


class Stream:
    """A stream that knows which others it waited for; `log` has all that happens."""

    log: list[str] = []  # noqa: RUF012, one for all streams of a test
    current: "Stream"
    handles = 0

    def __init__(self, device: object = None) -> None:
        Stream.handles += 1
        self.cuda_stream = Stream.handles
        self.device_index = 0

    def wait_stream(self, other: "Stream") -> None:
        Stream.log.append(f"{self.cuda_stream} waits for {other.cuda_stream}")


class Graph:
    """A captured graph: operations, each with the tensors that it wrote."""

    captures = 0  # of all graphs since the stubs were put in place
    replays = 0

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def replay(self) -> None:
        Graph.replays += 1
        with torch.inference_mode():
            for func, args, kwargs, outputs in self.operations:
                results = func(*args, **kwargs)
                if func._schema.is_mutable:
                    continue
                for output, result in zip(tree_leaves(outputs), tree_leaves(results), strict=True):
                    if isinstance(output, Tensor):
                        output.copy_(result)


class _Recorder(TorchDispatchMode):
    """Notes what is no view. What writes to a tensor of before the capture is not run: a capture runs nothing."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise CaptureError("a value is read on the host")
        if func is torch.ops.aten.copy_.default:
            self.graph.operations.append((func, args, kwargs, args[0]))
            return args[0]
        outputs = func(*args, **kwargs)
        # By its storage, since a reshape may be a copy.
        read = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        is_view = not read.isdisjoint(
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor)
        )
        if func._schema.is_mutable or not is_view:
            self.graph.operations.append((func, args, kwargs, outputs))
        return outputs


class RandomState:
    """What a generator holds; `captured` while a capture draws from it, and for ever after one that failed."""

    def __init__(self) -> None:
        self.captured = False


class RandomGenerator:
    """A device's generator of random numbers."""

    def __init__(self) -> None:
        self.state = RandomState()

    def clone_state(self) -> "RandomGenerator":
        """One with a state of its own."""
        return RandomGenerator()

    def graphsafe_set_state(self, other: "RandomGenerator") -> None:
        """Take another's state."""
        self.state = other.state


class Cuda:
    """The stubs, and what they saw."""

    def __init__(self) -> None:
        self.capturing = False
        self.fail_captures = False
        self.generator = RandomGenerator()
        self.records = True  # without it replays do nothing: compiled code is another under the mode that records
        Graph.captures = Graph.replays = Stream.handles = 0
        Stream.log = []
        self.default_stream = Stream()
        self.default_stream.cuda_stream = 0
        Stream.current = self.default_stream

    @property
    def captures(self) -> int:
        return Graph.captures

    @property
    def replays(self) -> int:
        return Graph.replays

    def forbidden(self, *_: object) -> None:
        if self.capturing:
            raise CaptureError("operation not permitted when stream is capturing")

    @contextmanager
    def graph(self, graph: Graph, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert Stream.current is stream, "captured on another stream than the one that it was warmed up on"
        if self.fail_captures:
            self.generator.state.captured = True
            raise CaptureError("operation failed due to a previous error during capture")
        self.capturing = True
        try:
            with _Recorder(graph) if self.records else nullcontext():
                yield
        finally:
            self.capturing = False
        Graph.captures += 1

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, stream
        try:
            yield
        finally:
            Stream.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """torch.cuda's streams and graphs, stubbed."""
    cuda = Cuda()
    for name, stub in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": cuda.graph,
        "stream": cuda.stream,
        "current_stream": lambda device=None: Stream.current,
        "default_generators": (cuda.generator,),
        "synchronize": cuda.forbidden,
        "empty_cache": cuda.forbidden,
        "mem_get_info": lambda device=None: (3 << 30, 80 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    return cuda
