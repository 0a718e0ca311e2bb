"""`mige-rt run`."""

import os
import secrets
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from engines.interface import Attention
from engines.plans import PLAN_ENGINES
from mige_rt.cli.shared import (
    PATH,
    LoraType,
    Scale,
    Size,
    StepRange,
    is_verbose,
    model_options,
    open_pipeline,
    progress,
)
from mige_rt.config import Precision, SchedulerName
from mige_rt.errors import InputError
from mige_rt.lora import Lora
from mige_rt.terminal import echo, report, report_cause

if TYPE_CHECKING:
    from PIL.Image import Image

    from mige_rt.instruction import EditScope, Task
    from mige_rt.pipeline import CallbackOnStepEnd, MigePipeline
    from mige_rt.requests import RequestRecord, ResolvedRequest
    from mige_rt.sampling_params import SamplingParams

AT_ONCE = 4  # images of --num-images made together
DEFAULT_OUT = Path("out.png")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of `mige-rt run`, by the names that `click` gives them."""

    prompt: str | None
    images: tuple[Path, ...]
    source: Path | None
    out: Path | None
    overwrite: bool
    max_pixels: int | None
    batch: Path | None
    num_images: int
    seed: int | None
    steps: int | None
    guidance_scale: float | None
    image_guidance_scale: float | None
    size: tuple[int, int] | None
    width: int | None
    height: int | None
    fit: Literal["crop", "pad", "aspect"] | None
    edit_scope: "EditScope"
    task: "Task | None"
    model: str | None
    engine: str
    device: str
    precision: Precision | Literal["auto"]
    scheduler: SchedulerName | None
    guidance_range: tuple[float, float] | None
    reuse: float | None
    low_vram: bool
    compile: bool
    attention: Attention
    build: bool
    loras: tuple[Lora, ...]

    def check(self) -> None:
        """Raises InputError when options exclude each other."""
        if self.build and self.engine not in ("auto", *PLAN_ENGINES):
            raise InputError(f"--build is for the engines {' and '.join(PLAN_ENGINES)}, and {self.engine} was given")
        if (self.prompt is None) == (self.batch is None):
            raise InputError("give either --prompt or --batch")
        if self.batch is not None and (self.images or self.source):
            raise InputError("--image and --source stand in the lines of the --batch file; leave them out here")
        if self.size is not None and (self.width is not None or self.height is not None):
            raise InputError("give either --size or --width and --height")

    def sampling_params(self) -> "SamplingParams":
        """How to sample. Raises InputError when it is not possible with any model."""
        from mige_rt.sampling_params import SamplingParams

        width, height = self.size or (self.width, self.height)
        params = SamplingParams(
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
            width=width,
            height=height,
            fit=self.fit,
            scheduler=self.scheduler,
            guidance_range=self.guidance_range,
            reuse=self.reuse,
        )
        params.approximations()  # now, since opening the model takes longer
        return params


@click.command()
@click.option("--prompt", help="what to make; <imagehere> stands for an image, in the order of --image")
@click.option("--image", "images", type=PATH, multiple=True, help="an image for the next <imagehere>; may be repeated")
@click.option("--source", type=PATH, help="the image to edit; without it, a new image is made")
@click.option(
    "--out",
    type=PATH,
    help=f".png, .jpg or .webp  [default: {DEFAULT_OUT}, or the first of out-1.png, out-2.png, ... that is not there]",
)
@click.option("--overwrite", is_flag=True, help="replace existing files")
@click.option("--batch", type=PATH, help="JSON lines with prompt, images, source, task, seed, id; out-ID.png each")
@click.option(
    "--num-images",
    "--num-images-per-prompt",
    "num_images",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="out-1.png, out-2.png, ...",
)
@click.option("--seed", type=click.IntRange(0), help="of the first image; drawn and printed if not given")
@click.option(
    "--steps",
    "--num-inference-steps",
    "steps",
    type=int,
    help="of the scheduler; at least 2  [default: the model's for the task]",
)
@click.option(
    "--text-scale",
    "--guidance-scale",
    "guidance_scale",
    type=Scale(),
    help="how strongly the words count  [default: the model's for the task]",
)
@click.option(
    "--source-scale",
    "--image-guidance-scale",
    "image_guidance_scale",
    type=Scale(),
    help="how strongly the source counts  [default: the model's for the task]",
)
@click.option("--size", type=Size(), help="of the image in pixels  [default: the model's trained size]")
@click.option("--width", type=int, help="of the image in pixels, instead of --size")
@click.option("--height", type=int, help="of the image in pixels, instead of --size")
@click.option(
    "--fit",
    type=click.Choice(["crop", "pad", "aspect"]),
    help="how an image of another shape is fitted: cut (crop), black bars (pad), or the result takes the source's "
    "shape (aspect)  [default: crop; references of a new image are padded]",
)
@click.option(
    "--edit-scope",
    type=click.Choice(["local", "global"]),
    default="local",
    show_default=True,
    help="how a prompt without <imagehere> is completed: 'in' the image, or 'of' it",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    help="of a source or a reference; larger images are refused before they are decoded  [default: 80 million]",
)
@click.option("--task", type=click.Choice(["subject", "edit", "compose"]), help="[default: the one the images imply]")
@model_options
@click.option(
    "--solver",
    "--scheduler",
    "scheduler",
    type=click.Choice(get_args(SchedulerName)),
    help="[default: dpm_solver_pp_2m, the published one]",
)
@click.option(
    "--guidance-range",
    type=StepRange(),
    help="compute guidance in this part of the steps alone, as 0.1-0.8: faster, a little different",
)
@click.option(
    "--reuse",
    type=click.FloatRange(0, 1, max_open=True),
    help="skip the model while the image changed by less than this share since it last ran, as 0.05: faster, a "
    "little different",
)
@click.option("--low-vram", is_flag=True, help="load each part of the model when it is needed and release it: slower")
@click.option("--compile", is_flag=True, help="put the model's layers through torch.compile (engine pytorch)")
@click.option(
    "--attention",
    type=click.Choice(get_args(Attention)),
    default="auto",
    show_default=True,
    help="PyTorch's implementation of it on CUDA (engine pytorch); auto: the fastest, measured",
)
@click.option("--build", is_flag=True, help="build plans for this machine if the bundle has none")
@click.option(
    "--lora",
    "loras",
    type=LoraType(),
    multiple=True,
    help="merge a LoRA of mige-rt train-lora into the weights (engine pytorch); may be repeated",
)
def run(**values: Any) -> None:
    r"""Make an image, or edit one.

    \b
      mige-rt run --prompt "a <imagehere> beside a <imagehere>" --image cat.png --image dog.png
      mige-rt run --prompt "make the background blue" --source scene.png
      mige-rt run --prompt "replace the cat in <imagehere> with <imagehere>" --source scene.png \
          --image scene.png --image dog.png

    Transparent parts of an image are put on white; of an animated one the first frame is taken. The written paths go
    to stdout, everything else to stderr. One bad line of a batch does not stop the others: the exit code is then 1.
    """
    options = RunOptions(**values)
    options.check()
    params = options.sampling_params()
    seed = options.seed
    if seed is None:
        seed = secrets.randbelow(2**31)
        report(f"seed {seed}")
    if options.prompt is not None:
        _run_prompt(options, options.prompt, params, seed)
    elif options.batch is not None and not _run_batch(options, options.batch, params, seed):
        sys.exit(1)


@dataclass(frozen=True)
class _Job:
    """What one prompt comes to before the model is opened: the request of its first image, and the files to write."""

    prompt: str  # the user's own, which the images' metadata repeats, not the rewritten one
    request: "ResolvedRequest"
    paths: list[Path]


@dataclass(frozen=True)
class _Line:
    """A line of a request file, and the files to write; or why it cannot be used."""

    number: int
    record: "RequestRecord | InputError"
    paths: list[Path]


def _run_prompt(options: RunOptions, prompt: str, params: "SamplingParams", seed: int) -> None:
    from mige_rt.image_output import check_existing, check_name
    from mige_rt.requests import RequestRecord

    out = options.out or DEFAULT_OUT
    check_name(out)
    paths = _output_paths(options, out, set())
    for path in paths:
        check_existing(path, overwrite=options.overwrite)
    source = None if options.source is None else str(options.source)
    record = RequestRecord(prompt, tuple(map(str, options.images)), source)
    job = _resolve_job(options, record, Path(), seed, paths)  # first, since it costs less than opening the model
    _make_images(_open(options), job, params, options)


def _run_batch(options: RunOptions, batch: Path, params: "SamplingParams", seed: int) -> bool:
    """Make every line's images; a line that cannot be used is reported and passed over. Returns whether none was."""
    failures: list[int] = []
    pipe: MigePipeline | None = None

    def fail(number: int, error: InputError) -> None:
        failures.append(number)
        if is_verbose():
            report_cause(error)
        report(f"{batch} line {number}: {error}")

    for line in _read_batch(options, batch):
        try:
            if isinstance(line.record, InputError):
                raise line.record
            first_seed = seed + (line.number - 1) * options.num_images
            job = _resolve_job(options, line.record, batch.parent, first_seed, line.paths)
        except InputError as error:
            fail(line.number, error)
            continue
        pipe = pipe or _open(options)  # a model that cannot be opened is no line's fault
        try:
            _make_images(pipe, job, params, options)
        except InputError as error:
            fail(line.number, error)
    return not failures


