"""Images for training that are made as they are needed, and used a few times before newer ones take their place."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mige_rt.preprocessing import vae_pixels, vit_pixels
from trainer.model.mige import Mige
from trainer.settings import StageSettings
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import make_sample

CHUNK = 64  # images encoded at a time
WINDOW = 40  # chunks that batches are drawn from
VARIED = 0.8  # of the things
HELD_OUT_SEED = 10**6 + 3


@dataclass(frozen=True)
class Images:
    """N images as the two encoders see them."""

    pixels: Tensor  # uint8 [N,3,p,p], the ViT's input before it is scaled
    latents: Tensor  # [N,c,h,w], unscaled
    features: Tensor  # [N,1+patches,width], a ViT's before its last norm

    def to(self, device: torch.device) -> "Images":
        """The same on a device."""
        return Images(*(getattr(self, field.name).to(device) for field in fields(self)))

    def __getitem__(self, index: Tensor | slice) -> "Images":
        return Images(*(getattr(self, field.name)[index] for field in fields(self)))


def concatenate(parts: Sequence[Images]) -> Images:
    """All images of some parts, in their order."""
    return Images(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Images)))


class ImageSeries:
    """An unlimited series of references and scenes of the synthetic data, in chunks of CHUNK images."""

    def __init__(self, model: Mige, concepts: Sequence[Concept], seed: int, varied: float) -> None:
        """Make a series.

        Args:
            model: Its VAE and ViT encode the images.
            concepts: What the images show.
            seed: Of the samples.
            varied: Share of the concepts whose images are varied.
        """
        self.vae, self.encoder, self.config = model.vae_encoder, model.image_encoder, model.config
        self.concepts, self.seed, self.varied = concepts, seed, varied

    def first(self, number: int) -> Images:
        """The images of the first chunks."""
        return concatenate([self.chunk(index) for index in range(number)])

    @torch.no_grad()
    def chunk(self, number: int) -> Images:
        """The same one whenever it is asked for."""
        arrays: list[np.ndarray] = []
        index = number * CHUNK
        while len(arrays) < CHUNK:
            sample = make_sample(self.seed, index, self.concepts, self.config.size, varied=self.varied)
            scene = sample.target if sample.source is None or index % 2 else sample.source
            arrays += [scene, *(image for image in sample.images if image is not sample.source)]
            index += 1
        images = [Image.fromarray(array) for array in arrays[:CHUNK]]
        vit_side, side = self.config.vision.side, self.config.size
        vit = torch.from_numpy(np.stack([vit_pixels(image, vit_side) for image in images]))
        vae = torch.from_numpy(np.stack([vae_pixels(image, side, side, "crop") for image in images]))
        latents = self.vae(vae.to(memory_format=torch.channels_last))[0]
        return Images(vit, latents, self.encoder.vit(vit))


def image_series(model: Mige, concepts: Sequence[Concept], seed: int) -> tuple[ImageSeries, ImageSeries]:
    """A series of things to train on, most of them varied, and one of those that are held out, as they are.

    They are encoded by a copy: training changes the model, and moves it to its device.
    """
    model = deepcopy(model)
    known, held_out = ([c for c in concepts if c.held_out == is_held_out] for is_held_out in (False, True))
    return ImageSeries(model, known, seed, VARIED), ImageSeries(model, held_out, HELD_OUT_SEED, 0.0)


def batches(
    series: ImageSeries, every: int, settings: StageSettings, step: int, rank: int, ranks: int
) -> Iterator[Images]:
    """The batches of one process from a step on, the same ones whenever it is called.

    Args:
        series: What is drawn from: its newest WINDOW chunks.
        every: Steps after which the oldest of these makes room for one more.
        settings: The size of a batch, and the seed.
        step: The first step.
        rank: The process's.
        ranks: Number of processes.

    Yields:
        A batch.
    """
    window: OrderedDict[int, Images] = OrderedDict()
    while True:
        newest = WINDOW + step // every
        for number in range(newest - WINDOW, newest):
            if number not in window:
                window[number] = series.chunk(number)
        while next(iter(window)) < newest - WINDOW:
            window.popitem(last=False)
        rng = np.random.default_rng([settings.seed, step, rank])
        drawn = rng.integers(len(window) * CHUNK, size=settings.batch)
        chunks = list(window.values())
        yield concatenate([chunks[i // CHUNK][slice(i % CHUNK, i % CHUNK + 1)] for i in drawn.tolist()])
        step += 1
