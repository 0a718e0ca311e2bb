"""The engine worker: the process that holds the model, and advances whatever the server has sent it."""

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

from mige_rt.config import Precision
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from mige_rt.serve.options import Batching
from mige_rt.serve.protocol import Cancel, Failed, ImageTask, NotOpened, Ready
from mige_rt.serve.step_scheduler import StepScheduler


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What the worker opens, see `MigePipeline.from_pretrained`, and how many images it advances together."""

    model: str
    engine: str
    device: str
    precision: Precision | str
    max_batch: int
    batching: Batching = "continuous"
    limits: Mapping[str, Any] = field(default_factory=dict[str, Any])  # trust and memory_limit, where they were given


def run_worker(connection: Connection, options: WorkerOptions) -> None:
    """Work until the connection ends; what the process runs.

    Anything but the user's errors ends the process: the server starts another, which begins anew with what was sent.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # those are for the server, which then closes the connection
        signal.signal(number, signal.SIG_IGN)
    try:
        pipe = _open(options)
    except InputError as error:
        connection.send(NotOpened(str(error)))
        return
    engine = pipe.engine
    connection.send(
        Ready(pipe.model_name, pipe.config, engine.name, engine.device, engine.precision, options.max_batch)
    )
    scheduler = StepScheduler(pipe, options.max_batch, batching=options.batching)
    try:
        while True:
            while connection.poll(None if scheduler.idle else 0):
                _receive(connection, scheduler)
            for event in scheduler.step():
                connection.send(event)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _open(options: WorkerOptions) -> MigePipeline:
    """The pipeline, after a short edit for which every graph was loaded."""
    pipe = MigePipeline.from_pretrained(
        options.model,
        engine=options.engine,
        device=options.device,
        precision=options.precision,  # pyright: ignore[reportArgumentType]
        **options.limits,
    )
    blank = Image.new("RGB", (pipe.config.size, pipe.config.size))
    pipe("warm up", source=blank, num_inference_steps=2, seed=0)
    pipe.clear_cache()
    return pipe


def _receive(connection: Connection, scheduler: StepScheduler) -> None:
    message: ImageTask | Cancel = connection.recv()
    if isinstance(message, Cancel):
        scheduler.cancel(message.id)
        return
    try:
        scheduler.submit(message)
    except InputError as error:
        connection.send(Failed(message.id, "invalid_request", str(error)))
