"""The server as a Ray Serve application, `mige_rt.serve.ray:app`: replicas, autoscaling, one model or several.

`ApiServer` has the API. It decodes a request and streams its images' events from a replica of `ImageEngine`, which has
a supervisor with its engine worker for each model that it has opened. Ray routes a request to a replica that has its
model open already, if one has.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.serve.api import create_app
from mige_rt.serve.backend import MAX_ATTEMPTS, Job, QueueFullError
from mige_rt.serve.image_service import ImageService
from mige_rt.serve.metrics import Metrics
from mige_rt.serve.options import ServerOptions
from mige_rt.serve.protocol import Failed, FailureKind, Finished, ImageTask, PartialImage, Progress, Started, TaskEvent
from mige_rt.serve.supervisor import QueueLimits, Supervisor
from mige_rt.serve.worker import WorkerOptions

_serve: Any = serve  # its types are partly unknown
_ENGINE = "ImageEngine"  # the name of its deployment
_QUEUE_FULL = "the queue is full; try again later"
_RETRY_AFTER = 5  # seconds, when the replicas are full

_log = logging.getLogger(__name__)


class RayOptions(BaseModel):
    """The application's arguments, in a config file under `args`.

    Attributes:
        models: Bundles, model folders or repositories by the names that requests call them; the first one is that of
            requests that name none. Every machine must find them.
        engine: See `MigePipeline.from_pretrained`.
        device: The same.
        precision: The same.
        max_batch: Images of a model that advance together on a replica at most.
        max_queue: Images of a model that wait on a replica at most, and requests that wait for a replica.
        max_wait: Seconds that a request waits for its first step at most.
        timeout: Seconds from a request's acceptance to its end at most.
        max_models: That are open on a replica at a time. One more, and the one that was not used for longest is closed
            when its images are done.
        min_replicas: Of the engine.
        max_replicas: The same. Another one is started when replicas have more than `max_batch` requests each.
        any_host: See `ServerOptions`.
    """

    model_config = ConfigDict(extra="forbid")

    models: dict[str, str] = Field(default_factory=lambda: {DEFAULT_MODEL.name: str(DEFAULT_MODEL)}, min_length=1)
    engine: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    max_batch: int = Field(8, ge=1)
    max_queue: int = Field(64, ge=1)
    max_wait: float = Field(60.0, gt=0)
    timeout: float = Field(300.0, gt=0)
    max_models: int = Field(3, ge=1)
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(4, ge=1)
    any_host: bool = False

    def worker_options(self, model: str) -> WorkerOptions:
        """What a model's worker opens."""
        return WorkerOptions(
            model=self.models[model],
            engine=self.engine,
            device=self.device,
            precision=self.precision,
            max_batch=self.max_batch,
        )


def app(options: RayOptions) -> Any:
    """The application, as `serve run` and config files take it."""
    engine = _serve.deployment(
        name=_ENGINE,
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.max_batch,
        },
        max_ongoing_requests=options.max_batch + options.max_queue,
        max_queued_requests=options.max_queue,
        graceful_shutdown_timeout_s=options.timeout,
    )(_engine_class(options.max_models))

    def build() -> FastAPI:
        return _api(options)

    api = _serve.deployment(
        name="ApiServer",
        max_ongoing_requests=1000,  # they wait for the engine
        graceful_shutdown_timeout_s=options.timeout,
        ray_actor_options={"num_cpus": 0.5},
    )(_serve.ingress(build)())
    return api.bind(engine.bind(options))


def _api(options: RayOptions) -> FastAPI:
    """What a replica of ApiServer answers with."""
    metrics = Metrics()
    limits = ServerOptions(
        model_names=tuple(options.models),
        api_key=os.environ.get("MIGE_RT_API_KEY"),
        any_host=options.any_host,
        max_n=min(10, options.max_queue),
    )
    engine = _serve.get_deployment_handle(_ENGINE, app_name=_serve.get_replica_context().app_name)
    backends = {name: RayBackend(engine, name, metrics) for name in options.models}
    return create_app(ImageService(limits, backends, metrics))


