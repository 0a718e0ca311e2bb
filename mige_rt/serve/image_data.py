"""Images as a request sends them and as an answer holds them: files' contents, in and out."""

import asyncio
import logging
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from io import BytesIO
from threading import Thread
from typing import Literal

from PIL import Image

from mige_rt.errors import InputError
from mige_rt.images import decode_image

OutputFormat = Literal["png", "jpeg", "webp"]

_MEMORY = 3 * 1024**3  # bytes of address space that decoding may take, libraries and their threads' stacks included
_LIMIT_OPTION = "the server's --max-input-pixels"
_QUALITY = 95  # of JPEG and WebP, as `image_output` writes them

_log = logging.getLogger(__name__)


def encode_image(image: Image.Image, output_format: OutputFormat, quality: int | None) -> bytes:
    """The content of an image file.

    Args:
        image: RGB.
        output_format: Which.
        quality: 0 to 100, of jpeg and webp; None: `image_output`'s.
    """
    file = BytesIO()
    quality = _QUALITY if quality is None else quality
    match output_format:
        case "png":
            image.save(file, format="PNG")
        case "jpeg":
            image.save(file, format="JPEG", quality=quality, subsampling=0)
        case "webp":
            image.save(file, format="WEBP", quality=quality)
    return file.getvalue()


class ImageDecoder:
    """Decodes what clients send in a process of its own, which has little memory and may be lost."""

    def __init__(self) -> None:
        self._pool = _new_pool()

    async def decode(self, files: Sequence[bytes], max_pixels: int) -> list[Image.Image]:
        """Images as RGB, see `images.open_image`.

        Args:
            files: The contents of image files.
            max_pixels: Of all of them together.

        Raises:
            InputError: One of them cannot be decoded; it is called `image[i]`.
        """
        if not files:
            return []
        pool = self._pool
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, _decode, files, max_pixels)
        except BrokenProcessPool as error:
            if pool is self._pool:  # the requests beside this one lose the same process, and it is replaced once
                self._pool = _new_pool()
                _log.error("the process that decodes images has ended; starting another")
            raise InputError(
                "the images cannot be decoded: one of them, or one that was decoded at the same time, ended the "
                "decoder; send them again, or save them anew"
            ) from error

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(cancel_futures=True)


def _new_pool() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_limit_process)
    pool.submit(_decode, [], 0)  # starts the process, so that the first request need not wait for it
    return pool


def _limit_process() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # those are for the server
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


def _end_with_parent() -> None:
    """A server that was killed cannot end the process that decodes for it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


def _decode(files: Sequence[bytes], max_pixels: int) -> list[Image.Image]:
    images: list[Image.Image] = []
    pixels = 0
    for i, data in enumerate(files):
        image = decode_image(data, f"image[{i}]", max_pixels=max_pixels, limit_option=_LIMIT_OPTION)
        pixels += image.width * image.height
        if pixels > max_pixels:
            raise InputError(
                f"image[0] to image[{i}] are too large together: they have {pixels:,} pixels, and the images of a "
                f"request at most {max_pixels:,}; make them smaller, send fewer, or raise {_LIMIT_OPTION}"
            )
        images.append(image)
    return images
