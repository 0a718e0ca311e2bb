"""Engines that stand in front of another one: what counts, times, keeps or changes what it is asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from engines.interface import Array, Engine, Range


class EngineProxy:
    """The engine itself, under another object; a subclass changes `run`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name, self.device, self.precision = engine.name, engine.device, engine.precision
        self.limits: Mapping[str, Range] = engine.limits
        self.captures = 0  # what is replayed does not come by here

    def array(self, values: NDArray[Any]) -> Array:
        return self.engine.array(values)

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.engine.run(graph, inputs)

    def release(self, graphs: Sequence[str]) -> None:
        self.engine.release(graphs)


class WatchedEngine(EngineProxy):
    """An engine with an onlooker: on_run(graph, inputs, run) is called for each run and gives its outputs."""

    def __init__(
        self,
        engine: Engine,
        on_run: Callable[[str, Mapping[str, Array], Callable[[], dict[str, Array]]], dict[str, Array]],
    ) -> None:
        super().__init__(engine)
        self.on_run = on_run

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.on_run(graph, inputs, lambda: self.engine.run(graph, inputs))
