"""The plan that a batch of requests comes to: sizes, guidance, schedule and noise, checked against the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from mige_rt.config import QUANTISED, ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import AxisRange
from mige_rt.guidance import Branch, branches
from mige_rt.image_size import Fit, aspect_size, cropped_share
from mige_rt.instruction import Task
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import Approximations, SamplingParams
from mige_rt.scheduler import SchedulerStep, draw_noise, make_schedule

MAX_ENLARGED = 16  # times the trained area; far beyond it, attention needs more memory than machines have
CROP_WARNING = 0.1  # share of an image that is cropped away without a warning


@dataclass(frozen=True)
class SamplingPlan:
    """What a batch of requests comes to: everything that is known before the first graph runs.

    Attributes:
        task: Of all requests.
        width: Of the images, in pixels.
        height: The same.
        source_fit: How sources are fitted.
        reference_fit: How references are fitted into the trained square.
        branches: Of guidance, the least conditioned first.
        schedule: A step for each evaluation of the model.
        noise: float32 [B,c,h,w].
        approximations: What saves time.
        warnings: Sentences for the user.
    """

    task: Task
    width: int
    height: int
    source_fit: Fit
    reference_fit: Fit
    branches: list[Branch]
    schedule: list[SchedulerStep]
    noise: NDArray[np.float32]
    approximations: Approximations
    warnings: tuple[str, ...]


def plan_sampling(
    requests: Sequence[ResolvedRequest],
    params: SamplingParams,
    config: ModelConfig,
    limits: Mapping[str, AxisRange],
    precision: str,
) -> SamplingPlan:
    """Check a batch of requests against a model, and work out what sampling it takes.

    Args:
        requests: One or more, all of one task.
        params: How to sample.
        config: The model's.
        limits: The engine's, see `engines.interface.Engine`.
        precision: The engine's; an error names a way out that it has.

    Raises:
        InputError: The requests are of several tasks, or a parameter, a size or a number is not possible.
    """
    tasks = {request.task for request in requests}
    if len(tasks) > 1:
        raise InputError(f"the batch mixes the tasks {', '.join(sorted(tasks))}; run them apart")
    task, fit = requests[0].task, params.fit
    resolved = params.with_defaults(config, task)
    guidance = branches(resolved.guidance_scale, None if task == "subject" else resolved.image_guidance_scale)
    schedule = make_schedule(resolved.scheduler, resolved.num_inference_steps, config.prediction)
    approximations = params.approximations()
    width, height = _output_size(requests, params, config)
    _check_limits(_requested_sizes(requests, width, height, config), limits, precision)
    noise_shape = (config.vae.channels, height // config.vae.factor, width // config.vae.factor)
    reference_fit: Fit = "crop" if fit == "crop" or (fit is None and task != "subject") else "pad"
    warnings: list[str | None] = []
    if fit in (None, "crop"):
        warnings += [_crop_warning(request.source, width, height) for request in requests if request.source is not None]
    for request in requests:
        if reference_fit == "crop":
            warnings += [_crop_warning(image, config.size, config.size) for image in request.images]
    return SamplingPlan(
        task,
        width,
        height,
        source_fit=fit or "crop",
        reference_fit=reference_fit,
        branches=guidance,
        schedule=schedule,
        noise=draw_noise([request.seed for request in requests], noise_shape),
        approximations=approximations,
        warnings=tuple(dict.fromkeys(warning for warning in warnings if warning is not None)),
    )


def _output_size(requests: Sequence[ResolvedRequest], params: SamplingParams, config: ModelConfig) -> tuple[int, int]:
    """(width, height) of the images to make."""
    sources = [request.source for request in requests if request.source is not None]
    if params.fit == "aspect":
        if params.width is not None or params.height is not None:
            raise InputError("a size was given with fit aspect, which takes the source's shape; give only one")
        if not sources:
            raise InputError("fit aspect takes the source's shape, and there is no source; give a size instead")
        sizes = {aspect_size(source.size, config.size**2, config.multiple) for source in sources}
        if len(sizes) > 1:
            raise InputError("the batch's sources have different shapes; run them apart, or use fit crop or pad")
        return sizes.pop()
    width = config.size if params.width is None else params.width
    height = config.size if params.height is None else params.height
    multiple = config.multiple
    if min(width, height) < multiple or width % multiple or height % multiple:
        raise InputError(
            f"the size is {width}x{height}; both sides must be multiples of {multiple}, "
            f"such as {config.size}x{config.size}"
        )
    if width * height > MAX_ENLARGED * config.size**2:
        raise InputError(
            f"the size is {width}x{height}; this model was trained for {config.size}x{config.size}, "
            f"and at most {MAX_ENLARGED} times that area is made"
        )
    return width, height


@dataclass(frozen=True)
class _RequestedSize:
    """The size that a batch needs of an axis: `size` in the graph's unit, times `unit` in the user's."""

    size: int
    unit: int
    meaning: str
    option: str  # of `mige-rt export`, which raises the limit


def _requested_sizes(
    requests: Sequence[ResolvedRequest], width: int, height: int, config: ModelConfig
) -> dict[str, _RequestedSize]:
    factor = config.vae.factor
    references = {(image.size, image.tobytes()) for request in requests for image in request.images}
    return {
        "B": _RequestedSize(len(requests), 1, "images made at once", "--max-batch"),
        "N": _RequestedSize(len(references), 1, "images that prompts refer to", "--max-references or --max-batch"),
        "w": _RequestedSize(width // factor, factor, "pixels of width", "--size or --sizes"),
        "h": _RequestedSize(height // factor, factor, "pixels of height", "--size or --sizes"),
    }


def _check_limits(sizes: Mapping[str, _RequestedSize], limits: Mapping[str, AxisRange], precision: str) -> None:
    """Raises InputError that names the limit of the engine's graphs, and what raises it."""
    for axis, requested in sizes.items():
        limit, unit = limits.get(axis), requested.unit
        if limit is None or not requested.size or limit.min <= requested.size <= limit.max:
            continue
        allowed = f"{limit.min * unit}" if limit.min == limit.max else f"{limit.min * unit} to {limit.max * unit}"
        raise InputError(
            f"{requested.size * unit} {requested.meaning} are asked for, and this model's graphs take {allowed}: "
            f"export it again with another {requested.option}"
            + ("" if precision in QUANTISED else ", or use --engine pytorch")
        )


def _crop_warning(image: Image, width: int, height: int) -> str | None:
    """A sentence if much of an image is cropped away."""
    share = cropped_share(image.size, width, height)
    if share <= CROP_WARNING:
        return None
    return (
        f"{share:.0%} of an image of {image.width}x{image.height} is cropped away for {width}x{height}; "
        "fit aspect keeps the source's shape, fit pad keeps all of every image"
    )
