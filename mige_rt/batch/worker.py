"""What makes one request of a batch after the other: in this process, in others, or in an actor of Ray."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mige_rt.batch.images import ImageJob, ImageSettings, is_finished, make_images, request_digest
from mige_rt.errors import InputError
from mige_rt.lora import Lora
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import parse_request


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """One line of a request file that is to be made, as plain data, which travels to where it is made.

    Attributes:
        number: Of the line.
        text: What it says.
        seed: Where it names none.
        is_drawn: That seed was drawn, and not the user's.
        paths: The files to write, one for each image.
    """

    number: int
    text: str
    seed: int
    is_drawn: bool
    paths: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What has become of a job.

    Attributes:
        number: Of its line.
        paths: Of the images that were written.
        error: Why the others were not; empty: all were.
        cause: Where the error comes from, for `--verbose`.
        no_model: The error is that the model cannot be opened, which is no line's fault.
        warnings: Sentences for the user.
    """

    number: int
    paths: Sequence[str] = ()
    error: str = ""
    cause: str = ""
    no_model: bool = False
    warnings: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """What all lines of a batch share.

    Attributes:
        folder: That the paths in the lines are relative to.
        images: How images are made and written.
        model: What the model is, see `images.model_identity`.
        open: Opens the pipeline. A worker of another process gets it pickled.
    """

    folder: Path
    images: ImageSettings
    model: str
    open: Callable[[], MigePipeline]


def open_model(model: str, name: str | None, loras: Sequence[Lora] = (), **options: Any) -> MigePipeline:
    """Open a model in another process, or on another machine.

    Args:
        model: Its path there, or its name on the hub.
        name: What it is called in the images' metadata: as the user gave it. None: the default model's own name.
        loras: What is merged into its weights.
        options: Of `MigePipeline.from_pretrained`.

    Raises:
        InputError: See there.
    """
    pipe = MigePipeline.from_pretrained(model, **options)
    pipe.model_name = name or pipe.config.name
    for lora in loras:
        pipe.load_lora_weights(lora.path, scale=lora.scale)
    return pipe


class BatchWorker:
    """Makes jobs with one pipeline, which the first job that needs it opens."""

    def __init__(self, settings: BatchSettings) -> None:
        self.settings = settings
        self._pipe: MigePipeline | None = None

    def __call__(self, job: BatchJob) -> Outcome:
        """Make a job's images and write them; the user's errors become part of the outcome."""
        settings, paths, warnings = self.settings, list[str](), dict[str, None]()
        try:
            record = parse_request(job.text)
            request = settings.images.resolve(record, settings.folder, job.seed)
            seed = None if job.is_drawn else job.seed
            digest = request_digest(record, settings.folder, seed, settings.images, settings.model)
            targets = tuple(map(Path, job.paths))
            finished = [] if settings.images.overwrite else [path for path in targets if is_finished(path, digest)]
            image_job = ImageJob(prompt=record.prompt, request=request, paths=targets, finished=finished, digest=digest)
        except InputError as error:
            return _failure(job, error)
        try:
            pipe = self._pipe = self._pipe or settings.open()
        except InputError as error:
            return _failure(job, error, no_model=True)
        try:
            for path in make_images(pipe, image_job, settings.images, on_warning=warnings.setdefault):
                paths.append(str(path))
        except InputError as error:
            return _failure(job, error, paths=tuple(paths), warnings=tuple(warnings))
        return Outcome(number=job.number, paths=tuple(paths), warnings=tuple(warnings))


def _failure(
    job: BatchJob,
    error: InputError,
    *,
    paths: tuple[str, ...] = (),
    warnings: tuple[str, ...] = (),
    no_model: bool = False,
) -> Outcome:
    cause = "".join(traceback.format_exception(error))
    return Outcome(number=job.number, paths=paths, error=str(error), cause=cause, no_model=no_model, warnings=warnings)
