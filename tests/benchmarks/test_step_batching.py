"""How far an image made among others is from the one made alone, as the documentation's table says it."""

from typing import Any

from benchmarks.step_batching import measure, sample_tasks
from engines.interface import Array
from mige_rt.pipeline import MigePipeline


def test_a_denoiser_that_mixes_its_batch_is_noticed(pipe: MigePipeline) -> None:
    tasks = sample_tasks(64, 2)
    exact = measure(pipe, tasks, 1, None)
    assert (exact.latents, exact.pixels, exact.same) == (0, 0, 1)
    assert exact.batch_size > 1
    mixing = MigePipeline(pipe.config, pipe.condition_encoder.tokenize, _Mixing(pipe.engine))
    mixed = measure(mixing, tasks, 1, None)
    assert mixed.latents > 1e-4 and mixed.same < 1
    alone = measure(mixing, tasks, 1, one_image_a_call=True)
    assert (alone.latents, alone.same, alone.batch_size) == (0, 1, 1)


class _Mixing:
    """An engine whose denoiser adds a part of its batch's mean to each entry."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, graph: Any, inputs: Any) -> dict[str, Array]:
        outputs = self._engine.run(graph, inputs)
        if graph == "denoiser":
            outputs["prediction"] = outputs["prediction"] + 0.01 * outputs["prediction"].mean()
        return outputs
