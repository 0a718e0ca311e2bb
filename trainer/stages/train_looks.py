"""Stage: the ViT again, so that its patches tell what they look like and where they are.

Contrastive training keeps names rather than looks. EVA's own training is masked image modelling first, whose features
hold both.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mige_rt.config import ModelConfig
from trainer.loop import Task, save_trained, train
from trainer.model.encoders import ImageEncoder
from trainer.settings import StageSettings
from trainer.stages.reading import code_size, fourier_code, patch_centres, ridge
from trainer.stages.rolling import Images, batches, image_series
from trainer.stages.starting_model import starting_model
from trainer.stages.state_plan import begin_state
from trainer.synthetic.concepts import Concept

EVERY = 3  # steps, a new chunk of images
WATCH_EVERY = 100  # steps
START_CHUNKS = 16  # of images that the readers start from
HELD_OUT_CHUNKS = 3


def patches(latents: Tensor, patch: int) -> Tensor:
    """Each patch's part of latents [N,c,h,w], as [N,T,c*patch*patch]."""
    return F.pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2)


class PatchReaders(nn.Module):
    """A ViT, and linear readers of each of its patches: one for the patch's latents, one for its place's code."""

    def __init__(self, encoder: ImageEncoder, config: ModelConfig) -> None:
        super().__init__()
        self.vision = encoder.vision
        self.vision.post_layernorm.requires_grad_(False)
        self.patch, self.scale = config.dit.patch, config.vae.scale
        width, grid, code = config.vision.width, config.vision.side // config.vision.patch, code_size(config)
        self.latents = nn.Linear(width, config.vae.channels * self.patch**2)
        self.place = nn.Linear(width, code)
        self.register_buffer("code", fourier_code(patch_centres(grid), grid, code))

    code: Tensor

    @torch.no_grad()
    def start(self, images: Images) -> None:
        """Start the readers as the best linear maps from what the ViT gave for some images."""
        features = images.features[:, 1:]
        tokens = F.layer_norm(features, features.shape[-1:]).flatten(0, 1)
        targets = {
            self.latents: patches(images.latents * self.scale, self.patch).flatten(0, 1),
            self.place: self.code.repeat(len(features), 1),
        }
        for linear, target in targets.items():
            weight, bias, _ = ridge(tokens, target)
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the ViT tells of images.

        Args:
            pixels: [N,3,p,p]

        Returns:
            The class token [N,width], and what is read of each patch: its latents [N,T,c*patch*patch] and the code of
            its place [N,T,code].
        """
        features = self.vision.encoder(inputs_embeds=self.vision.embeddings(pixels)).last_hidden_state
        tokens = F.layer_norm(features, features.shape[-1:])
        return features[:, 0], self.latents(tokens[:, 1:]), self.place(tokens[:, 1:])


def reading_errors(module: nn.Module, reader: PatchReaders, images: Images) -> dict[str, Tensor]:
    """The mean squared errors over the variances, on the module's device."""
    images = images.to(reader.code.device)
    name, latents, place = module(images.pixels)
    targets = {
        "latents": (latents, patches(images.latents * reader.scale, reader.patch)),
        "place": (place, reader.code.expand(len(place), -1, -1)),
        "name": (name, images.features[:, 0]),
    }
    return {
        key: (read.float() - target).square().mean() / target.flatten(0, -2).var(dim=0).mean()
        for key, (read, target) in targets.items()
    }


def train_looks(
    config: ModelConfig, settings: StageSettings, concepts: list[Concept], state: Path, start: Path | None = None
) -> Path:
    """Train the ViT of the starting model further.

    Args:
        config: The model's sizes.
        settings: How to optimise.
        concepts: All of them; those held out are measured on.
        state: The state folder.
        start: The model folder or bundle to go on from, if there is one.

    Returns:
        The file with the ViT's weights, state/looks/trained.safetensors.

    Raises:
        InputError: As `starting_model` and `begin_state`.
    """
    torch.manual_seed(settings.seed)
    model = starting_model(config, state, start)
    series, unseen = image_series(model, concepts, settings.seed)
    folder, reader = state / "looks", PatchReaders(model.image_encoder.train(), config)
    begin_state(folder, config, settings, start)
    reader.start(series.first(START_CHUNKS))
    held_out = unseen.first(HELD_OUT_CHUNKS)

    def loss(module: nn.Module, images: Images) -> tuple[Tensor, dict[str, float]]:
        errors = reading_errors(module, reader, images)
        return sum(errors.values(), torch.zeros(())), {f"{key} explained": 1 - e.item() for key, e in errors.items()}

    @torch.no_grad()
    def watch(average: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(average, PatchReaders)
        return {
            f"held-out {key} explained": 1 - float(e) for key, e in reading_errors(average, average, held_out).items()
        }

    stream = partial(batches, series, EVERY, settings)
    average = train(reader, Task("looks", loss, stream, watch, WATCH_EVERY), settings, folder)
    assert isinstance(average, PatchReaders)
    return save_trained(average.vision, folder)
