"""The server's side of the engine worker: hands it images, gives their events back, and starts it again if it ends."""

import asyncio
import atexit
import logging
import multiprocessing
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from threading import Thread

from mige_rt.errors import InputError
from mige_rt.serve.backend import MAX_ATTEMPTS, Job, QueueFullError
from mige_rt.serve.metrics import Metrics
from mige_rt.serve.protocol import (
    Cancel,
    Failed,
    FailureKind,
    Finished,
    ImageTask,
    NotOpened,
    PartialImage,
    Progress,
    Ready,
    Started,
    StepReport,
    TaskEvent,
)
from mige_rt.serve.worker import WorkerOptions, run_worker

_LONGEST_PAUSE = 30.0  # seconds between two starts of a worker that does not start
_END_OF_MESSAGES = None

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """How much waits, and how long.

    Attributes:
        max_queue: Images that wait at most.
        max_wait: Seconds that a request waits for the first step of its first image at most.
        timeout: Seconds from a request's acceptance to its end at most.
    """

    max_queue: int
    max_wait: float
    timeout: float


class Supervisor:
    """Holds what was accepted until it has ended, in the thread of one event loop.

    When the worker ends of itself, another is started, and gets all of it again. Seeds make the images the same.
    """

    def __init__(self, options: WorkerOptions, limits: QueueLimits, metrics: Metrics) -> None:
        """Start the worker, and wait until it has opened the model.

        Raises:
            InputError: It cannot be opened.
        """
        self.limits, self.metrics = limits, metrics
        self._options = options
        self._closing = False
        self._newest: _Worker  # which may still be opening the model, or have ended
        self._worker: _Worker | None  # the newest, while it has an open model
        self._worker, self.model = self._open_worker()
        self._jobs: dict[str, Job] = {}  # by the ids of their tasks, in the order of acceptance
        self._attempts: dict[str, int] = {}  # how often each of them was begun
        self._timers: dict[Job, list[asyncio.TimerHandle]] = {}  # of jobs that have not ended
        self._loop: asyncio.AbstractEventLoop | None = None
        self._restart: asyncio.Task[None] | None = None
        self._mean_latency = 1.0  # of the last requests, in seconds

    @property
    def is_ready(self) -> bool:
        """Whether there is a worker with an open model."""
        return self._worker is not None and not self._closing

    @property
    def is_busy(self) -> bool:
        """Whether there are images that have not ended."""
        return bool(self._jobs)

    @property
    def waiting(self) -> int:
        """Images that have not started."""
        return sum(task_id in job.waiting for task_id, job in self._jobs.items())

    def attach(self) -> None:
        """Take the running event loop, and begin to listen to the worker."""
        self._loop = asyncio.get_running_loop()
        assert self._worker is not None
        self._listen(self._worker)

    async def close(self) -> None:
        """End the worker. What has not ended fails."""
        self._closing = True
        if self._restart is not None:
            self._restart.cancel()
        for task_id in list(self._jobs):
            self._end(Failed(task_id, "server_error", "the server is shutting down; try again"))
        await asyncio.to_thread(self._newest.close)

    def check_room(self, images: int) -> None:
        """Raises QueueFullError unless so many more images may wait."""
        if self.waiting + images > self.limits.max_queue:
            raise QueueFullError(round(min(max(self._mean_latency, 1), 60)))

    def submit(self, tasks: Sequence[ImageTask]) -> Job:
        """Accept a request's images.

        Raises:
            QueueFullError: There is no room for them.
        """
        assert self._loop is not None
        self.check_room(len(tasks))
        job = Job(tasks)
        timeout = self.limits.timeout
        self._timers[job] = [
            self._loop.call_later(self.limits.max_wait, self._expire_waiting, job),
            self._loop.call_later(timeout, self._expire, job, f"it is not done after {timeout:g} seconds"),
        ]
        for task in tasks:
            self._jobs[task.id], self._attempts[task.id] = job, 0
            if self._worker is not None:
                self._worker.send(task)
        self._count()
        return job

    def cancel(self, job: Job, kind: FailureKind = "cancelled", message: str = "the client has gone") -> None:
        """End what of a request has not ended; the worker leaves it before its next step."""
        for task_id in list(job.tasks):
            if self._worker is not None:
                self._worker.send(Cancel(task_id))
            self._end(Failed(task_id, kind, message))

    def _expire_waiting(self, job: Job) -> None:
        if not job.has_started:  # or else its images wait for each other
            self._expire(job, f"it has waited in the queue for {self.limits.max_wait:g} seconds")

    def _expire(self, job: Job, reason: str) -> None:
        self.cancel(job, "timeout", f"the request was given up: {reason}; try again later")

    def _end(self, event: Finished | Failed) -> None:
        """Pass on a task's last event, and forget the task."""
        job = self._jobs.pop(event.id)
        del self._attempts[event.id]
        job.end(event)
        if not job.tasks:
            for timer in self._timers.pop(job):
                timer.cancel()
            self._mean_latency += (time.monotonic() - job.accepted - self._mean_latency) / 8
        self._count()

    def _count(self) -> None:
        waiting = self.waiting
        self.metrics.queued.set(waiting)
        self.metrics.running.set(len(self._jobs) - waiting)

    def _on_message(self, message: TaskEvent | StepReport) -> None:
        match message:
            case StepReport(batch_sizes):
                for size in batch_sizes:
                    self.metrics.batch_size.observe(size)
                self.metrics.steps.inc(sum(batch_sizes))
            case Finished() | Failed() if message.id in self._jobs:
                self._end(message)
            case Started(task_id) if task_id in self._jobs:
                self._on_started(self._jobs[task_id], message)
            case PartialImage(task_id) | Progress(task_id) if task_id in self._jobs:
                self._jobs[task_id].put(message)
            case _:  # about a task that was cancelled while it was on its way
                pass

    def _on_started(self, job: Job, event: Started) -> None:
        self._attempts[event.id] += 1
        if event.id in job.waiting:  # or else it was begun before, by a worker that has ended
            job.start(event)
            self.metrics.queue_time.observe(time.monotonic() - job.accepted)
        self._count()

    def _listen(self, worker: "_Worker") -> None:
        loop = self._loop
        assert loop is not None

        def receive() -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it the server
                try:
                    while True:
                        loop.call_soon_threadsafe(self._on_message, worker.connection.recv())
                except (EOFError, OSError):
                    loop.call_soon_threadsafe(self._on_exit, worker)

        Thread(target=receive, name="worker-events", daemon=True).start()

    def _open_worker(self) -> "tuple[_Worker, Ready]":
        """Start a worker, and wait until it has opened the model; in any thread.

        Raises:
            InputError: It cannot open it, or the server is closed meanwhile.
        """
        self._newest = worker = _Worker(self._options)
        try:
            if self._closing:  # `close` came too early to end this one, and a thread outlives its cancelled task
                raise InputError("the server is shutting down")
            return worker, worker.first_message()
        except InputError:
            worker.close()
            raise

    def _on_exit(self, worker: "_Worker") -> None:
        if not self._closing:
            assert self._loop is not None
            self._worker = None
            self.metrics.restarts.inc()
            self._restart = self._loop.create_task(self._replace(worker))

    async def _replace(self, worker: "_Worker") -> None:
        exit_code = await asyncio.to_thread(worker.close)
        _log.error("the engine worker has ended (exit code %s); starting another", exit_code)
        pause = 0.0
        while True:
            try:
                worker, _ = await asyncio.to_thread(self._open_worker)
                break
            except InputError as error:
                pause = min(2 * pause + 1, _LONGEST_PAUSE)
                _log.error("the engine worker does not start (%s); trying again in %g seconds", error, pause)
                await asyncio.sleep(pause)
        self._worker = worker
        for task_id, job in list(self._jobs.items()):
            job.spans[task_id].restart()
            if self._attempts[task_id] < MAX_ATTEMPTS:
                worker.send(job.tasks[task_id])
            else:
                message = f"the engine has ended {MAX_ATTEMPTS} times while it made this image; report this"
                self._end(Failed(task_id, "server_error", message))
        self._listen(worker)


