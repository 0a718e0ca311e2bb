"""One press of a tab's button: from its inputs to an image, with what is shown on the way, and the end of it."""

import asyncio
import logging
import re
import shutil
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gradio as gr
from gradio.blocks import Block

from mige_rt.batch.images import MadeBy, image_metadata, request_metadata
from mige_rt.image_output import save_image
from mige_rt.preprocessing import crop
from mige_rt.serve.backend import Job
from mige_rt.serve.body import Body
from mige_rt.serve.errors import CLIENT_CLOSED_REQUEST, ApiError
from mige_rt.serve.image_service import Exchange, ImageService
from mige_rt.serve.protocol import Failed, Finished, ImageTask, PartialImage, Progress, Started
from mige_rt.serve.schemas import ImageRequest
from mige_rt.serve.supervisor import Supervisor
from mige_rt.ui import FILES
from mige_rt.ui.tabs import Tab, TabDescription, status_line

PARTIAL_IMAGES = 3
_SHORTEST_PAUSE = 0.1  # seconds between two reports of steps

_log = logging.getLogger(__name__)

Update = dict[Block, Any]


@dataclass
class Session:
    """A browser's window.

    Attributes:
        folder: Of its images.
        images: Files of what was made, the newest first.
        jobs: What is being made, by the tab's task.
        cancelled: Tabs whose run is to end although it has no job yet.
    """

    folder: Path = field(default_factory=lambda: Path(mkdtemp(dir=FILES.name)))
    images: list[Path] = field(default_factory=list[Path])
    jobs: dict[str, Job] = field(default_factory=dict[str, Job])
    cancelled: set[str] = field(default_factory=set[str])


class ImageRuns:
    """The runs of all windows, as the page's events call them."""

    def __init__(self, service: ImageService, supervisor: Supervisor) -> None:
        self.service, self.supervisor = service, supervisor
        self._sessions: dict[str, Session] = {}
        self._running = 0

    def session(self, request: gr.Request) -> Session:
        """The window that a request comes from."""
        name = str(request.session_hash)
        if name not in self._sessions:
            self._sessions[name] = Session()
        return self._sessions[name]

    async def close(self, request: gr.Request) -> None:
        """A window was closed: nothing of it is needed any more."""
        session = self._sessions.pop(str(request.session_hash), None)
        if session is not None:
            for job in session.jobs.values():
                self.supervisor.cancel(job)
            await asyncio.to_thread(shutil.rmtree, session.folder, ignore_errors=True)

    async def wait(self) -> None:
        """Until nothing is being made."""
        while self._running:
            await asyncio.sleep(0.1)

    async def cancel(self, tab: Tab, request: gr.Request) -> None:
        """End a tab's run before its next step."""
        session, task = self.session(request), tab.description.task
        session.cancelled.add(task)
        if task in session.jobs:
            self.supervisor.cancel(session.jobs[task], message="cancelled")

    async def run(self, tab: Tab, values: Update, request: gr.Request) -> AsyncGenerator[Update | list[Path]]:
        """Make an image.

        Args:
            tab: Whose button was pressed.
            values: Of the tab's inputs.
            request: From the browser.

        Yields:
            What changes on the page, and all of the window's images when there is a new one.
        """
        session = self.session(request)
        session.cancelled.discard(tab.description.task)
        yield {
            tab.status: status_line("Reading the images", done=0),
            tab.run: gr.update(visible=False),
            tab.cancel: gr.update(visible=True),
            tab.result: gr.update(value=None, visible=True),
            tab.comparison: gr.update(visible=False),
            tab.download: gr.update(visible=False),
        }
        exchange = Exchange("/ui", images=1)
        status = CLIENT_CLOSED_REQUEST
        self._running += 1
        try:
            async for update in self._make(tab, values, session):
                yield update
            status = 200
        except ApiError as error:
            status = error.status
            was_cancelled = tab.description.task in session.cancelled
            text = "Cancelled." if was_cancelled else _sentence(error.message)
            yield {tab.status: status_line(text, is_error=not was_cancelled)}
        except Exception:
            status = 500
            _log.exception("a run of the page has failed")
            yield {tab.status: status_line("The server has made a mistake; its log says more.", is_error=True)}
        finally:
            self._running -= 1
            self.service.record(exchange, status)
        yield {tab.run: gr.update(visible=True), tab.cancel: gr.update(visible=False)}

    async def _make(self, tab: Tab, values: Update, session: Session) -> AsyncGenerator[Update | list[Path]]:
        """Raises ApiError."""
        service, about = self.service, tab.description
        files = await asyncio.to_thread(_read_files, about, values[tab.source], values[tab.references])
        if len(files) > service.options.max_images:
            raise ApiError(400, f"there are {len(files)} images; at most {service.options.max_images} are taken")
        fields, tasks = await service.prepare(about.model, Body(tab.fields(values), files))
        task = replace(tasks[0], partial_images=PARTIAL_IMAGES, report_steps=True)
        if about.task in session.cancelled:
            raise ApiError(CLIENT_CLOSED_REQUEST, "cancelled")
        ahead = self.supervisor.waiting
        job = service.submit([task])
        session.jobs[about.task] = job
        try:
            yield {tab.status: status_line(_waiting(ahead), done=0)}
            async for update in _follow(job, tab):
                if isinstance(update, Finished):
                    paths = await asyncio.to_thread(self._save, session.folder, task, fields, update)
                    yield _result(tab, task, paths)
                    session.images.insert(0, paths[-1])
                    yield session.images
                else:
                    yield update
        finally:
            session.jobs.pop(about.task, None)
            self.supervisor.cancel(job)

    def _save(self, folder: Path, task: ImageTask, fields: ImageRequest, finished: Finished) -> list[Path]:
        """The files of the image before, if one was edited, and of the one made, whose file has its settings."""
        model, request, image = self.supervisor.model, task.request, finished.image
        folder = Path(mkdtemp(dir=folder))
        paths: list[Path] = []
        if request.source is not None:
            paths.append(folder / "before.png")
            crop(request.source, image.width, image.height).save(paths[0])
        made_by = MadeBy(
            model=self.service.options.model_names[0],
            engine=model.engine,
            device=model.device,
            precision=model.precision,
        )
        params = task.params.with_defaults(model.config, request.task)
        metadata = request_metadata(fields.prompt, request.task, params, made_by)
        paths.append(folder / f"mige-rt-{request.task}-{request.seed}.png")
        save_image(image, paths[-1], metadata | image_metadata(image, request.seed))
        return paths


