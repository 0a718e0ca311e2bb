"""From a request for images to its answer: body, limits, decoding, the engine's events, and what the client is sent."""

import asyncio
import base64
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL.Image import Image
from starlette.requests import ClientDisconnect

from mige_rt.errors import InputError
from mige_rt.instruction import count_placeholders
from mige_rt.requests import Request as PromptRequest
from mige_rt.requests import resolve
from mige_rt.serve.backend import Backend, Job, QueueFullError
from mige_rt.serve.body import Body, read_body
from mige_rt.serve.errors import CLIENT_CLOSED_REQUEST, ApiError
from mige_rt.serve.image_data import ImageDecoder, encode_image
from mige_rt.serve.metrics import Metrics
from mige_rt.serve.options import ServerOptions
from mige_rt.serve.protocol import Failed, Finished, ImageTask, PartialImage
from mige_rt.serve.schemas import (
    EditRequest,
    GenerationRequest,
    ImageData,
    ImageRequest,
    ImagesResponse,
    TokenDetails,
    Usage,
    parse_request,
)
from mige_rt.serve.tracing import trace_id, tracer

EventPrefix = Literal["image_generation", "image_edit"]

_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy sends each event at once

_log = logging.getLogger(__name__)


@dataclass
class Exchange:
    """A request on its way, for the log and the metrics, which hold nothing of its content."""

    path: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.monotonic)
    trace: str | None = field(default_factory=trace_id)
    images: int = 0


@dataclass(frozen=True)
class _Work:
    """What a request has come to, and who watches its client."""

    fields: ImageRequest
    tasks: Sequence[ImageTask]
    backend: Backend
    job: Job
    watcher: asyncio.Task[None]


class ImageService:
    """Answers requests for images, those of HTTP and those of the page."""

    def __init__(self, options: ServerOptions, backends: Mapping[str, Backend], metrics: Metrics) -> None:
        """Answer within some limits.

        Args:
            options: What is allowed.
            backends: By the names of their models.
            metrics: Which they count in, too.
        """
        self.options, self.backends, self.metrics = options, backends, metrics
        self._decoder = ImageDecoder()

    def attach(self) -> None:
        """Begin, in the running event loop."""
        for backend in self.backends.values():
            backend.attach()

    async def close(self) -> None:
        """End the backends, and the process that decodes images."""
        await asyncio.gather(*(backend.close() for backend in self.backends.values()))
        await asyncio.to_thread(self._decoder.close)

    async def answer(self, request: Request, model: type[ImageRequest], prefix: EventPrefix) -> Response:
        """The images, or a stream of events.

        Args:
            request: Of HTTP, its body not yet read.
            model: What its body holds.
            prefix: Begins the events' types.

        Raises:
            ApiError: There will be no image.
        """
        exchange = Exchange(request.url.path)
        headers = {"X-Request-Id": exchange.id}
        try:
            with tracer.start_as_current_span("read", record_exception=False, set_status_on_exception=False):
                fields, tasks = await self._read(request, model)
            exchange.images = len(tasks)
            work = self._start(request, fields, tasks)
            if fields.stream:
                await self._check_start(work)
                events = self._stream(exchange, work, prefix)
                return StreamingResponse(events, media_type="text/event-stream", headers=headers | _UNBUFFERED)
            try:
                content = await _images_response(work)
            finally:
                self._end(work)
        except ApiError as error:
            self.record(exchange, error.status)
            error.headers |= headers
            raise
        except Exception:
            self.record(exchange, 500)
            raise
        self.record(exchange, 200)
        return JSONResponse(content.model_dump(), headers=headers)

    async def prepare(self, model: type[ImageRequest], body: Body) -> tuple[ImageRequest, list[ImageTask]]:
        """Check a request's fields, and decode its images.

        Args:
            model: What the body holds.
            body: Fields, and contents of image files.

        Returns:
            The fields, and a task for each image to make.

        Raises:
            ApiError: It cannot be used.
        """
        fields = parse_request(model, body, self.options)
        try:
            images = await self._decoder.decode(body.images, self.options.max_input_pixels)
            return fields, await asyncio.to_thread(_tasks, fields, images)
        except InputError as error:
            raise ApiError(400, str(error)) from error

    def submit(self, tasks: Sequence[ImageTask], model: str | None = None) -> Job:
        """Accept a request's images; whoever gets the job cancels it if its client goes.

        Args:
            tasks: The images.
            model: Which makes them; None: the first one.

        Raises:
            ApiError: The queue is full.
        """
        try:
            return self.backend(model).submit(tasks)
        except QueueFullError as error:
            raise _queue_full(error.retry_after) from error

    def backend(self, model: str | None) -> Backend:
        """What makes a model's images, the first one's where none is named."""
        return self.backends[model or self.options.model_names[0]]

    async def _read(self, request: Request, model: type[ImageRequest]) -> tuple[ImageRequest, list[ImageTask]]:
        options = self.options
        self._check_room()  # before a body is read for nothing
        try:
            async with asyncio.timeout(options.body_timeout):
                body = await read_body(request, options)
        except TimeoutError as error:
            message = f"the body had not come after {options.body_timeout:g} seconds; send it faster, or a smaller one"
            raise ApiError(408, message) from error
        except ClientDisconnect as error:
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client has gone") from error
        return await self.prepare(model, body)

    def _check_room(self) -> None:
        """Raises ApiError when there is room for an image of no model."""
        full: QueueFullError | None = None
        for backend in self.backends.values():
            try:
                backend.check_room(1)
                return
            except QueueFullError as error:
                full = error
        if full is not None:
            raise _queue_full(full.retry_after)

    def _start(self, request: Request, fields: ImageRequest, tasks: Sequence[ImageTask]) -> _Work:
        backend, job = self.backend(fields.model), self.submit(tasks, fields.model)
        return _Work(fields, tasks, backend, job, asyncio.create_task(_cancel_on_disconnect(request, backend, job)))

    def _end(self, work: _Work) -> None:
        """Let go of a request; what of it is still being made is not needed any more."""
        work.watcher.cancel()
        work.backend.cancel(work.job)

    async def _check_start(self, work: _Work) -> None:
        """Wait for the first event: an error that comes before anything was sent has a status of its own."""
        event = await work.job.next_event()
        if isinstance(event, Failed):
            self._end(work)
            raise ApiError.of(event)

    async def _stream(self, exchange: Exchange, work: _Work, prefix: EventPrefix) -> AsyncGenerator[str]:
        """Server-sent events: partial images, and the last one or an error."""
        fields, task = work.fields, work.tasks[0]
        status, sent = CLIENT_CLOSED_REQUEST, 0
        try:
            while (event := await work.job.next_event()) is not None:
                match event:
                    case PartialImage(_, index, image) if index >= sent:  # or else it was sent by a worker before
                        sent = index + 1
                        values = await _event(fields, task, image)
                        yield _sse(f"{prefix}.partial_image", values | {"partial_image_index": index})
                    case Finished(_, image):
                        values = await _event(fields, task, image)
                        status = 200
                        yield _sse(f"{prefix}.completed", values | {"usage": _usage([event]).model_dump()})
                    case Failed():
                        error = ApiError.of(event)
                        status = error.status
                        yield _sse("error", error.content())
                    case _:
                        pass
        finally:
            self._end(work)
            self.record(exchange, status)

    def record(self, exchange: Exchange, status: int) -> None:
        """Count a request that has ended, and write a line to the log. status: of HTTP."""
        seconds, metrics = time.monotonic() - exchange.began, self.metrics
        metrics.requests.labels(str(status)).inc()
        metrics.latency.labels(str(status)).observe(seconds)
        values = {"request": exchange.id, "path": exchange.path, "images": exchange.images, "status": status}
        values |= {"seconds": round(seconds, 3)} | ({"trace": exchange.trace} if exchange.trace else {})
        _log.info(" ".join(f"{name}={value}" for name, value in values.items()), extra=values)