class _Worker:
    """A worker's process, and a thread that sends to it, so that sending never waits."""

    def __init__(self, options: WorkerOptions) -> None:
        """Start the process."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=run_worker, args=(theirs, options), name="mige-rt-worker", daemon=True
        )
        self._process.start()
        atexit.register(self._process.kill)  # multiprocessing would wait for it, and it does not heed SIGTERM
        theirs.close()  # or else the end of the process would not end the connection
        self._messages: SimpleQueue[ImageTask | Cancel | None] = SimpleQueue()
        Thread(target=self._send_messages, name="worker-messages", daemon=True).start()

    def first_message(self) -> Ready:
        """Wait until the process has opened the model. Raises InputError if it does not."""
        try:
            message: Ready | NotOpened = self.connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(1)
            raise InputError(
                "the engine worker has ended while it opened the model (exit code "
                f"{self._process.exitcode}); is there enough memory? its own message, if any, is above"
            ) from error
        if isinstance(message, NotOpened):
            raise InputError(message.message)
        return message

    def send(self, message: ImageTask | Cancel) -> None:
        """Send it when the worker takes it. If the worker has ended, nothing is sent."""
        self._messages.put(message)

    def close(self) -> int | None:
        """End the process, if it has not ended itself; its exit code."""
        self._messages.put(_END_OF_MESSAGES)
        self._process.kill()  # it holds nothing that is worth a farewell
        self._process.join()
        atexit.unregister(self._process.kill)
        return self._process.exitcode

    def _send_messages(self) -> None:
        while (message := self._messages.get()) is not _END_OF_MESSAGES:
            try:
                self.connection.send(message)
            except OSError:
                return
