"""A step of the loop as a CUDA graph, captured once for each shape and replayed."""

from typing import TYPE_CHECKING, Any, cast

import torch
from cachetools import LRUCache
from torch import Tensor

from mige_rt.denoise import LoopInputs, Step

if TYPE_CHECKING:
    from engines.interface import Engine

ShapeKey = tuple[tuple[tuple[int, ...], torch.dtype], ...]


class CudaGraphRunner:
    """A `Step` on torch tensors on CUDA: as it is the first time that a shape comes, later as a captured graph.

    Results are those of the step itself. Nothing is copied from the host, and nothing waits for it. What is returned
    is overwritten by the next step of the same shape. At most `engine.max_cuda_graphs` graphs are held, the last used.
    """

    def __init__(self, step: Step, engine: "Engine") -> None:
        """Prepare to capture.

        Args:
            step: What is captured.
            engine: The one that step runs; what a capture of it needs is held.
        """
        self._step, self._engine = step, engine
        self._stream = torch.cuda.Stream(engine.device)
        self._warmed_up: ShapeKey | None = None
        self._graphs: LRUCache[ShapeKey, _CapturedStep] = LRUCache(engine.max_cuda_graphs)

    def __call__(
        self, inputs: LoopInputs, latents: Tensor, data_before: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `denoise.Step`."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in (*inputs, latents))
        current = torch.cuda.current_stream(self._engine.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if key in self._graphs:
                outputs = self._graphs[key](inputs, latents, data_before, coefficients)
            elif key != self._warmed_up:  # libraries choose and load their kernels, which cannot be captured
                while len(self._graphs) >= self._engine.max_cuda_graphs:
                    self._graphs.popitem()  # before the next is captured, which needs memory, too
                self._warmed_up = key
                outputs = self._step_tensors(inputs, latents, data_before, coefficients)
            else:
                self._graphs[key] = self._capture(inputs, latents, data_before, coefficients)
                outputs = self._graphs[key](inputs, latents, data_before, coefficients)
        current.wait_stream(self._stream)
        return outputs

    def clear(self) -> None:
        """Drop every graph with the memory it holds."""
        self._graphs.clear()
        self._warmed_up = None

    def __len__(self) -> int:
        """How many graphs are held."""
        return len(self._graphs)

    def _step_tensors(
        self, inputs: LoopInputs, latents: Tensor, data_before: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", self._step(inputs, latents, data_before, coefficients))

    def _capture(
        self, inputs: LoopInputs, latents: Tensor, data_before: Tensor, coefficients: Tensor
    ) -> "_CapturedStep":
        static_inputs = LoopInputs(*(cast("Tensor", tensor).clone() for tensor in inputs))
        captured = _CapturedStep(static_inputs, latents.clone(), data_before.clone(), coefficients.clone())
        with torch.cuda.graph(captured.graph, stream=self._stream):
            after, data = self._step_tensors(
                static_inputs, captured.latents, captured.data_before, captured.coefficients
            )
            captured.latents.copy_(after)
            captured.data_before.copy_(data)
        captured.held = (after, data, getattr(self._engine, "workspace", None))
        return captured


class _CapturedStep:
    """One graph, and the tensors that it reads and writes."""

    def __init__(self, inputs: LoopInputs, latents: Tensor, data_before: Tensor, coefficients: Tensor) -> None:
        self.inputs = inputs
        self.latents, self.data_before, self.coefficients = latents, data_before, coefficients
        self.graph = torch.cuda.CUDAGraph()
        self.held: Any = None  # what must live as long as the graph
        self._copied_from: LoopInputs | None = None

    def __call__(
        self, inputs: LoopInputs, latents: Tensor, data_before: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
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
        self.graph.replay()
        return self.latents, self.data_before
