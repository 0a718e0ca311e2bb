"""Steps on torch tensors as CUDA graphs, captured once for each shape and replayed."""

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from cachetools import LRUCache
from torch import Tensor

if TYPE_CHECKING:
    from engines.interface import Engine

Tensors = tuple[Tensor, ...]
# (what stays the same for many steps, then what changes) -> results, of the shapes of the first that change
Function = Callable[..., Tensors]
Key = tuple[Function, tuple[tuple[tuple[int, ...], torch.dtype], ...]]

WARM_UP_STEPS = 2  # of a shape, uncaptured: libraries choose, compile and load their kernels, which no capture may hold

_log = logging.getLogger(__name__)


class CudaGraphRunner:
    """Runs functions on CUDA: uncaptured the first times that a shape comes, later as a captured graph.

    Both read and write the same tensors, so that what was compiled or chosen for the first is what is captured. Results
    are those of the function itself. Nothing is copied from the host, and nothing waits for it. What is returned is
    overwritten by the next run of the same shape. At most `engine.max_cuda_graphs` shapes are held, the last used.

    What cannot be captured is run as it is, then and from then on, and a warning says so once.
    """

    def __init__(self, engine: "Engine") -> None:
        """Prepare to capture.

        Args:
            engine: The one that the functions run; what a capture of it needs is held.
        """
        self._engine = engine
        self._stream = torch.cuda.Stream(engine.device)
        self._steps: LRUCache[Key, _StaticStep] = LRUCache(engine.max_cuda_graphs)
        self._failed = False

    def captured(self, function: Function) -> Function:
        """The same function, run as a captured graph.

        Args:
            function: Takes a named tuple of tensors, which is the same one as long as they are, and then the tensors
                that change from step to step. Gives results with the shapes of the first of those.
        """
        return partial(self._call, function)

    @torch.inference_mode(False)  # static tensors made in inference mode could not be written outside it
    @torch.no_grad()
    def _call(self, function: Function, inputs: Tensors, *changing: Tensor) -> Tensors:
        if self._failed:
            return function(inputs, *changing)
        current = torch.cuda.current_stream(self._engine.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            static = self._static_step(function, inputs, changing)
            static.load(inputs, changing)
            if static.graph is None and static.warm_ups == WARM_UP_STEPS:
                self._capture(static)
            if static.graph is None:
                results = static.run()
                static.warm_ups += 1
            else:
                static.graph.replay()
                results = static.held[0]
        current.wait_stream(self._stream)
        return static.changing[: len(results)]

    def clear(self) -> None:
        """Drop every graph with the memory it holds."""
        self._steps.clear()

    def __len__(self) -> int:
        """How many shapes are held, captured or about to be."""
        return len(self._steps)

    def _static_step(self, function: Function, inputs: Tensors, changing: Tensors) -> "_StaticStep":
        """The tensors of these shapes; new ones take the place of those used longest ago, which are dropped first."""
        key = function, tuple((tensor.shape, tensor.dtype) for tensor in (*inputs, *changing))
        if key not in self._steps:
            while len(self._steps) >= self._engine.max_cuda_graphs:
                self._steps.popitem()
            self._steps[key] = _StaticStep(function, inputs, changing)
        return self._steps[key]

    def _capture(self, static: "_StaticStep") -> None:
        """Give the step its graph, or note that there can be none: nothing of a capture that failed was run."""
        try:
            if not self._engine.is_capturable("denoiser"):
                raise RuntimeError("the runtime says that a run of the denoiser cannot be captured")
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate while this one captures.
            capture = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
            with _no_recompilation(), capture:
                results = static.run()
            static.held = results, getattr(self._engine, "workspace", None)
            static.graph = graph
        except Exception as error:
            self._failed = True
            self.clear()
            reason = " ".join(str(error).split())[:300]
            _log.warning("steps are run without CUDA graphs, which is slower: the capture failed (%s)", reason)
            with suppress(RuntimeError):  # images need none of the device's random numbers
                _renew_generator(self._stream.device_index)


def _renew_generator(device: int) -> None:
    """Give the device's generator of random numbers a state of its own again, with the same seed and offset.

    A capture that fails leaves it as if it were still captured, and PyTorch then refuses every random number, and to
    compile ("Offset increment outside graph capture").
    """
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


def _no_recompilation() -> AbstractContextManager[Any]:
    """Makes recompiling an error. Without torch's compiler, whose import takes seconds, nothing can be compiled."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("fail_on_recompile")


class _StaticStep:
    """The tensors that a function reads and writes for one shape, and the graph once there is one."""

    def __init__(self, function: Function, inputs: Tensors, changing: Tensors) -> None:
        self._function = function
        self._inputs: Any = type(inputs)(*map(torch.empty_like, inputs))
        self._copied_from: Tensors | None = None
        self.changing = tuple(map(torch.empty_like, changing))
        self.warm_ups = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: tuple[Tensors, Any] = (), None  # what must live as long as the graph, the results first

    def load(self, inputs: Tensors, changing: Tensors) -> None:
        """Copy what is not there yet."""
        if inputs is not self._copied_from:
            for static, given in zip(self._inputs, inputs, strict=True):
                static.copy_(given)
            self._copied_from = inputs
        for static, given in zip(self.changing, changing, strict=True):
            if given.data_ptr() != static.data_ptr():
                static.copy_(given)

    def run(self) -> Tensors:
        """Run the function, and put its results where the next step finds them."""
        results = self._function(self._inputs, *self.changing)
        for static, result in zip(self.changing, results, strict=False):  # what changes by itself comes last
            static.copy_(result)
        return results