async def _follow(job: Job, tab: Tab) -> AsyncGenerator[Update | Finished]:
    """What to show of a job's events, and the image at last. Raises ApiError when there will be none."""
    shown = 0.0
    while (event := await job.next_event()) is not None:
        match event:
            case Started():
                yield {tab.status: status_line("Reading the prompt", done=0)}
            case Progress(_, step, steps) if step == steps or time.monotonic() - shown >= _SHORTEST_PAUSE:
                yield {tab.status: status_line(f"Step {step} of {steps}", done=step / steps)}
                shown = time.monotonic()  # after it was sent: where that is slower than steps, some are left out
            case PartialImage(_, _, image):
                yield {tab.result: image}
            case Failed():
                raise ApiError.of(event)
            case Finished():
                yield event
            case _:
                pass


def _result(tab: Tab, task: ImageTask, paths: Sequence[Path]) -> Update:
    is_edit = len(paths) == 2
    return {
        tab.status: status_line(f"Done. Seed {task.request.seed}."),
        tab.result: gr.update(value=str(paths[-1]), visible=not is_edit),
        tab.comparison: gr.update(value=tuple(map(str, paths)) if is_edit else None, visible=is_edit),
        tab.download: gr.update(value=str(paths[-1]), visible=True),
    }


def _read_files(about: TabDescription, source: str | None, references: Sequence[tuple[str, Any]] | None) -> list[bytes]:
    """The contents of a tab's images, the one to edit first. Raises ApiError when one is missing."""
    if about.source_label and source is None:
        raise ApiError(400, "there is no image to edit; drop one above")
    if about.source_label and about.references_label and not references:
        raise ApiError(400, "there is no image of what to put in; drop one above")
    paths = [*([] if source is None else [source]), *(path for path, _ in references or ())]
    return [Path(path).read_bytes() for path in paths]


def _waiting(ahead: int) -> str:
    return "Waiting for the next step" if not ahead else f"Waiting; images before this one: {ahead}"


def _sentence(message: str) -> str:
    """An error of the API, whose images are counted from 0, as the page says it."""
    message = re.sub(r"image\[(\d+)\]", lambda match: f"image {int(match[1]) + 1}", message)
    return f"{message[:1].upper()}{message[1:]}."
