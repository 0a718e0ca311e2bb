"""`mige-rt run`."""

import secrets
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from engines.interface import Attention
from engines.plans import PLAN_ENGINES
from mige_rt.cli.shared import PATH, LoraType, Scale, Size, StepRange, model_options, open_pipeline, progress
from mige_rt.config import Precision, SchedulerName
from mige_rt.errors import InputError
from mige_rt.lora import Lora
from mige_rt.terminal import echo, report

if TYPE_CHECKING:
    from mige_rt.batch.images import ImageSettings
    from mige_rt.instruction import EditScope, Task
    from mige_rt.pipeline import MigePipeline
    from mige_rt.sampling_params import SamplingParams

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
    workers: int | None
    ray: str | None
    failures: Path | None
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
    paste_back: bool
    low_vram: bool
    compile: bool
    attention: Attention
    build: bool
    loras: tuple[Lora, ...]

    def check(self) -> None:
        """Raises InputError when options exclude each other."""
        if self.build and self.engine not in PLAN_ENGINES:  # auto passes over engines without plans
            raise InputError(
                f"--build is for the engines {' and '.join(PLAN_ENGINES)}, and {self.engine} was given; name one of "
                "them by --engine"
            )
        if (self.prompt is None) == (self.batch is None):
            raise InputError("give either --prompt or --batch")
        if self.batch is not None and (self.images or self.source):
            raise InputError("--image and --source stand in the lines of the --batch file; leave them out here")
        if self.batch is None and any(value is not None for value in (self.workers, self.ray, self.failures)):
            raise InputError("--workers, --ray and --failures are for a --batch, and none was given")
        if self.build and (self.ray is not None or (self.workers or 1) > 1):
            raise InputError("--build is for one process; build the plans first with: mige-rt build")
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
            paste_back=self.paste_back,
        )
        params.approximations()  # now, since opening the model takes longer
        return params

    def image_settings(self, params: "SamplingParams") -> "ImageSettings":
        """How images are made and written."""
        from mige_rt.batch.images import ImageSettings

        return ImageSettings(
            params=params,
            edit_scope=self.edit_scope,
            task=self.task,
            max_pixels=self.max_pixels,
            overwrite=self.overwrite,
            count_on=self.out is None and self.batch is None and not self.overwrite,
        )

    def open_pipeline(self) -> "MigePipeline":
        """Open the model in this process, and say on stderr what was chosen."""
        return open_pipeline(
            self.model,
            engine=self.engine,
            device=self.device,
            precision=self.precision,
            low_memory=self.low_vram,
            compile=self.compile,
            attention=self.attention,
            build_missing=self.build,
            loras=self.loras,
        )


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
    "--workers",
    type=click.IntRange(1, 1024),
    help="processes that make a batch, a model each  [default: 1; with --ray an actor for each GPU or machine]",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="make a batch on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or local for one on this machine",
)
@click.option("--failures", type=PATH, help="JSON lines to write: what of a batch was not made, and why")
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
@click.option("--paste-back", is_flag=True, help="put the source's own pixels where an edit has changed nothing")
@click.option("--low-vram", is_flag=True, help="load each part of the model when it is needed and release it: slower")
@click.option("--compile", is_flag=True, help="put the model's layers through torch.compile (engine pytorch)")
@click.option(
    "--attention",
    type=click.Choice(get_args(Attention)),
    default="auto",
    show_default=True,
    help="PyTorch's implementation of it on CUDA (engine pytorch); auto: the fastest, measured",
)
@click.option("--build", is_flag=True, help="build plans for this machine if the bundle has none (engines with plans)")
@click.option(
    "--lora",
    "loras",
    type=LoraType(),
    multiple=True,
    help="merge a LoRA of mige-rt train-lora into the weights (engine pytorch); may be repeated",
)
def run(**values: Any) -> None:
    """Make an image, or edit one.

    \b
      mige-rt run --prompt "a <imagehere> beside a <imagehere>" --image cat.png --image dog.png
      mige-rt run --prompt "make the background blue" --source scene.png
      mige-rt run --prompt "replace the cat in <imagehere> with <imagehere>" --source scene.png \\
          --image scene.png --image dog.png

    Transparent parts of an image are put on white; of an animated one the first frame is taken. The written paths go
    to stdout, everything else to stderr. One bad line of a batch does not stop the others: the exit code is then 1. Run
    again, a batch goes on: images of requests that have not changed stay.
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
    elif options.batch is not None:
        from mige_rt.cli.batch import run_batch

        if not run_batch(options, options.batch, params, seed):
            sys.exit(1)


def _run_prompt(options: RunOptions, prompt: str, params: "SamplingParams", seed: int) -> None:
    from mige_rt.batch.images import ImageJob, make_images
    from mige_rt.image_output import check_existing, check_name, output_paths, unused_paths
    from mige_rt.requests import RequestRecord

    settings = options.image_settings(params)
    out = options.out or DEFAULT_OUT
    check_name(out)
    paths = unused_paths(out, options.num_images) if settings.count_on else output_paths(out, options.num_images)
    for path in paths:
        check_existing(path, overwrite=options.overwrite)
    source = None if options.source is None else str(options.source)
    record = RequestRecord(prompt, tuple(map(str, options.images)), source)
    request = settings.resolve(record, Path(), seed)  # first, since it costs less than opening the model
    job = ImageJob(prompt=prompt, request=request, paths=tuple(paths))
    pipe = options.open_pipeline()
    steps = params.with_defaults(pipe.config, request.task).num_inference_steps
    warnings: set[str] = set()

    def warn(sentence: str) -> None:
        if sentence not in warnings:
            warnings.add(sentence)
            report(f"warning: {sentence}")

    with ExitStack() as bar:  # of each group of images that are made together
        advance: Callable[[str, int, int], None] | None = None

        def show_step(pipe: "MigePipeline", step: int, timestep: float, values: dict[str, Any]) -> None:
            nonlocal advance
            if advance is None:
                advance = bar.enter_context(progress("steps"))
            advance("steps", step + 1, steps)
            if step + 1 == steps:
                bar.close()
                advance = None

        for path in make_images(pipe, job, settings, callback_on_step_end=show_step, on_warning=warn):
            echo(path)
