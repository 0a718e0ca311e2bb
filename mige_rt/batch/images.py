"""A request's images, made and written in the same order and groups wherever that happens."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL.Image import Image

from mige_rt.bundle import CONFIG, DEFAULT_MODEL, MANIFEST, is_bundle
from mige_rt.errors import InputError
from mige_rt.hub import local_folder
from mige_rt.image_output import OutputExistsError, read_settings, save_image, unused_paths
from mige_rt.instruction import EditScope, Task
from mige_rt.known_files import sha256
from mige_rt.pipeline import CallbackOnStepEnd, MigePipeline
from mige_rt.requests import RequestRecord, ResolvedRequest, resolve
from mige_rt.sampling_params import ResolvedParams, SamplingParams

AT_ONCE = 4  # images of one request made together

_REQUEST = "request"  # what an image's metadata calls the digest of its request


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How a command makes and writes its images.

    Attributes:
        params: How to sample.
        edit_scope: See `MigePipeline.__call__`.
        task: Where a request names none.
        max_pixels: Of an image that is read, see `images.normalize_image`.
        overwrite: Existing files are replaced.
        count_on: A name that has been taken meanwhile counts on, as in `out-1.png`; else that is an error.
    """

    params: SamplingParams
    edit_scope: EditScope = "local"
    task: Task | None = None
    max_pixels: int | None = None
    overwrite: bool = False
    count_on: bool = False

    def resolve(self, record: RequestRecord, folder: Path, seed: int) -> ResolvedRequest:
        """Read a record's images.

        Args:
            record: What to make.
            folder: That the record's paths are relative to.
            seed: Where the record has none.

        Raises:
            InputError: It cannot be used, or an image cannot be read.
        """
        request = record.open(folder, seed, self.task, max_pixels=self.max_pixels)
        return resolve(request, self.edit_scope)


@dataclass(frozen=True, kw_only=True)
class MadeBy:
    """What made an image, for its metadata."""

    model: str
    engine: str
    device: str
    precision: str


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """One request, and the files of its images.

    Attributes:
        prompt: The user's own, which the images' metadata repeats, not the rewritten one.
        request: Of the first image; the next ones have the next seeds.
        paths: One for each image.
        finished: Those that are there already, and stay.
        digest: Of the request, see `request_digest`; becomes part of the metadata. Empty: none.
    """

    prompt: str
    request: ResolvedRequest
    paths: tuple[Path, ...]
    finished: Collection[Path] = ()
    digest: str = ""


def make_images(
    pipe: MigePipeline,
    job: ImageJob,
    settings: ImageSettings,
    *,
    callback_on_step_end: CallbackOnStepEnd | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Iterator[Path]:
    """Make a job's images, AT_ONCE at a time, and write each.

    Images are grouped by their place among all of the job's: one that is made after an interruption has the same bytes.

    Args:
        pipe: The model.
        job: What to make.
        settings: How.
        callback_on_step_end: See `MigePipeline.__call__`.
        on_warning: The same.

    Yields:
        The path of each image that was written.

    Raises:
        InputError: See `MigePipeline.generate` and `save_image`.
    """
    resolved = settings.params.with_defaults(pipe.config, job.request.task)
    engine = pipe.engine
    made_by = MadeBy(model=pipe.model_name, engine=engine.name, device=engine.device, precision=engine.precision)
    metadata = request_metadata(job.prompt, job.request.task, resolved, made_by, edit_scope=settings.edit_scope)
    if pipe.loras:
        metadata["lora"] = ", ".join(map(str, pipe.loras))
    if job.digest:
        metadata[_REQUEST] = job.digest
    at_once = min(AT_ONCE, pipe.max_batch_size)
    for first in range(0, len(job.paths), at_once):
        paths = job.paths[first : first + at_once]
        if all(path in job.finished for path in paths):
            continue
        requests = [replace(job.request, seed=job.request.seed + first + i) for i in range(len(paths))]
        images = pipe.generate(
            requests, settings.params, callback_on_step_end=callback_on_step_end, on_warning=on_warning
        )
        for request, path, image in zip(requests, paths, images, strict=True):
            if path not in job.finished:
                yield _save(image, path, metadata | image_metadata(image, request.seed), settings)


def request_metadata(
    prompt: str, task: Task, params: ResolvedParams, made_by: MadeBy, *, edit_scope: EditScope = "local"
) -> dict[str, str]:
    """What all images of a request say of themselves in their files.

    Args:
        prompt: The user's own.
        task: Which of the three uses it is.
        params: How it is sampled.
        made_by: What makes it.
        edit_scope: See `MigePipeline.__call__`.
    """
    metadata = {"prompt": prompt, "model": made_by.model, "task": task, "edit_scope": edit_scope}
    metadata |= {"engine": made_by.engine, "device": made_by.device, "precision": made_by.precision}
    sizes = ("width", "height")  # each image's own stands under `size`
    return metadata | {k: str(v) for k, v in asdict(params).items() if v is not None and k not in sizes}


def image_metadata(image: Image, seed: int) -> dict[str, str]:
    """What sets one image of a request apart."""
    return {"seed": str(seed), "size": f"{image.width}x{image.height}"}


def _save(image: Image, path: Path, metadata: dict[str, str], settings: ImageSettings) -> Path:
    """Write an image; returns where: a default name counts on where another run has just taken it."""
    while True:
        try:
            save_image(image, path, metadata, overwrite=settings.overwrite)
        except OutputExistsError:
            if not settings.count_on:
                raise
            (path,) = unused_paths(path, 1)
        else:
            return path


def request_digest(record: RequestRecord, folder: Path, seed: int | None, settings: ImageSettings, model: str) -> str:
    """A SHA-256 of all that decides a request's images: what they refer to by its content, and how they are sampled.

    Args:
        record: What to make.
        folder: That the record's paths are relative to.
        seed: Where the record has none; None: one that was drawn, of which any is as good.
        settings: How.
        model: What the model is and runs on, as `model_identity` says it.

    Raises:
        InputError: An image cannot be read.
    """
    content = {
        "prompt": record.prompt,
        "images": [_content_digest(folder / path) for path in record.images],
        "source": None if record.source is None else _content_digest(folder / record.source),
        "task": record.task or settings.task,
        "seed": seed if record.seed is None else record.seed,
        "edit_scope": settings.edit_scope,
        "params": asdict(settings.params),
        "model": model,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content_digest(path: Path) -> str:
    if not path.is_file():  # a device may have no end
        raise InputError(f"there is no image file at {path}")
    return sha256(path)


def is_finished(path: Path, digest: str) -> bool:
    """Whether a file is an image that `make_images` wrote for the request with this digest."""
    return read_settings(path).get(_REQUEST) == digest


def model_identity(model: str | None, *run_on: str) -> str:
    """What tells one model from another: a bundle's manifest, or a model folder's description and its files' times.

    Args:
        model: As `MigePipeline.from_pretrained` takes it; None: the default model.
        run_on: Engine, device and precision as the user gave them, and what else decides its weights.
    """
    digest = hashlib.sha256("\n".join(run_on).encode())
    try:
        folder = local_folder(model or DEFAULT_MODEL)
        if is_bundle(folder):
            digest.update(sha256(folder / MANIFEST).encode())
        else:
            digest.update(sha256(folder / CONFIG).encode())
            for path in sorted(folder.rglob("*.safetensors")):
                state = path.stat()
                digest.update(f"{path.relative_to(folder)} {state.st_size} {state.st_mtime_ns}\n".encode())
    except (InputError, OSError):  # opening it will say what is wrong
        digest.update(str(model).encode())
    return digest.hexdigest()
