"""Continuous batching: an image is the one that the pipeline makes alone, whatever is beside it, whenever it came."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.denoise import Conditioning
from mige_rt.errors import InputError
from mige_rt.graphs import GraphName
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import Request, resolve
from mige_rt.sampling_params import SamplingParams
from mige_rt.serve.options import Batching
from mige_rt.serve.protocol import Failed, Finished, ImageTask, PartialImage, Progress, Started, StepReport, TaskEvent
from mige_rt.serve.step_scheduler import StepScheduler, partial_image_steps


@pytest.fixture
def tasks(scene: Image.Image, reference: Image.Image) -> list[ImageTask]:
    """All three uses, one to three guidance branches, prompts of many lengths, two sizes, several numbers of steps."""
    small = scene.resize((48, 40))
    uses = [
        (Request("make the background blue", source=scene), SamplingParams(num_inference_steps=5)),
        (Request("a red apple"), SamplingParams(num_inference_steps=4)),
        (Request("a <imagehere> on a plain green background", (reference,)), SamplingParams(num_inference_steps=6)),
        (
            Request("replace the cat in <imagehere> with <imagehere>", (scene, reference), scene),
            SamplingParams(num_inference_steps=3, guidance_scale=4.0, image_guidance_scale=1.5),
        ),
        (
            Request("a <imagehere> and a <imagehere> beside a <imagehere>", (reference, small, scene)),
            SamplingParams(num_inference_steps=3, guidance_scale=1.0),
        ),
        (Request("let it snow " * 20, source=small), SamplingParams(num_inference_steps=4, width=96, height=64)),
        (Request("make it night", source=small), SamplingParams(num_inference_steps=7, scheduler="ddim")),
    ]
    return [
        ImageTask(f"{use}-{seed}", resolve(replace(request, seed=seed)), params)
        for use, (request, params) in enumerate(uses)
        for seed in (3, 4)
    ]


def run_until_idle(scheduler: StepScheduler) -> list[TaskEvent | StepReport]:
    events: list[TaskEvent | StepReport] = []
    while not scheduler.idle:
        events += scheduler.step()
    return events


def finished(events: list[TaskEvent | StepReport]) -> dict[str, Image.Image]:
    return {event.id: event.image for event in events if isinstance(event, Finished)}


def run_with_arrivals(scheduler: StepScheduler, tasks: list[ImageTask], seed: int) -> list[TaskEvent | StepReport]:
    """Tasks come in a random order, none to three before each step."""
    rng = random.Random(seed)
    arrivals = rng.sample(tasks, len(tasks))
    events: list[TaskEvent | StepReport] = []
    while arrivals or not scheduler.idle:
        for _ in range(min(rng.randrange(4), len(arrivals))):
            scheduler.submit(arrivals.pop())
        events += scheduler.step()
    return events


def test_an_image_is_the_same_to_the_last_bit_alone_and_among_others(
    pipe: MigePipeline, tasks: list[ImageTask]
) -> None:
    pipe.clear_cache()
    alone = {task.id: pipe.generate([task.request], task.params)[0] for task in tasks}
    for seed in range(2):
        pipe.clear_cache()
        events = run_with_arrivals(StepScheduler(pipe, 5), tasks, seed)
        images = finished(events)
        assert images.keys() == alone.keys()
        for name, image in images.items():
            assert image.tobytes() == alone[name].tobytes(), f"{name}, arrivals {seed}"
        batch_sizes = {size for event in events if isinstance(event, StepReport) for size in event.batch_sizes}
        assert max(batch_sizes) >= 3  # they did advance together


def test_latents_are_the_same_to_the_last_bit(pipe: MigePipeline, tasks: list[ImageTask]) -> None:
    """Images have 8 bits; the latents that they are decoded from have 32."""
    decoded: dict[bytes, int] = {}

    class Watched(MigePipeline):
        def decode(self, latents: object) -> list[Image.Image]:
            latents_bytes = np.asarray(latents).tobytes()
            decoded[latents_bytes] = decoded.get(latents_bytes, 0) + 1
            return super().decode(latents)  # pyright: ignore[reportArgumentType]

    watched = Watched(pipe.config, pipe.condition_encoder.tokenize, pipe.engine)
    chosen = tasks[::2]
    for task in chosen:
        watched.generate([task.request], task.params)
    run_with_arrivals(StepScheduler(watched, 5), chosen, 7)
    assert len(decoded) == len(chosen) and set(decoded.values()) == {2}


def test_images_start_in_the_order_in_which_they_came(pipe: MigePipeline, tasks: list[ImageTask]) -> None:
    scheduler = StepScheduler(pipe, 3)
    for task in tasks:
        scheduler.submit(task)
    events = run_until_idle(scheduler)
    assert [event.id for event in events if isinstance(event, Started)] == [task.id for task in tasks]
    for event in events:
        assert not isinstance(event, StepReport) or sum(event.batch_sizes) <= 3


def test_an_image_is_said_to_start_before_any_work_on_it(pipe: MigePipeline, tasks: list[ImageTask]) -> None:
    """Or else the server would not know which image ended a worker in its first step."""

    class EndedError(Exception):
        pass

    class Ending(MigePipeline):
        def encode_conditioning(self, *args: object) -> Conditioning:
            raise EndedError

    scheduler = StepScheduler(Ending(pipe.config, pipe.condition_encoder.tokenize, pipe.engine), 3)
    scheduler.submit(tasks[0])
    scheduler.submit(tasks[1])
    events: list[TaskEvent | StepReport] = []
    with pytest.raises(EndedError):
        events.extend(scheduler.step())
    assert events == [Started(tasks[0].id)]


@pytest.mark.parametrize(("batching", "sizes"), [("static", [3, 3, 1]), ("none", [1] * 7)])
def test_with_static_batching_none_joins_a_batch_that_has_begun_and_with_none_each_is_alone(
    pipe: MigePipeline, tasks: list[ImageTask], batching: Batching, sizes: list[int]
) -> None:
    scheduler = StepScheduler(pipe, 3, batching=batching)
    chosen = [replace(task, params=replace(task.params, num_inference_steps=2 + i % 2)) for i, task in enumerate(tasks)]
    for task in chosen[:7]:
        scheduler.submit(task)
    batches: list[int] = []  # how many started at once
    running = [0]  # after each step
    images: dict[str, Image.Image] = {}
    while not scheduler.idle:
        events = list(scheduler.step())
        started = sum(isinstance(event, Started) for event in events)
        assert not started or running[-1] == 0
        batches += [started] if started else []
        running.append(scheduler.running)
        images |= finished(events)
    assert images.keys() == {task.id for task in chosen[:7]}
    assert batches == sizes
    assert batching == "none" or running[1:4] == [3, 1, 0]  # those that are done leave the others


def test_a_call_takes_no_more_entries_than_the_graphs(pipe: MigePipeline, tasks: list[ImageTask]) -> None:
    three_branches = [task for task in tasks if task.id.startswith("3-")]
    scheduler = StepScheduler(pipe, 100)
    for i in range(3):
        for task in three_branches:
            scheduler.submit(replace(task, id=f"{task.id}-{i}"))
    events = run_until_idle(scheduler)
    limit = pipe.engine.limits["R"].max
    sizes = [size for event in events if isinstance(event, StepReport) for size in event.batch_sizes]
    assert max(sizes) == limit // 3
    assert len(finished(events)) == 6


def test_a_cancelled_image_leaves_before_the_next_step(pipe: MigePipeline, tasks: list[ImageTask]) -> None:
    scheduler = StepScheduler(pipe, 2)
    running, other, waiting = tasks[0], tasks[4], tasks[2]
    for task in (running, other, waiting):
        scheduler.submit(task)
    assert Started(running.id) in list(scheduler.step())
    scheduler.cancel(running.id)
    scheduler.cancel(waiting.id)
    scheduler.cancel("unknown")
    events = run_until_idle(scheduler)
    assert {event.batch_sizes for event in events if isinstance(event, StepReport)} == {(1,)}
    images = finished(events)
    assert [*images] == [other.id]
    assert images[other.id].tobytes() == pipe.generate([other.request], other.params)[0].tobytes()


def test_partial_images_come_midway_and_change_nothing(pipe: MigePipeline, tasks: list[ImageTask]) -> None:
    task = replace(tasks[4], partial_images=3)
    scheduler = StepScheduler(pipe, 4)
    scheduler.submit(task)
    scheduler.submit(tasks[1])
    events = run_until_idle(scheduler)
    partial = [event for event in events if isinstance(event, PartialImage)]
    assert [(event.id, event.index) for event in partial] == [(task.id, 0), (task.id, 1), (task.id, 2)]
    noisy: list[Image.Image] = []  # the latents after each step, which still hold noise

    def keep(pipe: MigePipeline, index: int, timestep: float, values: dict[str, Any]) -> None:
        noisy.extend(pipe.decode(values["latents"]))

    alone = pipe.generate([task.request], task.params, callback_on_step_end=keep)[0]
    assert finished(events)[task.id].tobytes() == alone.tobytes()

    def distance(image: Image.Image) -> float:
        return float(np.abs(np.asarray(image, np.float32) - np.asarray(alone)).mean())

    distances = [distance(event.image) for event in partial]
    assert distances[0] > distances[2]  # each is nearer to the last one
    steps = partial_image_steps(len(noisy), 3)
    assert all(d < distance(noisy[step - 1]) for d, step in zip(distances, steps, strict=True))


@pytest.mark.parametrize(
    ("steps", "partial_images", "due"),
    [(20, 0, []), (20, 1, [10]), (20, 3, [5, 10, 15]), (4, 3, [1, 2, 3]), (3, 3, [1, 2]), (2, 3, [1])],
)
def test_partial_images_are_spread_evenly(steps: int, partial_images: int, due: list[int]) -> None:
    assert partial_image_steps(steps, partial_images) == due


def test_steps_are_reported_of_the_image_that_asks_for_it(pipe: MigePipeline, tasks: list[ImageTask]) -> None:
    scheduler = StepScheduler(pipe, 2)
    asking, other = replace(tasks[0], report_steps=True), tasks[2]
    scheduler.submit(asking)
    scheduler.submit(other)
    reports = [event for event in run_until_idle(scheduler) if isinstance(event, Progress)]
    assert reports == [Progress(asking.id, step, 5) for step in range(1, 6)]


def test_an_image_that_cannot_be_made_is_refused_at_once(pipe: MigePipeline, tasks: list[ImageTask]) -> None:
    scheduler = StepScheduler(pipe, 4)
    with pytest.raises(InputError, match="number of steps is 1"):
        scheduler.submit(replace(tasks[0], params=SamplingParams(num_inference_steps=1)))
    with pytest.raises(InputError, match="multiples of"):
        scheduler.submit(replace(tasks[0], params=SamplingParams(width=63, height=64)))
    assert scheduler.idle


def test_an_image_that_overflows_fails_alone(pipe: MigePipeline, tasks: list[ImageTask]) -> None:
    scheduler = StepScheduler(pipe, 4)
    overflowing = replace(tasks[0], id="overflowing", params=SamplingParams(num_inference_steps=5, guidance_scale=1e38))
    scheduler.submit(overflowing)
    scheduler.submit(tasks[1])
    with np.errstate(all="ignore"):
        events = run_until_idle(scheduler)
    failed = [event for event in events if isinstance(event, Failed)]
    assert [(event.id, event.kind) for event in failed] == [("overflowing", "invalid_request")]
    assert "overflowed" in failed[0].message
    alone = pipe.generate([tasks[1].request], tasks[1].params)[0]
    assert finished(events)[tasks[1].id].tobytes() == alone.tobytes()


@pytest.mark.parametrize("graph", ["text_encoder", "vae_decoder"])
def test_a_graph_that_cannot_be_run_is_the_servers_fault(
    tmp_path: Path, tasks: list[ImageTask], graph: GraphName
) -> None:
    bundle = Path(shutil.copytree(DEFAULT_MODEL, tmp_path / "bundle"))
    scheduler = StepScheduler(MigePipeline.from_pretrained(bundle, device="cpu"), 4)
    (bundle / f"onnx/{graph}.onnx").unlink()  # it is loaded when it is needed
    scheduler.submit(tasks[0])
    failed = [event for event in run_until_idle(scheduler) if isinstance(event, Failed)]
    assert [(event.id, event.kind) for event in failed] == [(tasks[0].id, "server_error")]
    assert graph in failed[0].message


@pytest.mark.parametrize("engine", ["int8", "pytorch"])
def test_images_that_would_change_each_other_have_calls_of_their_own(
    bundles: Callable[[str], Path], tasks: list[ImageTask], engine: str
) -> None:
    if engine == "int8":
        pipe = MigePipeline.from_pretrained(bundles("int8"), device="cpu")
    else:
        pipe = MigePipeline.from_pretrained(engine="pytorch", device="cpu", precision="fp32")
    chosen = [replace(task, params=replace(task.params, num_inference_steps=2)) for task in tasks[:7:2]]
    scheduler = StepScheduler(pipe, 4)
    for task in chosen:
        scheduler.submit(task)
    events = run_until_idle(scheduler)
    assert {event.batch_sizes for event in events if isinstance(event, StepReport)} == {(1, 1, 1, 1)}
    images = finished(events)
    for task in chosen:
        pipe.clear_cache()
        assert images[task.id].tobytes() == pipe.generate([task.request], task.params)[0].tobytes()
