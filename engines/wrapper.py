"""Engines around another one: what counts, times, keeps or changes what it is asked for."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from engines.interface import Array, Engine, lora_engine
from mige_rt.graphs import AxisRange, GraphName
from mige_rt.lora import Lora


class EngineWrapper:
    """The engine itself, under another object; a subclass changes `run`."""

    def __init__(self, engine: Engine) -> None:
        """Wrap an engine."""
        self.engine = engine
        self.name, self.device, self.precision = engine.name, engine.device, engine.precision
        self.limits: Mapping[str, AxisRange] = engine.limits
        self.max_cuda_graphs = 0  # what is replayed does not come through here

    def array(self, values: NDArray[Any]) -> Array:
        """See `Engine.array`."""
        return self.engine.array(values)

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`."""
        return self.engine.run(graph, inputs)

    def embed_timesteps(self, timesteps: Array) -> Array:
        """See `Engine.embed_timesteps`: a wrapper sees the graph's inputs as the table of graphs has them."""
        return timesteps

    def is_capturable(self, graph: GraphName) -> bool:
        """See `Engine.is_capturable`."""
        return False

    def release(self, graphs: Sequence[GraphName]) -> None:
        """See `Engine.release`."""
        self.engine.release(graphs)

    def set_loras(self, loras: Sequence[Lora]) -> None:
        """See `LoraEngine.set_loras`."""
        lora_engine(self.engine).set_loras(loras)


class CountingEngine(EngineWrapper):
    """An engine that counts how often each of its graphs is run, in `calls`."""

    def __init__(self, engine: Engine) -> None:
        """Wrap an engine."""
        super().__init__(engine)
        self.calls: Counter[GraphName] = Counter()

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`."""
        self.calls[graph] += 1
        return self.engine.run(graph, inputs)


# (graph, inputs, run) -> outputs: `run()` is what the wrapped engine gives
Hook = Callable[[GraphName, Mapping[str, Array], Callable[[], dict[str, Array]]], dict[str, Array]]


class HookedEngine(EngineWrapper):
    """An engine with a hook around each run of a graph."""

    def __init__(self, engine: Engine, hook: Hook) -> None:
        """Wrap an engine.

        Args:
            engine: What runs the graphs.
            hook: Is called instead, and gives the outputs.
        """
        super().__init__(engine)
        self.hook = hook

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`."""
        return self.hook(graph, inputs, lambda: self.engine.run(graph, inputs))