def _read_batch(options: RunOptions, batch: Path) -> list[_Line]:
    """Every line of a request file. Raises InputError when one would write over a file that must not be replaced."""
    from mige_rt.image_output import OutputExistsError, check_existing, check_name, numbered
    from mige_rt.requests import parse_request, read_lines

    out = options.out or DEFAULT_OUT
    check_name(out)  # a folder that cannot be written is no line's fault
    lines: list[_Line] = []
    names: set[str] = set()
    taken: set[Path] = set()
    for number, text in read_lines(batch):
        try:
            record = parse_request(text)
            name = record.id or str(number)
            if name in names:
                raise InputError(f"the id {name!r} stands in an earlier line; its images would be overwritten")
            names.add(name)
            paths = _output_paths(options, numbered(out, name), taken)
            for path in paths:
                check_existing(path, overwrite=options.overwrite)
        except OutputExistsError as error:
            raise InputError(f"{batch} line {number}: {error}") from error
        except InputError as error:
            lines.append(_Line(number, error, []))
        else:
            taken.update(paths)
            lines.append(_Line(number, record, paths))
    _check_inputs_stay(batch, lines)
    return lines


def _check_inputs_stay(batch: Path, lines: Sequence[_Line]) -> None:
    """Raises InputError when --overwrite would replace the request file, or an image that another line reads."""
    readers: dict[str, set[int]] = {}
    for line in lines:
        if not isinstance(line.record, InputError):
            for path in line.record.paths(batch.parent):
                with suppress(ValueError):  # a zero byte in the name, of which opening it will speak
                    readers.setdefault(os.path.realpath(path), set()).add(line.number)
    for line in lines:
        for path in line.paths:
            target = os.path.realpath(path)
            if target == os.path.realpath(batch):
                raise InputError(f"line {line.number} of {batch} would overwrite the file itself; write elsewhere")
            if others := readers.get(target, set()) - {line.number}:
                raise InputError(
                    f"{batch} line {line.number} would overwrite {path}, which line {min(others)} reads; "
                    "write elsewhere"
                )


