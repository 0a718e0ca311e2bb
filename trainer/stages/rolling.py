"""Images for training that are made as they are needed, and used a few times before newer ones take their place."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mige_rt.preprocessing import vae_pixels, vit_pixels
from trainer.model.encoders import ImageEncoder
from trainer.model.vae import VAEEncoder
from trainer.settings import StageSettings
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import make_sample

CHUNK = 64  # images encoded at a time
WINDOW = 40  # chunks that batches are drawn from
VARIED = 0.8  # of the things


@dataclass(frozen=True)
class Images:
    """N images as the two encoders see them."""

    pixels: Tensor  # uint8 [N,3,p,p], the ViT's input before it is scaled
    latents: Tensor  # [N,c,h,w], unscaled
    features: Tensor  # [N,1+patches,width], a ViT's before its last norm

    def to(self, device: torch.device) -> "Images":
        return Images(*(getattr(self, field.name).to(device) for field in fields(self)))

    def __getitem__(self, index: Tensor | slice) -> "Images":
        return Images(*(getattr(self, field.name)[index] for field in fields(self)))


def joined(parts: list[Images]) -> Images:
    return Images(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Images)))


class ImageSeries:
    """An unlimited series of references and scenes of the small world, in chunks of CHUNK images."""

    def __init__(
        self, vae: VAEEncoder, encoder: ImageEncoder, concepts: list[Concept], side: int, varied: float = VARIED
    ) -> None:
        self.vae, self.encoder, self.concepts, self.side, self.varied = vae, encoder, concepts, side, varied

    @torch.no_grad()
    def chunk(self, seed: int, number: int) -> Images:
        """The same one whenever it is asked for."""
        arrays: list[np.ndarray] = []
        index = number * CHUNK
        while len(arrays) < CHUNK:
            sample = make_sample(seed, index, self.concepts, self.side, varied=self.varied)
            scene = sample.target if sample.source is None or index % 2 else sample.source
            arrays += [scene, *(image for image in sample.images if image is not sample.source)]
            index += 1
        images = [Image.fromarray(array) for array in arrays[:CHUNK]]
        vit_side = self.encoder.vision.config.image_size
        vit = torch.from_numpy(np.stack([vit_pixels(image, vit_side) for image in images]))
        vae = torch.from_numpy(np.stack([vae_pixels(image, self.side, self.side, "crop") for image in images]))
        latents = self.vae(vae.to(memory_format=torch.channels_last))[0]
        return Images(vit, latents, self.encoder.vit(vit))


def batches(
    chunk: Callable[[int], Images], every: int, settings: StageSettings, step: int, rank: int, ranks: int
) -> Iterator[Images]:
    """Batches of one process from a step on, the same ones whenever it is asked: drawn from the newest WINDOW chunks,
    of which one more is made `every` steps."""
    window: OrderedDict[int, Images] = OrderedDict()
    while True:
        newest = WINDOW + step // every
        for number in range(newest - WINDOW, newest):
            if number not in window:
                window[number] = chunk(number)
        while next(iter(window)) < newest - WINDOW:
            window.popitem(last=False)
        rng = np.random.default_rng([settings.seed, step, rank])
        drawn = rng.integers(len(window) * CHUNK, size=settings.batch)
        chunks = list(window.values())
        yield joined([chunks[i // CHUNK][slice(i % CHUNK, i % CHUNK + 1)] for i in drawn.tolist()])
        step += 1
