"""An engine with an onlooker, which counts, times or keeps what the engine is asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from engines.interface import Array, Engine, Range


class WatchedEngine:
    """The engine itself, but on_run(graph, inputs, run) is called for each run and gives its outputs; run() runs it."""

    def __init__(
        self,
        engine: Engine,
        on_run: Callable[[str, Mapping[str, Array], Callable[[], dict[str, Array]]], dict[str, Array]],
    ) -> None:
        self.engine, self.on_run = engine, on_run
        self.name, self.device, self.precision = engine.name, engine.device, engine.precision
        self.limits: Mapping[str, Range] = engine.limits
        self.captures = 0  # what is replayed could not be seen

    def array(self, values: "NDArray[Any]") -> Array:
        return self.engine.array(values)

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.on_run(graph, inputs, lambda: self.engine.run(graph, inputs))

    def release(self, graphs: Sequence[str]) -> None:
        self.engine.release(graphs)
