"""`python -m benchmarks.step_batching`: how far an image made among others is from the one made alone.

The step scheduler of `mige-rt serve` makes the same images in several orders of arrival, and the pipeline each of them
by itself. Prints a row of the table in docs/serving.md.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.interface import to_numpy
from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import Request, resolve
from mige_rt.sampling_params import SamplingParams
from mige_rt.serve.protocol import Finished, ImageTask, StepReport
from mige_rt.serve.step_scheduler import StepScheduler

MAX_BATCH = 4


@dataclass(frozen=True)
class Difference:
    """Of images made among others from the same made alone, over all images and orders of arrival.

    Attributes:
        latents: Largest relative RMS difference of an image's last latents.
        pixels: Largest difference of an 8-bit value.
        same: Share of the images that are the same to the last bit.
        batch_size: Images in a call of the denoiser, on the average.
    """

    latents: float
    pixels: int
    same: float
    batch_size: float


@dataclass(frozen=True)
class Made:
    """What a step scheduler made.

    Attributes:
        latents: The last ones of each image, by the task's id.
        images: By the task's id.
        batch_sizes: Images in each call of the denoiser.
    """

    latents: dict[str, NDArray[np.float32]]
    images: dict[str, Image.Image]
    batch_sizes: list[int]


def sample_tasks(size: int, steps: int) -> list[ImageTask]:
    """Edits, generations and both at once, with prompts of several lengths and several numbers of steps."""
    rng = np.random.default_rng(0)
    scene, subject = (Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(2))
    requests = [
        Request("make the background blue", source=scene),
        Request("a <imagehere> on a plain green background", (subject,)),
        Request("replace the thing on the left in <imagehere> with <imagehere>", (scene, subject), scene),
        Request("let it snow on all of the roofs, and on the street before the houses", source=subject),
        Request("a red apple"),
    ]
    return [
        ImageTask(str(i), resolve(replace(request, seed=i)), SamplingParams(num_inference_steps=steps + i % 3))
        for i, request in enumerate(requests * 2)
    ]


def make_among_others(
    pipe: MigePipeline, tasks: Sequence[ImageTask], order: int, one_image_a_call: bool | None = None
) -> Made:
    """Make images by the server's step scheduler.

    Args:
        pipe: Of the model.
        tasks: The images.
        order: Seed of the order in which they come, none to two before each step.
        one_image_a_call: See `StepScheduler`.
    """
    rng = random.Random(order)
    arrivals = rng.sample(list(tasks), len(tasks))
    scheduler = StepScheduler(pipe, MAX_BATCH, one_image_a_call=one_image_a_call)
    images: dict[str, Image.Image] = {}
    batch_sizes: list[int] = []
    with _kept_latents(pipe) as kept:
        while arrivals or not scheduler.idle:
            for _ in range(min(rng.randrange(3), len(arrivals))):
                scheduler.submit(arrivals.pop())
            for event in scheduler.step():
                if isinstance(event, StepReport):
                    batch_sizes += event.batch_sizes
                elif isinstance(event, Finished):
                    images[event.id] = event.image
    return Made(dict(zip(images, kept, strict=True)), images, batch_sizes)


def make_alone(pipe: MigePipeline, tasks: Sequence[ImageTask]) -> Made:
    """Make images one after another by the pipeline."""
    with _kept_latents(pipe) as kept:
        images = {task.id: pipe.generate([task.request], task.params)[0] for task in tasks}
    return Made(dict(zip(images, kept, strict=True)), images, [1] * len(tasks))


def compare(alone: Made, among_others: Sequence[Made]) -> Difference:
    """How far images made in several orders of arrival are from the same made alone."""
    errors: list[tuple[float, int]] = []
    for made in among_others:
        for name, expected in alone.latents.items():
            rms = float(np.sqrt(np.mean((made.latents[name] - expected) ** 2) / np.mean(expected**2)))
            pixels = [np.asarray(by_id[name], np.int16) for by_id in (made.images, alone.images)]
            errors.append((rms, int(np.abs(pixels[0] - pixels[1]).max())))
    return Difference(
        latents=max(error for error, _ in errors),
        pixels=max(error for _, error in errors),
        same=sum(error == 0 for error, _ in errors) / len(errors),
        batch_size=float(np.mean([size for made in among_others for size in made.batch_sizes])),
    )


@contextmanager
def _kept_latents(pipe: MigePipeline) -> Iterator[list[NDArray[np.float32]]]:
    """The latents that the pipeline decodes meanwhile, of an image each, in their order."""
    kept: list[NDArray[np.float32]] = []
    decode = pipe.decode

    def keep(latents: Any) -> list[Image.Image]:
        kept.extend(np.array(to_numpy(latents)))
        return decode(latents)

    with patch.object(pipe, "decode", keep):
        yield kept


@click.command(context_settings={"max_content_width": 120})
@click.option("--model", default=str(DEFAULT_MODEL), help="a bundle or a model folder  [default: the default model]")
@click.option("--engine", default="auto", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--steps", type=click.IntRange(2), default=8, show_default=True)
@click.option("--orders", type=click.IntRange(1), default=3, show_default=True, help="of arrival")
@click.option("--batch/--no-batch", "batch", default=None, help="images in one call  [default: as the server does]")
def main(model: str, steps: int, orders: int, batch: bool | None, **options: Any) -> None:
    """Measure how far an image made among others is from the one made alone."""
    pipe = MigePipeline.from_pretrained(model, **options)
    one_image_a_call = None if batch is None else not batch
    tasks = sample_tasks(pipe.config.size, steps)
    made = [make_among_others(pipe, tasks, order, one_image_a_call) for order in range(orders)]
    difference = compare(make_alone(pipe, tasks), made)
    name = f"`{pipe.engine.name}` on {pipe.engine.device}, {pipe.engine.precision}"
    same, latents = f"{difference.same:.0%}", f"{difference.latents:.1e}"
    click.echo(f"| {name} | {difference.batch_size:.1f} | {same} | {latents} | {difference.pixels} |")


if __name__ == "__main__":
    main()
