"""One pipeline used by several threads at once."""

import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import same_image

from engines.interface import Array, Engine, to_numpy
from engines.wrapper import EngineWrapper
from mige_rt.graphs import GraphName
from mige_rt.pipeline import MigePipeline

SCENE = Path(__file__).parents[2] / "docs/scene.png"
SUBJECT = Path(__file__).parents[2] / "docs/subject.png"
THREADS = 8


def arguments(number: int, scene: Image.Image, subject: Image.Image) -> dict[str, Any]:
    """Of different tasks, prompts, sizes and batches."""
    edit = {"prompt": "make the background blue", "source": scene}
    generate = {"prompt": ["a <imagehere> on a plain background"] * 2, "images": [[subject]] * 2}
    compose = {
        "prompt": "replace the thing on the left in <imagehere> with <imagehere>",
        "source": scene,
        "images": [scene, subject],
        "width": 96,
    }
    return {**(edit, generate, compose)[number % 3], "seed": number, "num_inference_steps": 3}


class OverwritingEngine(EngineWrapper):
    """The engine, with outputs that the next run of a graph overwrites, as `Engine` allows; some engines do so."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.buffers: dict[Any, np.ndarray] = {}

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs: dict[str, Array] = {}
        for name, output in self.engine.run(graph, inputs).items():
            values = to_numpy(output)
            buffer = self.buffers.setdefault((graph, name, values.shape), np.empty_like(values))
            buffer[...] = values
            outputs[name] = buffer
        time.sleep(0.0005)  # other threads come on
        return outputs


@pytest.fixture
def own_pipe() -> MigePipeline:
    pipe = MigePipeline.from_pretrained(device="cpu")
    return MigePipeline(pipe.config, pipe.condition_encoder.tokenize, OverwritingEngine(pipe.engine))


def test_each_of_eight_threads_gets_its_own_images(own_pipe: MigePipeline) -> None:
    with Image.open(SCENE) as scene, Image.open(SUBJECT) as subject:
        scene.load()
        subject.load()
        alone = [own_pipe(**arguments(number, scene, subject)).images for number in range(2 * THREADS)]
    own_pipe.clear_cache()
    barrier = threading.Barrier(THREADS)
    with Image.open(SCENE) as scene, Image.open(SUBJECT) as subject:  # shared, and not yet decoded

        def make(first: int) -> list[list[Image.Image]]:
            barrier.wait()
            numbers = (first, first + THREADS)
            return [own_pipe(**arguments(number, scene, subject)).images for number in numbers]

        with ThreadPoolExecutor(THREADS) as pool:
            together = list(pool.map(make, range(THREADS)))
    for number in range(2 * THREADS):
        for image, expected in zip(together[number % THREADS][number // THREADS], alone[number], strict=True):
            assert same_image(image, expected), f"call {number}"


def test_a_callback_may_use_the_pipeline(own_pipe: MigePipeline) -> None:
    inner: list[Image.Image] = []

    def on_step_end(pipe: MigePipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        if not inner:
            inner.extend(pipe("a red apple", seed=2, num_inference_steps=2).images)

    outer = own_pipe("a cat", seed=1, num_inference_steps=3, callback_on_step_end=on_step_end).images
    assert same_image(outer[0], own_pipe("a cat", seed=1, num_inference_steps=3).images[0])
    assert same_image(inner[0], own_pipe("a red apple", seed=2, num_inference_steps=2).images[0])


def test_clearing_the_cache_waits_for_what_is_being_made(own_pipe: MigePipeline) -> None:
    with Image.open(SCENE) as scene:
        scene.load()
    expected = own_pipe("make it red", source=scene, seed=1, num_inference_steps=3).images[0]
    done = threading.Event()

    def clear() -> None:
        while not done.is_set():
            own_pipe.clear_cache()

    with ThreadPoolExecutor(1) as pool:
        clearing = pool.submit(clear)
        for _ in range(5):
            again = own_pipe("make it red", source=scene, seed=1, num_inference_steps=3).images[0]
            assert same_image(again, expected)
        done.set()
        clearing.result()
