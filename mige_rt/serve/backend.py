"""What makes the images of a model for the API, and the images of one request on their way."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from mige_rt.serve.protocol import Failed, Finished, ImageTask, Started, TaskEvent
from mige_rt.serve.tracing import ImageSpans

_log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # how often an image is begun: one that ends the worker each time must not do so for ever


class QueueFullError(Exception):
    """As many images are waiting as may wait.

    Attributes:
        retry_after: Seconds after which a place may be free.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Job:
    """The images of one request, from their acceptance to their end."""

    def __init__(self, tasks: Sequence[ImageTask]) -> None:
        self.tasks = {task.id: task for task in tasks}  # those that have not ended
        self.accepted = time.monotonic()
        self.waiting = set(self.tasks)  # ids of those that have not started
        self.has_started = False  # one of them
        self.spans = {task_id: ImageSpans() for task_id in self.tasks}
        self._events: asyncio.Queue[TaskEvent] = asyncio.Queue()
        self._to_come = len(self.tasks)

    def put(self, event: TaskEvent) -> None:
        """Add an event about one of the tasks."""
        self._events.put_nowait(event)

    def start(self, event: Started) -> None:
        """One of the tasks that wait has left the queue."""
        self.waiting.remove(event.id)
        self.has_started = True
        self.spans[event.id].start()
        self.put(event)

    def end(self, event: Finished | Failed) -> None:
        """One of the tasks has ended, and is forgotten."""
        if isinstance(event, Failed) and event.kind == "server_error":
            _log.error("image %s has failed: %s", event.id, event.message)
        del self.tasks[event.id]
        self.waiting.discard(event.id)
        self.spans.pop(event.id).end(event.kind if isinstance(event, Failed) else None)
        self.put(event)

    async def next_event(self) -> TaskEvent | None:
        """What happens next to one of the images; None when each is finished or has failed."""
        if not self._to_come:
            return None
        event = await self._events.get()
        self._to_come -= isinstance(event, Finished | Failed)
        return event


class Backend(Protocol):
    """Makes the images of one model, in the thread of one event loop."""

    @property
    def is_ready(self) -> bool:
        """Whether it makes images now."""
        ...

    def attach(self) -> None:
        """Take the running event loop."""
        ...

    async def close(self) -> None:
        """Let go of everything. What has not ended fails."""
        ...

    def check_room(self, images: int) -> None:
        """Raises QueueFullError if so many more images may not wait."""
        ...

    def submit(self, tasks: Sequence[ImageTask]) -> Job:
        """Accept a request's images, or raise QueueFullError."""
        ...

    def cancel(self, job: Job) -> None:
        """End what of a request has not ended."""
        ...
