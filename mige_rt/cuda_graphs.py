"""A step of the loop as a CUDA graph, captured once for each shape and replayed."""

from collections import OrderedDict
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mige_rt.denoise import Conditions, Step

if TYPE_CHECKING:
    from engines.interface import Engine

Key = tuple[tuple[torch.Size, torch.dtype], ...]


class CapturedSteps:
    """Runs a step as `Step` says, with torch tensors on CUDA: a shape's first time as it is, later as a captured graph.

    Results are those of the step itself. Nothing is copied from the host, and nothing waits for it. What is returned
    is overwritten by the next step of the same shape. At most `engine.captures` graphs are held, those that were used
    last.
    """

    def __init__(self, step: Step, engine: "Engine") -> None:
        """engine: the one that step runs; what a capture of it needs is held."""
        self._step, self._engine = step, engine
        self._stream = torch.cuda.Stream(engine.device)
        self._seen: Key | None = None
        self._graphs: OrderedDict[Key, _Captured] = OrderedDict()

    def __call__(self, seen: Conditions, latents: Tensor, before: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        tensors = (*(getattr(seen, field.name) for field in fields(seen)), latents)
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        current = torch.cuda.current_stream(self._engine.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if key in self._graphs:
                self._graphs.move_to_end(key)
                made = self._graphs[key](seen, latents, before, row)
            elif key != self._seen:  # libraries choose and load their kernels, which cannot be captured
                while len(self._graphs) >= self._engine.captures:
                    self._graphs.popitem(last=False)
                self._seen = key
                made = self._step(seen, latents, before, row)
            else:
                self._graphs[key] = _Captured(self._step, self._engine, self._stream, seen, latents, before, row)
                made = self._graphs[key](seen, latents, before, row)
        current.wait_stream(self._stream)
        return made

    def clear(self) -> None:
        """Drop every graph with the memory it holds."""
        self._graphs.clear()
        self._seen = None


class _Captured:
    """One graph, and the places it reads and writes."""

    def __init__(
        self,
        step: Step,
        engine: "Engine",
        stream: torch.cuda.Stream,
        seen: Conditions,
        latents: Tensor,
        before: Tensor,
        row: Tensor,
    ) -> None:
        self.seen = replace(seen, **{field.name: getattr(seen, field.name).clone() for field in fields(seen)})
        self.latents, self.before, self.row = latents.clone(), before.clone(), row.clone()
        self.loaded: Conditions | None = None
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            after, data = step(self.seen, self.latents, self.before, self.row)
            self.latents.copy_(after)
            self.before.copy_(data)
        self.held: Any = (after, data, getattr(engine, "workspace", None))

    def __call__(self, seen: Conditions, latents: Tensor, before: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        if seen is not self.loaded:
            for field in fields(seen):
                getattr(self.seen, field.name).copy_(getattr(seen, field.name))
            self.loaded = seen
        for place, given in ((self.latents, latents), (self.before, before), (self.row, row)):
            if given.data_ptr() != place.data_ptr():
                place.copy_(given)
        self.graph.replay()
        return self.latents, self.before
