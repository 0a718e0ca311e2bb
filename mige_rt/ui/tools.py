"""What programs call over MCP, and over Gradio's own API: a function for each tab.

Images come as data URLs, and links are not followed, as everywhere in the server.
"""

import shutil
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gradio as gr
from gradio.events import api  # pyright: ignore[reportUnknownVariableType]

from mige_rt.serve.body import Body, image_of_reference
from mige_rt.serve.errors import CLIENT_CLOSED_REQUEST, ApiError
from mige_rt.serve.image_service import Exchange, ImageService
from mige_rt.serve.protocol import Failed, Finished
from mige_rt.serve.schemas import EditRequest, GenerationRequest, ImageRequest
from mige_rt.ui import FILES

_FILES_KEPT = 64  # an answer holds its image, and a link to the file, too
_latest_files = deque[Path]()


def add_tools(service: ImageService) -> None:
    """Offer the tools, in the context of a `gr.Blocks`."""

    async def make_image(prompt: str, images: list[str], seed: int = 0) -> dict[str, Any]:
        """Make a new image of the things in given images.

        Args:
            prompt: What to make, as "a <imagehere> on a plain green background"; <imagehere> stands for an image.
            images: One for each <imagehere>, in their order, as data URLs: data:image/png;base64,...
            seed: Of the noise that the image is made from.
        """
        return await _make(service, GenerationRequest, {"prompt": prompt, "seed": seed}, images)

    async def edit_image(prompt: str, image: str, seed: int = 0) -> dict[str, Any]:
        """Change an image as told.

        Args:
            prompt: What to change, as "make the background blue".
            image: The image to edit, as a data URL: data:image/png;base64,...
            seed: Of the noise that the image is made from.
        """
        return await _make(service, EditRequest, {"prompt": prompt, "seed": seed}, [image])

    async def put_into_image(prompt: str, image: str, things: list[str], seed: int = 0) -> dict[str, Any]:
        """Put the things in given images into an image.

        Args:
            prompt: What to do, as "replace the cat in <imagehere> with <imagehere>": the first <imagehere> is the image
                to edit, the next ones are the things.
            image: The image to edit, as a data URL: data:image/png;base64,...
            things: Images of what to put in, in their order, as data URLs.
            seed: Of the noise that the image is made from.
        """
        return await _make(service, EditRequest, {"prompt": prompt, "seed": seed}, [image, *things])

    for tool in (make_image, edit_image, put_into_image):
        api(tool, queue=False)  # the service has the queue


async def _make(
    service: ImageService, model: type[ImageRequest], fields: dict[str, Any], urls: Sequence[str]
) -> dict[str, Any]:
    """The image's file, as Gradio describes files. Raises gr.Error when there is none."""
    exchange, status = Exchange("/ui/gradio_api", images=1), CLIENT_CLOSED_REQUEST
    try:
        if len(urls) > service.options.max_images:
            raise ApiError(400, f"there are {len(urls)} images; at most {service.options.max_images} are taken")
        files = [image_of_reference(i, {"image_url": url}) for i, url in enumerate(urls)]
        _, tasks = await service.prepare(model, Body(fields, files))
        job = service.submit(tasks)
        try:
            event = await job.next_event()
            while not isinstance(event, Finished):
                if isinstance(event, Failed):
                    raise ApiError.of(event)
                event = await job.next_event()
        finally:
            service.backend(None).cancel(job)
        status = 200
    except ApiError as error:
        status = error.status
        raise gr.Error(error.message, print_exception=False) from error
    finally:
        service.record(exchange, status)
    path = Path(mkdtemp(dir=FILES.name)) / "image.png"
    event.image.save(path)
    _latest_files.append(path)
    while len(_latest_files) > _FILES_KEPT:
        shutil.rmtree(_latest_files.popleft().parent, ignore_errors=True)
    return gr.FileData(path=str(path), mime_type="image/png", orig_name=path.name).model_dump()
