"""What the nodes do, without ComfyUI: its image tensors in and out, and mige-rt between them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from engines.factory import ENGINES as ENGINE_NAMES
from mige_rt import InputError, MigePipeline
from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.config import Precision, SchedulerName
from mige_rt.image_size import Fit
from mige_rt.pipeline import resolve_call
from mige_rt.sampling_params import DEFAULT_SCHEDULER, SamplingParams

ENGINES = ["auto", *ENGINE_NAMES]
DEVICES = ["auto", "cpu", "cuda", *(f"cuda:{k}" for k in range(1, 8))]
PRECISIONS = ["auto", *get_args(Precision)]
SCHEDULERS = [DEFAULT_SCHEDULER, *(name for name in get_args(SchedulerName) if name != DEFAULT_SCHEDULER)]
FITS = ["default", *get_args(Fit)]


@dataclass(frozen=True)
class Inputs:
    """What an image is made from; tensors are ComfyUI's: float [B,H,W,C], 0 to 1.

    Attributes:
        instruction: With <imagehere> for each image.
        source: To edit; None: a new image is made.
        images: In the order of the placeholders; None where nothing is connected.
    """

    instruction: str
    source: torch.Tensor | None
    images: Sequence[torch.Tensor | None]


def load_model(model: str, *, engine: str, device: str, precision: Any) -> MigePipeline:
    """Open a model; empty: the default one. Raises InputError, see `MigePipeline.from_pretrained`."""
    return MigePipeline.from_pretrained(
        model.strip() or DEFAULT_MODEL, engine=engine, device=device, precision=precision
    )


def sampling_params(
    *,
    steps: int,
    guidance_scale: float,
    image_guidance_scale: float,
    width: int,
    height: int,
    scheduler: Any,
    fit: Any,
) -> SamplingParams:
    """The settings of a node, where 0 and `default` stand for the model's own."""
    return SamplingParams(
        num_inference_steps=steps or None,
        guidance_scale=guidance_scale or None,
        image_guidance_scale=image_guidance_scale or None,
        width=width or None,
        height=height or None,
        scheduler=scheduler,
        fit=None if fit == "default" else fit,
    )


def generate(
    pipe: MigePipeline,
    inputs: Inputs,
    params: SamplingParams | None,
    *,
    seed: int,
    num_images: int = 1,
    on_step: Callable[[int, int], None],
) -> torch.Tensor:
    """Make the images of every entry of a batch.

    Args:
        pipe: The model.
        inputs: Each tensor has one image, which serves all entries, or one for each.
        params: None: the model's defaults.
        seed: Of the first image; the others take the next ones.
        num_images: Of each entry.
        on_step: Gets how many steps are done, and how many there are; what it raises ends the work.

    Returns:
        float32 [B * num_images,H,W,3], 0 to 1.

    Raises:
        InputError: They do not fit together, or cannot be used with this model.
    """
    params = params or SamplingParams()
    connected = [images for images in inputs.images if images is not None]
    if None in inputs.images[: len(connected)]:
        raise InputError(
            "an image input is free before one that is connected; connect image_1 first, then image_2, ..."
        )
    tensors = [*connected, *([] if inputs.source is None else [inputs.source])]
    sizes = {len(tensor) for tensor in tensors} - {1}
    if len(sizes) > 1:
        raise InputError(f"batches of {', '.join(map(str, sorted(sizes)))} images are connected; give as many, or one")
    batch = sizes.pop() if sizes else 1
    per_input = [[to_pil(tensor[k % len(tensor)]) for k in range(batch)] for tensor in connected]
    sources = None if inputs.source is None else [to_pil(inputs.source[k % len(inputs.source)]) for k in range(batch)]
    resolved = resolve_call(
        [inputs.instruction] * batch,
        [[images[k] for images in per_input] for k in range(batch)],
        sources,
        seed=seed,
        num_images_per_prompt=num_images,
    )
    requests = [request for of_entry in resolved for request in of_entry]
    at_once = min(pipe.max_batch_size, len(requests))
    steps = params.with_defaults(pipe.config, requests[0].task).num_inference_steps
    total = steps * -(-len(requests) // at_once)
    images: list[Image.Image] = []
    for first in range(0, len(requests), at_once):
        before = first // at_once * steps

        def after_step(
            pipe: MigePipeline, i: int, timestep: float, values: dict[str, Any], before: int = before
        ) -> None:
            on_step(before + i + 1, total)

        images += pipe.generate(requests[first : first + at_once], params, callback_on_step_end=after_step)
    return torch.stack([to_tensor(image) for image in images])


def to_pil(tensor: torch.Tensor) -> Image.Image:
    """One image of ComfyUI's as Pillow's: float [H,W,C], C 1 (gray), 3, or 4, whose alpha is put on white."""
    values = np.rint(np.clip(tensor.detach().cpu().float().numpy(), 0, 1) * 255).astype(np.uint8)
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4):
        raise InputError(f"an image has the shape {list(values.shape)}; [height, width, 1, 3 or 4] is expected")
    return Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A Pillow image as float32 [H,W,3], 0 to 1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)
