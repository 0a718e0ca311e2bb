"""How far an image made among others is from the one made alone, as the documentation's table says it."""

from collections.abc import Callable, Mapping

from benchmarks.step_batching import Difference, compare, make_alone, make_among_others, sample_tasks
from engines.interface import Array
from engines.wrapper import HookedEngine
from mige_rt.graphs import GraphName
from mige_rt.pipeline import MigePipeline


def _mix(graph: GraphName, inputs: Mapping[str, Array], run: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    """The denoiser adds a part of its batch's mean to each entry."""
    outputs = run()
    if graph == "denoiser":
        outputs["prediction"] = outputs["prediction"] + 0.01 * outputs["prediction"].mean()  # pyright: ignore[reportAttributeAccessIssue]
    return outputs


def difference(pipe: MigePipeline, one_image_a_call: bool | None = None) -> Difference:
    tasks = sample_tasks(64, 2)
    return compare(make_alone(pipe, tasks), [make_among_others(pipe, tasks, 0, one_image_a_call)])


def test_a_denoiser_that_mixes_its_batch_is_noticed(pipe: MigePipeline) -> None:
    exact = difference(pipe)
    assert (exact.latents, exact.pixels, exact.same) == (0, 0, 1)
    assert exact.batch_size > 1
    mixing = MigePipeline(pipe.config, pipe.condition_encoder.tokenize, HookedEngine(pipe.engine, _mix))
    mixed = difference(mixing)
    assert mixed.latents > 1e-4 and mixed.same < 1
    alone = difference(mixing, one_image_a_call=True)
    assert (alone.latents, alone.same, alone.batch_size) == (0, 1, 1)
