"""Steps as CUDA graphs: the same latents as without, kept by shape, and no wait for the host between steps."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engines.pytorch import PyTorchEngine
from mige_rt.pipeline import MigePipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def pipes() -> tuple[MigePipeline, MigePipeline]:
    """Without and with capture."""
    plain, captured = (
        MigePipeline.from_pretrained(engine="pytorch", device="cuda", precision="fp16", cuda_graphs=cuda_graphs)
        for cuda_graphs in (False, True)
    )
    return plain, captured


def test_results_are_the_uncaptured_ones(pipes: tuple[MigePipeline, MigePipeline], scene: Image.Image) -> None:
    plain, captured = pipes
    cases: tuple[dict[str, Any], ...] = (
        {"seed": 1},
        {"seed": 2},  # replayed from the first step
        {"seed": 2, "guidance_scale": 3.0, "image_guidance_scale": 1.5},  # another number of branches
        {"seed": 1, "guidance_scale": 4.0},  # other weights on a graph that was captured before
        {"seed": 1, "scheduler": "ddim", "guidance_range": (0.2, 0.7)},  # two graphs in turn
        {"seed": 1, "reuse": 0.05},
    )
    for arguments in cases:
        made = [
            p("make it blue", source=scene, num_inference_steps=12, **arguments).images[0] for p in (plain, captured)
        ]  # type: ignore[arg-type]
        difference = np.abs(np.asarray(made[0], np.int16) - np.asarray(made[1], np.int16))
        assert difference.max() <= 1, arguments


def test_other_shapes_do_not_disturb_a_graph(pipes: tuple[MigePipeline, MigePipeline], scene: Image.Image) -> None:
    _, captured = pipes
    first = captured("make it blue", source=scene, seed=1, num_inference_steps=6).images[0]
    captured("remove the thing that stands on the left of the picture", source=scene, seed=1, num_inference_steps=6)
    captured(["make it blue"] * 3, source=scene, seed=1, num_inference_steps=6)
    again = captured("make it blue", source=scene, seed=1, num_inference_steps=6).images[0]
    assert first.tobytes() == again.tobytes()


def test_few_graphs_are_kept(pipes: tuple[MigePipeline, MigePipeline], scene: Image.Image) -> None:
    _, captured = pipes
    for number in range(1, 8):
        captured(["make it blue"] * number, source=scene, seed=1, num_inference_steps=4)
    assert captured._cuda_graphs is not None
    assert len(captured._cuda_graphs) == captured.engine.max_cuda_graphs
    captured.clear_cache()
    assert len(captured._cuda_graphs) == 0


def test_nothing_waits_for_the_host_between_steps(pipes: tuple[MigePipeline, MigePipeline], scene: Image.Image) -> None:
    """PyTorch raises at any call that waits for the device, from the second step on to the last."""
    _, captured = pipes
    captured("make it blue", source=scene, seed=1, num_inference_steps=8)

    def watch(pipe: MigePipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        torch.cuda.set_sync_debug_mode("error" if step < 7 else "default")

    try:
        captured("make it blue", source=scene, seed=2, num_inference_steps=8, callback_on_step_end=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_with_low_memory_the_peak_is_lower(scene: Image.Image) -> None:
    peaks = []
    for low_memory in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pipe = MigePipeline.from_pretrained(engine="pytorch", device="cuda", precision="fp16", low_memory=low_memory)
        assert isinstance(pipe.engine, PyTorchEngine)
        pipe("make it blue", source=scene, seed=1, num_inference_steps=4)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del pipe
    assert peaks[1] < peaks[0]
