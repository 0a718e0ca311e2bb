"""Runs the graphs of one model by name; with low memory, holds only those of one phase at a time."""

from collections.abc import Callable

from engines.interface import Array, Engine
from engines.outputs import OutputCheck
from mige_rt.config import ModelConfig
from mige_rt.graphs import GRAPHS, GraphName

# Graphs that must be there together when memory is low, in the order in which a run needs them.
PHASES: tuple[tuple[GraphName, ...], ...] = (
    ("vae_encoder", "image_encoder"),
    ("text_encoder",),
    ("conditioner", "denoiser"),
    ("vae_decoder",),
)


class GraphRunner:
    """An engine's graphs, each of which gives its first output."""

    def __init__(self, engine: Engine, config: ModelConfig, *, low_memory: bool = False) -> None:
        """Prepare to run an engine's graphs.

        Args:
            engine: What runs them.
            config: The model's, which says what they must give.
            low_memory: When a run comes to another phase, the graphs of the others are released.
        """
        self.engine = engine
        self.low_memory = low_memory
        self.check = OutputCheck(config)
        self._phase: tuple[GraphName, ...] | None = None  # the last one that was run
        self.before_denoiser_release: Callable[[], None] = lambda: None  # what holds the denoiser's memory lets it go

    def run(self, graph: GraphName, **inputs: Array) -> Array:
        """Run one graph on inputs by the names in GRAPHS[graph]; its first output.

        Raises:
            InputError: What it gives is not what the table of graphs says.
        """
        self._enter_phase_of(graph)
        outputs = self.engine.run(graph, inputs)
        self.check(graph, inputs, outputs)
        return outputs[GRAPHS[graph].outputs[0].name]

    def embed_timesteps(self, timesteps: Array) -> Array:
        """See `Engine.embed_timesteps`."""
        self._enter_phase_of("denoiser")
        return self.engine.embed_timesteps(timesteps)

    def _enter_phase_of(self, graph: GraphName) -> None:
        """Release what other phases need: once a phase, since it waits for the device, which a capture must not."""
        if not self.low_memory or (self._phase is not None and graph in self._phase):
            return
        phase = next(phase for phase in PHASES if graph in phase)
        others: list[GraphName] = [graph for graph in GRAPHS if graph not in phase]
        if "denoiser" in others:
            self.before_denoiser_release()
        self.engine.release(others)
        self._phase = phase
