"""The server on Ray Serve: two replicas of two models answer, and one that ends loses nothing."""

import asyncio
import base64
import io
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any

import openai
import psutil
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema

from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import Request, resolve
from mige_rt.sampling_params import SamplingParams
from mige_rt.serve.backend import MAX_ATTEMPTS, QueueFullError
from mige_rt.serve.metrics import Metrics
from mige_rt.serve.protocol import Failed, Finished, ImageTask, Started, TaskEvent, TokenUsage
from mige_rt.serve.ray import RayBackend, RayOptions, app

DEPLOY = Path(__file__).parents[3] / "deploy"
PROMPT = "make the background blue"


# ---- what a replica's end or refusal comes to, without a cluster


class Replicas:
    """Stands for the handle of a deployment: each call has the next of several outcomes."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes, self.calls = list(outcomes), list[list[str]]()

    def options(self, **options: Any) -> "Replicas":
        assert options == {"stream": True, "multiplexed_model_id": "tiny"}
        return self

    @property
    def make(self) -> "Replicas":
        return self

    async def remote(self, tasks: list[ImageTask]) -> AsyncGenerator[TaskEvent]:
        self.calls.append([task.id for task in tasks])
        outcome = self.outcomes.pop(0)
        done = {RayActorError: 1, type(None): len(tasks)}.get(type(outcome), 0)  # how many images it makes
        for task in tasks if done else []:
            yield Started(task.id)
        for task in tasks[:done]:
            yield Finished(task.id, Image.new("RGB", (8, 8)), TokenUsage(1, 0, 4))
        if outcome is not None:
            raise outcome


async def events_of(replicas: Replicas, metrics: Metrics, names: str = "ab") -> list[TaskEvent]:
    """Of several images."""
    tasks = [ImageTask(name, resolve(Request("a cat")), SamplingParams()) for name in names]
    job = RayBackend(replicas, "tiny", metrics).submit(tasks)
    events: list[TaskEvent] = []
    while (event := await asyncio.wait_for(job.next_event(), 5)) is not None:
        events.append(event)
    return events


def gauges(metrics: Metrics) -> tuple[float | None, float | None]:
    names = ("mige:diffusion_num_queue_reqs", "mige:diffusion_num_running_reqs")
    queued, running = (metrics.registry.get_sample_value(name) for name in names)
    return queued, running


def test_what_a_replica_that_ended_had_is_made_by_another() -> None:
    replicas, metrics = Replicas(RayActorError(), None), Metrics()
    events = asyncio.run(events_of(replicas, metrics))
    assert replicas.calls == [["a", "b"], ["b"]]  # what was finished is not made again
    assert [(type(event), event.id) for event in events] == [
        (Started, "a"),
        (Started, "b"),
        (Finished, "a"),
        (Finished, "b"),
    ]
    assert gauges(metrics) == (0, 0)


def test_a_request_that_cannot_be_made_fails_with_the_reason() -> None:
    for outcome, kind, retry_after in (
        (QueueFullError(7), "queue_full", 7),
        (BackPressureError(num_queued_requests=3, max_queued_requests=2), "queue_full", 5),
    ):
        metrics = Metrics()
        events = asyncio.run(events_of(Replicas(outcome), metrics))
        assert [(event.kind, event.retry_after) for event in events if isinstance(event, Failed)] == [
            (kind, retry_after)
        ] * 2
        assert gauges(metrics) == (0, 0)
    events = asyncio.run(events_of(Replicas(*[RayActorError()] * MAX_ATTEMPTS), Metrics(), "abcd"))  # one each time
    assert [event.id for event in events if isinstance(event, Finished)] == ["a", "b", "c"]
    assert isinstance(events[-1], Failed) and f"ended {MAX_ATTEMPTS} times" in events[-1].message
    with pytest.raises(ValidationError, match="modelz"):
        RayOptions.model_validate({"modelz": {}})


def test_the_example_of_a_config_file_is_one_of_this_application() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load((DEPLOY / "ray-serve.yaml").read_text()))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    options = RayOptions.model_validate(application.args)
    built = getattr(import_module(module), name)(options)
    api = built._bound_deployment
    assert api.name == "ApiServer"
    engine = api.init_args[0]._bound_deployment
    assert [deployment.name for deployment in application.deployments] == [engine.name] == ["ImageEngine"]
    scaling = engine._deployment_config.autoscaling_config
    assert (scaling.max_replicas, scaling.target_ongoing_requests) == (options.max_replicas, options.max_batch)


# ---- on a cluster of this machine


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def other_bundle(other_model: Callable[..., Path]) -> Path:
    return other_model("denoiser", "blocks.2.attn.qkv.weight", 1.2)


@contextmanager
def ray_serve(**options: Any) -> Generator[openai.OpenAI]:
    """A client of the application, which runs on this machine as a cluster of four processors."""
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        patient = {"device": "cpu", "max_wait": 500, "timeout": 500}
        serve.run(app(RayOptions.model_validate({**patient, **options})))
        url = f"http://127.0.0.1:{port}/v1"
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    finally:
        serve.shutdown()
        ray.shutdown()


def edit(client: openai.OpenAI, model: str, scene: Image.Image, seed: int, steps: int = 4) -> Image.Image:
    settings = {"seed": seed, "num_inference_steps": steps}
    data = client.images.edit(image=png(scene), prompt=PROMPT, model=model, extra_body=settings).data
    assert data is not None and data[0].b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(data[0].b64_json)))


def workers() -> dict[int, psutil.Process]:
    """The engine workers, by their replicas' processes."""
    return {
        child.ppid(): child
        for replica in psutil.process_iter(["cmdline"])  # of one that has ended it is None
        if "ImageEngine" in " ".join(replica.info["cmdline"] or ())
        for child in replica.children()
    }


