"""Stage 2: the image encoder's ViT, contrastively on images and names (as CLIP, Radford et al., 2021)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mige_rt.config import ModelConfig
from mige_rt.preprocessing import vit_pixels
from trainer.loop import Task, save_trained, train
from trainer.model.mige import Mige
from trainer.settings import StageSettings
from trainer.stages.state_plan import begin_state
from trainer.synthetic.backgrounds import draw
from trainer.synthetic.concepts import Concept, paste
from trainer.synthetic.scene import random_background

WIDTH = 128  # of the space in which images and names are compared


class ImageNameTowers(nn.Module):
    """The ViT with a projection, and names as the mean of their words' embeddings."""

    def __init__(self, config: ModelConfig, concepts: list[Concept]) -> None:
        super().__init__()
        self.encoder = Mige(config).image_encoder.vision
        words = sorted({word for concept in concepts for word in concept.name.split()})
        index = {word: i for i, word in enumerate(words)}
        counts = torch.zeros(len(concepts), len(words))
        for row, concept in enumerate(concepts):
            for word in concept.name.split():
                counts[row, index[word]] += 1
        self.register_buffer("names", counts / counts.sum(1, keepdim=True), persistent=False)
        self.words = nn.Linear(len(words), WIDTH, bias=False)
        self.image = nn.Linear(config.vision.width, WIDTH)
        self.temperature = nn.Parameter(torch.tensor(2.5))  # log of the inverse temperature

    names: Tensor

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is compared.

        Args:
            pixels: [M,3,p,p]

        Returns:
            Unit vectors of the images [M,WIDTH] and of every concept's name [concepts,WIDTH], and the inverse
            temperature that their products are multiplied by.
        """
        features = self.encoder(pixel_values=pixels).last_hidden_state.mean(dim=1)
        heat = self.temperature.clamp(max=4.6).exp()
        return F.normalize(self.image(features), dim=-1), F.normalize(self.words(self.names), dim=-1), heat


def _view(rng: np.random.Generator, concept: Concept, side: int) -> np.ndarray:
    """The concept somewhere on a random background, in either drawing style, mirrored or not; float32 [3,side,side]."""
    image = draw(random_background(rng), side)
    path = concept.noto if concept.noto is not None and rng.random() < 0.4 else concept.fluent
    size = rng.uniform(0.45, 0.98)
    x, y = rng.uniform(0.5 - (1 - size) / 2, 0.5 + (1 - size) / 2, 2) * side
    paste(image, path, (float(x), float(y)), round(size * side), bool(rng.integers(2)))
    return vit_pixels(Image.fromarray(image), side)


def _views(
    concepts: list[Concept], settings: StageSettings, side: int, step: int, rank: int, ranks: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Two views each of batch/2 different concepts: pixels [batch,3,side,side], concept indices [batch/2]."""
    while True:
        rng = np.random.default_rng([settings.seed, step * ranks + rank])
        chosen = rng.choice(len(concepts), settings.batch // 2, replace=False)
        pixels = np.stack([_view(rng, concepts[i], side) for _ in range(2) for i in chosen])
        yield torch.from_numpy(pixels), torch.from_numpy(chosen)
        step += 1


def _loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
    pixels, chosen = batch
    images, names, heat = module(pixels)
    logits = heat * images @ names.T  # [batch,concepts]
    by_name = F.cross_entropy(logits, chosen.repeat(2), label_smoothing=0.1)
    first, second = images.chunk(2)
    pairs = heat * first @ second.T
    here = torch.arange(len(chosen), device=chosen.device)
    by_image = (F.cross_entropy(pairs, here) + F.cross_entropy(pairs.T, here)) / 2
    right = (logits.detach().argmax(1) == chosen.repeat(2)).float().mean()
    return by_name + by_image, {"by_name": by_name.item(), "by_image": by_image.item(), "right": right.item()}


def train_vit(config: ModelConfig, settings: StageSettings, concepts: list[Concept], state: Path) -> Path:
    """Train the ViT; returns the file with its weights, state/vit/trained.safetensors (MIGE trains ln_vision anew).

    Raises InputError as `begin_state`.
    """
    torch.manual_seed(settings.seed)
    folder = state / "vit"
    begin_state(folder, config, settings)
    module = ImageNameTowers(config, concepts)
    task = Task("vit", _loss, partial(_views, concepts, settings, config.vision.side))
    average = train(module, task, settings, folder)
    assert isinstance(average, ImageNameTowers)
    return save_trained(average.encoder, folder)
