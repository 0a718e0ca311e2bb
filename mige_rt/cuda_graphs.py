"""A step of the loop as a CUDA graph, captured once for each shape and replayed."""

import logging
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, cast

import torch
from cachetools import LRUCache
from torch import Tensor

from mige_rt.denoise import LoopInputs, Step

if TYPE_CHECKING:
    from engines.interface import Engine

ShapeKey = tuple[tuple[tuple[int, ...], torch.dtype], ...]

WARM_UP_STEPS = 2  # of a shape, uncaptured: libraries choose, compile and load their kernels, which no capture may hold

_log = logging.getLogger(__name__)


class CudaGraphRunner:
    """A `Step` on torch tensors on CUDA: uncaptured the first times that a shape comes, later as a captured graph.

    Both read and write the same tensors, so that what was compiled or chosen for the first is what is captured. Results
    are those of the step itself. Nothing is copied from the host, and nothing waits for it. What is returned is
    overwritten by the next step of the same shape. At most `engine.max_cuda_graphs` shapes are held, the last used.

    A step that cannot be captured is run as it is, then and from then on, and a warning says so once.
    """

    def __init__(self, step: Step, engine: "Engine") -> None:
        """Prepare to capture.

        Args:
            step: What is captured.
            engine: The one that step runs; what a capture of it needs is held.
        """
        self._step, self._engine = step, engine
        self._stream = torch.cuda.Stream(engine.device)
        self._steps: LRUCache[ShapeKey, _StaticStep] = LRUCache(engine.max_cuda_graphs)
        self._failed = False

    @torch.inference_mode(False)  # static tensors made in inference mode could not be written outside it
    @torch.no_grad()
    def __call__(
        self, inputs: LoopInputs, latents: Tensor, data_before: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `denoise.Step`."""
        if self._failed:
            return self._run(inputs, latents, data_before, coefficients)
        current = torch.cuda.current_stream(self._engine.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            static = self._static_step(inputs, latents, data_before, coefficients)
            static.load(inputs, latents, data_before, coefficients)
            if static.graph is None and static.warm_ups == WARM_UP_STEPS:
                self._capture(static)
            if static.graph is None:
                self._run_static(static)
                static.warm_ups += 1
            else:
                static.graph.replay()
        current.wait_stream(self._stream)
        return static.latents, static.data_before

    def clear(self) -> None:
        """Drop every graph with the memory it holds."""
        self._steps.clear()

    def __len__(self) -> int:
        """How many shapes are held, captured or about to be."""
        return len(self._steps)

    def _run(
        self, inputs: LoopInputs, latents: Tensor, data_before: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", self._step(inputs, latents, data_before, coefficients))

    def _static_step(
        self, inputs: LoopInputs, latents: Tensor, data_before: Tensor, coefficients: Tensor
    ) -> "_StaticStep":
        """The tensors of these shapes; new ones take the place of those used longest ago, which are dropped first."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in (*inputs, latents))
        if key not in self._steps:
            while len(self._steps) >= self._engine.max_cuda_graphs:
                self._steps.popitem()
            self._steps[key] = _StaticStep(inputs, latents, data_before, coefficients)
        return self._steps[key]

    def _run_static(self, static: "_StaticStep") -> tuple[Tensor, Tensor]:
        after, data = self._run(static.inputs, static.latents, static.data_before, static.coefficients)
        static.latents.copy_(after)
        static.data_before.copy_(data)
        return after, data

    def _capture(self, static: "_StaticStep") -> None:
        """Give the step its graph, or note that there can be none: nothing of a capture that failed was run."""
        try:
            if not self._engine.is_capturable("denoiser"):
                raise RuntimeError("the runtime says that a run of the denoiser cannot be captured")
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate while this one captures.
            capture = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
            with _no_recompilation(), capture:
                outputs = self._run_static(static)
            static.held = (*outputs, getattr(self._engine, "workspace", None))
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
    """The tensors that the steps of one shape read and write, and the graph once there is one."""

    def __init__(self, inputs: LoopInputs, latents: Tensor, data_before: Tensor, coefficients: Tensor) -> None:
        self.inputs = LoopInputs(*(torch.empty_like(cast("Tensor", tensor)) for tensor in inputs))
        self.latents, self.data_before = torch.empty_like(latents), torch.empty_like(data_before)
        self.coefficients = torch.empty_like(coefficients)
        self.warm_ups = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: Any = None  # what must live as long as the graph
        self._copied_from: LoopInputs | None = None

    def load(self, inputs: LoopInputs, latents: Tensor, data_before: Tensor, coefficients: Tensor) -> None:
        """Copy what is not there yet."""
        if inputs is not self._copied_from:
            for static, given in zip(self.inputs, inputs, strict=True):
                cast("Tensor", static).copy_(cast("Tensor", given))
            self._copied_from = inputs
        for static, given in (
            (self.latents, latents),
            (self.data_before, data_before),
            (self.coefficients, coefficients),
        ):
            if given.data_ptr() != static.data_ptr():
                static.copy_(given)