def _engine_class(max_models: int) -> type:
    """The class of the engine's replicas, on each of which so many models are open at a time."""

    class ImageEngine:
        """A replica: a supervisor for each open model."""

        def __init__(self, options: RayOptions) -> None:
            self._options = options

        async def make(self, tasks: Sequence[ImageTask]) -> AsyncGenerator[TaskEvent]:
            """The events of a request's images, of the model whose name Ray was given.

            Raises:
                QueueFullError: There is no room for them.
            """
            model: _OpenModel = await self._open(_serve.get_multiplexed_model_id())
            supervisor = model.supervisor
            job = supervisor.submit(tasks)
            try:
                while (event := await job.next_event()) is not None:
                    yield event
            finally:
                supervisor.cancel(job)  # what has not ended is not needed any more: the client has gone

        @_serve.multiplexed(max_num_models_per_replica=max_models)
        async def _open(self, name: str) -> "_OpenModel":
            options = self._options
            limits = QueueLimits(max_queue=options.max_queue, max_wait=options.max_wait, timeout=options.timeout)
            supervisor = await asyncio.to_thread(Supervisor, options.worker_options(name), limits, Metrics())
            supervisor.attach()
            return _OpenModel(supervisor)

    return ImageEngine


class _OpenModel:
    """What Ray keeps of a model."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.__del__ = self._close  # which Ray calls; the garbage collector calls those of classes alone

    async def _close(self) -> None:
        while self.supervisor.is_busy:
            await asyncio.sleep(0.1)
        await self.supervisor.close()


class RayBackend:
    """Makes a model's images on the replicas of the engine.

    A replica that ends is no loss: another makes again what it had, from the seeds.
    """

    def __init__(self, engine: Any, model: str, metrics: Metrics) -> None:
        """Prepare.

        Args:
            engine: Handle of the engine's deployment.
            model: The model's name.
            metrics: To count in.
        """
        self._engine = engine.options(stream=True, multiplexed_model_id=model)
        self._metrics = metrics
        self._runs: dict[Job, asyncio.Task[None]] = {}

    @property
    def is_ready(self) -> bool:
        """Always: Ray starts the replicas that are missing."""
        return True

    def attach(self) -> None:
        """Nothing is needed."""

    async def close(self) -> None:
        """End what is running."""
        for job in list(self._runs):
            self.cancel(job)

    def check_room(self, images: int) -> None:
        """There is room until a replica says otherwise."""

    def submit(self, tasks: Sequence[ImageTask]) -> Job:
        """Accept a request's images."""
        job = Job(tasks)
        self._metrics.queued.inc(len(tasks))
        self._runs[job] = asyncio.get_running_loop().create_task(self._run(job))
        return job

    def cancel(self, job: Job) -> None:
        """End what of a request has not ended, here and on its replica."""
        self._fail(job, "cancelled", "the client has gone")
        if (run := self._runs.get(job)) is not None:
            run.cancel()

    async def _run(self, job: Job) -> None:
        """Make a request's images, again where their replica ends."""
        try:
            for _ in range(MAX_ATTEMPTS):
                try:
                    await self._make(job)
                except (RayActorError, ReplicaUnavailableError):
                    _log.exception("a replica of the engine has ended; its requests go to another")
                    for spans in job.spans.values():
                        spans.restart()
                if not job.tasks:
                    return
            message = f"the engine has ended {MAX_ATTEMPTS} times while it made this image; report this"
            self._fail(job, "server_error", message)
        except QueueFullError as error:
            self._fail(job, "queue_full", _QUEUE_FULL, error.retry_after)
        except BackPressureError:
            self._fail(job, "queue_full", _QUEUE_FULL, _RETRY_AFTER)
        except RayError:
            _log.exception("a replica of the engine has failed")
            self._fail(job, "server_error", "the engine has failed; its log says more")
        finally:
            del self._runs[job]

    async def _make(self, job: Job) -> None:
        """Have a replica make what of a request has not ended."""
        events = self._engine.make.remote(list(job.tasks.values()))
        try:
            async for event in events:
                self._on_event(job, event)
        except asyncio.CancelledError:
            events.cancel()
            raise

    def _on_event(self, job: Job, event: TaskEvent) -> None:
        match event:
            case Started(task_id) if task_id in job.waiting:
                self._metrics.queued.dec()
                self._metrics.running.inc()
                self._metrics.queue_time.observe(time.monotonic() - job.accepted)
                job.start(event)
            case Started():  # it was begun before, on a replica that has ended
                pass
            case PartialImage() | Progress():
                job.put(event)
            case _:
                self._end(job, event)

    def _end(self, job: Job, event: Finished | Failed) -> None:
        gauge = self._metrics.queued if event.id in job.waiting else self._metrics.running
        gauge.dec()
        job.end(event)

    def _fail(self, job: Job, kind: FailureKind, message: str, retry_after: int | None = None) -> None:
        for task_id in list(job.tasks):
            self._end(job, Failed(task_id, kind, message, retry_after))
