"""`python -m benchmarks.step_batching`: how far an image made among others is from the one made alone.

The step scheduler of `mige-rt serve` makes the same images in several orders of arrival, and the pipeline each of them
by itself. Prints a row of the table in docs/serving.md.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

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


class _LatentsPipeline(MigePipeline):
    """Keeps the latents that it decodes, in their order."""

    latents: list[NDArray[np.float32]]

    def decode(self, latents: Any) -> list[Image.Image]:
        self.latents += [np.array(entry) for entry in latents]
        return super().decode(latents)


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


def measure(pipe: MigePipeline, tasks: Sequence[ImageTask], orders: int, one_image_a_call: bool | None) -> Difference:
    """Make all tasks alone, then in several orders of arrival."""
    watched = _LatentsPipeline(pipe.config, pipe.condition_encoder.tokenize, pipe.engine, cuda_graphs=False)
    watched.latents = []
    pixels = {task.id: np.asarray(watched.generate([task.request], task.params)[0], np.int16) for task in tasks}
    latents = {task.id: values for task, values in zip(tasks, watched.latents, strict=True)}
    errors: list[tuple[float, int]] = []
    batch_sizes: list[int] = []
    for order in range(orders):
        watched.latents = []
        rng = random.Random(order)
        arrivals = rng.sample(list(tasks), len(tasks))
        scheduler = StepScheduler(watched, MAX_BATCH, one_image_a_call=one_image_a_call)
        while arrivals or not scheduler.idle:
            for _ in range(min(rng.randrange(3), len(arrivals))):
                scheduler.submit(arrivals.pop())
            for event in scheduler.step():
                if isinstance(event, StepReport):
                    batch_sizes += event.batch_sizes
                elif isinstance(event, Finished):
                    alone, among = latents[event.id], watched.latents.pop(0)
                    rms = float(np.sqrt(np.mean((among - alone) ** 2) / np.mean(alone**2)))
                    errors.append((rms, int(np.abs(np.asarray(event.image, np.int16) - pixels[event.id]).max())))
    return Difference(
        latents=max(error for error, _ in errors),
        pixels=max(error for _, error in errors),
        same=sum(error == 0 for error, _ in errors) / len(errors),
        batch_size=float(np.mean(batch_sizes)),
    )


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
    pipe = MigePipeline.from_pretrained(model, **options, cuda_graphs=False)
    difference = measure(pipe, sample_tasks(pipe.config.size, steps), orders, None if batch is None else not batch)
    name = f"`{pipe.engine.name}` on {pipe.engine.device}, {pipe.engine.precision}"
    same, latents = f"{difference.same:.0%}", f"{difference.latents:.1e}"
    click.echo(f"| {name} | {difference.batch_size:.1f} | {same} | {latents} | {difference.pixels} |")


if __name__ == "__main__":
    main()