def _output_paths(options: RunOptions, out: Path, taken: Collection[Path]) -> list[Path]:
    """The files of one prompt's images, named after `out`; taken: those of other prompts."""
    from mige_rt.image_output import output_paths, unused_paths

    if options.out is None and not options.overwrite:
        return unused_paths(out, options.num_images, taken)
    return output_paths(out, options.num_images)


def _resolve_job(options: RunOptions, record: "RequestRecord", folder: Path, seed: int, paths: list[Path]) -> _Job:
    """Read a record's images.

    Args:
        options: The command's.
        record: What to make.
        folder: That the record's paths are relative to.
        seed: Where the record has none.
        paths: The files to write.
    """
    from mige_rt.requests import resolve

    request = record.open(folder, seed, options.task, max_pixels=options.max_pixels)
    return _Job(record.prompt, resolve(request, options.edit_scope), paths)


def _open(options: RunOptions) -> "MigePipeline":
    return open_pipeline(
        options.model,
        engine=options.engine,
        device=options.device,
        precision=options.precision,
        low_memory=options.low_vram,
        compile=options.compile,
        attention=options.attention,
        build_missing=options.build,
        loras=options.loras,
    )


def _make_images(pipe: "MigePipeline", job: _Job, params: "SamplingParams", options: RunOptions) -> None:
    """Make and write a job's images, AT_ONCE at a time, and print their paths."""
    resolved = params.with_defaults(pipe.config, job.request.task)
    metadata = {
        "prompt": job.prompt,
        "model": pipe.model_name,
        "task": job.request.task,
        "edit_scope": options.edit_scope,
    }
    metadata |= {"engine": pipe.engine.name, "device": pipe.engine.device, "precision": pipe.engine.precision}
    if options.loras:
        metadata["lora"] = ", ".join(map(str, options.loras))
    sizes = ("width", "height")  # each image's own stands under `size`
    metadata |= {k: str(v) for k, v in asdict(resolved).items() if v is not None and k not in sizes}
    warnings: set[str] = set()

    def warn(sentence: str) -> None:
        if sentence not in warnings:
            warnings.add(sentence)
            report(f"warning: {sentence}")

    at_once = min(AT_ONCE, pipe.max_batch_size)
    for first in range(0, len(job.paths), at_once):
        paths = job.paths[first : first + at_once]
        requests = [replace(job.request, seed=job.request.seed + first + i) for i in range(len(paths))]
        with progress("steps") as advance:
            on_step_end = _show_steps(advance, resolved.num_inference_steps)
            images = pipe.generate(requests, params, callback_on_step_end=on_step_end, on_warning=warn)
        for request, path, image in zip(requests, paths, images, strict=True):
            settings = {"seed": str(request.seed), "size": f"{image.width}x{image.height}"}
            echo(_save(image, path, metadata | settings, options))


def _save(image: "Image", path: Path, metadata: dict[str, str], options: RunOptions) -> Path:
    """Write an image; returns where: a default name counts on where another run has just taken it."""
    from mige_rt.image_output import OutputExistsError, save_image, unused_paths

    while True:
        try:
            save_image(image, path, metadata, overwrite=options.overwrite)
        except OutputExistsError:
            if options.out is not None:
                raise
            (path,) = unused_paths(path, 1)
        else:
            return path


def _show_steps(advance: Callable[[str, int, int], None], steps: int) -> "CallbackOnStepEnd":
    def on_step_end(pipe: "MigePipeline", step: int, timestep: float, values: dict[str, Any]) -> None:
        advance("steps", step + 1, steps)

    return on_step_end