@pytest.mark.long
def test_two_replicas_answer_for_two_models_and_one_that_ends_loses_nothing(
    pipe: MigePipeline, other_bundle: Path, scene: Image.Image
) -> None:
    models = {"first": str(DEFAULT_MODEL), "second": str(other_bundle)}
    with ray_serve(models=models, max_batch=4, min_replicas=2, max_replicas=2) as client:
        check_two_replicas(client, pipe, other_bundle, scene)


def check_two_replicas(client: openai.OpenAI, pipe: MigePipeline, other_bundle: Path, scene: Image.Image) -> None:
    assert [model.id for model in client.models.list()] == ["first", "second"]
    with pytest.raises(openai.NotFoundError, match="there is no model 'third'"):
        edit(client, "third", scene, 0)
    pipes = pipe, MigePipeline.from_pretrained(other_bundle, device="cpu")
    expected = [
        pipes[seed % 2](PROMPT, source=scene, seed=seed, num_inference_steps=4).images[0].tobytes()
        for seed in range(12)
    ]
    with ThreadPoolExecutor(12) as pool:
        images = pool.map(lambda seed: edit(client, ("first", "second")[seed % 2], scene, seed).tobytes(), range(12))
        assert list(images) == expected
    running = workers()
    assert len(running) == 2  # a replica's workers are started by its first requests: both had some
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(edit, client, "first", scene, seed, 40) for seed in range(6)]
        victim = max(running, key=lambda replica: running[replica].cpu_times().user)
        os.kill(victim, signal.SIGKILL)
        for seed, answer in enumerate(answers):
            alone = pipe(PROMPT, source=scene, seed=seed, num_inference_steps=40).images[0]
            assert answer.result().tobytes() == alone.tobytes()
    stream = client.images.edit(
        image=png(scene), prompt=PROMPT, stream=True, partial_images=1, extra_body={"num_inference_steps": 4}
    )
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.long
def test_more_requests_than_a_replica_takes_start_another(pipe: MigePipeline, scene: Image.Image) -> None:
    alone = pipe(PROMPT, source=scene, seed=0, num_inference_steps=100).images[0].tobytes()
    with ray_serve(max_batch=1, min_replicas=1, max_replicas=2) as client:
        edit(client, "tiny", scene, 0)
        assert len(workers()) == 1
        done = Event()

        def keep_asking(_: int) -> bytes:
            while True:
                image = edit(client, "tiny", scene, 0, steps=100).tobytes()
                if done.is_set():
                    return image

        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(keep_asking, i) for i in range(6)]
            try:
                wait_until(lambda: len(workers()) == 2, "six requests at a time, and a second replica has no worker")
            finally:
                done.set()
        assert {answer.result() for answer in answers} == {alone}


def wait_until(condition: Callable[[], bool], otherwise: str, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(1)