async def _cancel_on_disconnect(request: Request, backend: Backend, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    backend.cancel(job)


def _queue_full(retry_after: int) -> ApiError:
    message = f"the queue is full; try again in {retry_after} seconds"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(retry_after)})


def _tasks(fields: ImageRequest, images: Sequence[Image]) -> list[ImageTask]:
    """A task for each image to make. Raises InputError when prompt and images do not go together."""
    resolved = resolve(_prompt_request(fields, images))
    seed = secrets.randbelow(2**31) if fields.seed is None else fields.seed
    params = fields.sampling_params()
    return [
        ImageTask(uuid.uuid4().hex, replace(resolved, seed=seed + i), params, fields.partial_images)
        for i in range(fields.n)
    ]


def _prompt_request(fields: ImageRequest, images: Sequence[Image]) -> PromptRequest:
    if isinstance(fields, GenerationRequest):
        return PromptRequest(fields.prompt, tuple(images))
    assert isinstance(fields, EditRequest)
    if not images:
        raise InputError("there is no image; an edit needs one, as a file image or image[], or in images in JSON")
    if fields.source >= len(images):
        raise InputError(f"source is {fields.source}, and {len(images)} images were sent; they are counted from 0")
    source = images[fields.source]
    if len(images) == count_placeholders(fields.prompt) + 1:  # the prompt does not name what is edited
        images = [*images[: fields.source], *images[fields.source + 1 :]]
    return PromptRequest(fields.prompt, tuple(images), source)


async def _images_response(work: _Work) -> ImagesResponse:
    """Wait for all images. Raises ApiError when one has failed."""
    fields, finished = work.fields, dict[str, Finished]()
    while (event := await work.job.next_event()) is not None:
        if isinstance(event, Failed):
            raise ApiError.of(event)
        if isinstance(event, Finished):
            finished[event.id] = event
    results = [finished[task.id] for task in work.tasks]
    return ImagesResponse(
        created=int(time.time()),
        data=[
            ImageData(b64_json=await _base64(fields, result.image), seed=task.request.seed)
            for task, result in zip(work.tasks, results, strict=True)
        ],
        output_format=fields.output_format,
        size=_size(results[0].image),
        usage=_usage(results),
    )


async def _event(fields: ImageRequest, task: ImageTask, image: Image) -> dict[str, Any]:
    """What partial and last images have in common."""
    return {
        "b64_json": await _base64(fields, image),
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": fields.output_format,
        "quality": "auto",
        "seed": task.request.seed,
        "size": _size(image),
    }


async def _base64(fields: ImageRequest, image: Image) -> str:
    with tracer.start_as_current_span("encode"):
        content = await asyncio.to_thread(encode_image, image, fields.output_format, fields.output_compression)
    return base64.b64encode(content).decode()


def _size(image: Image) -> str:
    return f"{image.width}x{image.height}"


def _usage(results: Sequence[Finished]) -> Usage:
    """Of a request: its prompt counts once, its images all."""
    prompt, output = results[0].usage, sum(result.usage.output for result in results)
    tokens = prompt.text + prompt.image
    return Usage(
        input_tokens=tokens,
        input_tokens_details=TokenDetails(image_tokens=prompt.image, text_tokens=prompt.text),
        output_tokens=output,
        total_tokens=tokens + output,
    )


def _sse(event: str, values: dict[str, Any]) -> str:
    content = values if event == "error" else {"type": event, **values}
    return f"event: {event}\ndata: {json.dumps(content)}\n\n"
