"""The frozen encoders' features of a training sample, as they are stored in a shard.

A sample in a shard is two or three files of one key: `json` with id, task, prompt, and the rows `target`, `source`
(null: none) and `images` of `latents.npy`, and `images_vit`, rows of `vit.npy`. P images, of which the V that the
prompt refers to have ViT features:

  latents.npy  float16 [P,2c,h,w]: means of the unscaled latents, then deviations, as published
  vit.npy      float16 [V,1+patches,width]: the ViT's output before ln_vision; left out where V is 0
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import nn

from mige_rt.config import ModelConfig
from mige_rt.errors import NotFiniteError
from mige_rt.preprocessing import vae_pixels, vit_pixels
from trainer.checkpoints.open_checkpoint import CheckpointLocation, open_checkpoint
from trainer.checkpoints.weights import Checkpoint
from trainer.data.manifest import ManifestSample
from trainer.model.encoders import ImageEncoder
from trainer.model.vae import VAEEncoder


@dataclass(frozen=True)
class Encoders:
    """The two image encoders that training does not change."""

    config: ModelConfig
    vae: VAEEncoder
    image_encoder: ImageEncoder
    device: torch.device

    def fingerprint(self, *, rounded: bool = False) -> str:
        """A digest of the weights that the features depend on; see `fingerprint`."""
        vision = self.image_encoder.vision
        return fingerprint(self.vae, vision.embeddings, vision.encoder, rounded=rounded)

    @torch.no_grad()
    def latents(self, images: Sequence[Image]) -> NDArray[np.float16]:
        """Means and deviations, [P,2c,h,w], of images cropped to the trained size as published."""
        side = self.config.size
        pixels = np.stack([vae_pixels(image, side, side, "crop") for image in images])
        mean, logvar = self.vae(torch.from_numpy(pixels).to(self.device))
        return _half(torch.cat([mean, (0.5 * logvar).exp()], dim=1), "VAE")

    @torch.no_grad()
    def vit(self, images: Sequence[Image]) -> NDArray[np.float16]:
        """The ViT's features, [V,1+patches,width], of whole images."""
        pixels = np.stack([vit_pixels(image, self.config.vision.side) for image in images])
        return _half(self.image_encoder.vit(torch.from_numpy(pixels).to(self.device)), "ViT")


def fingerprint(*modules: nn.Module, rounded: bool = False) -> str:
    """A digest of the weights of some modules.

    Args:
        modules: In this order.
        rounded: As float16 holds them, which is the same for a model and for what was saved of it in that.
    """
    digest = sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            numbers = value.half() if rounded and value.is_floating_point() else value
            digest.update(numbers.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_encoders(model: CheckpointLocation, device: str) -> Encoders:
    """The encoders of a MIGE checkpoint in any layout.

    Args:
        model: A model folder, a bundle, or the published checkpoint; its VAE and ViT are those that the published run
            started from, since it trains neither.
        device: cpu, cuda, cuda:1, which is there.

    Raises:
        InputError: There is no such checkpoint.
    """
    return encoders_of(open_checkpoint(model), device)


def encoders_of(checkpoint: Checkpoint, device: str) -> Encoders:
    """The encoders of an open checkpoint; see `load_encoders`."""
    loaded = checkpoint.load({"vae_encoder", "image_encoder"}, dtype=torch.float32, device=device)
    return Encoders(checkpoint.config, loaded.vae_encoder, loaded.image_encoder, torch.device(device))


def encode_samples(
    encoders: Encoders, samples: Sequence[tuple[ManifestSample, dict[str, Image]]], batch: int
) -> list[dict[str, Any]]:
    """The files of some samples by their extensions, each with its decoded images by their paths.

    Args:
        encoders: What the images go through.
        samples: With all their images, RGB.
        batch: Images encoded at once.
    """
    vae_images = [images[path] for sample, images in samples for path in sample.paths()]
    vit_images = [images[path] for sample, images in samples for path in dict.fromkeys(sample.images)]
    latents = [encoders.latents(vae_images[i : i + batch]) for i in range(0, len(vae_images), batch)]
    features = [encoders.vit(vit_images[i : i + batch]) for i in range(0, len(vit_images), batch)]
    latent_rows = iter(row for chunk in latents for row in chunk)
    vit_rows = iter(row for chunk in features for row in chunk)
    return [_files(sample, latent_rows, vit_rows) for sample, _ in samples]


def _files(sample: ManifestSample, latents: Any, features: Any) -> dict[str, Any]:
    paths, referred = sample.paths(), tuple(dict.fromkeys(sample.images))
    files: dict[str, Any] = {
        "json": {
            "id": sample.id,
            "task": sample.task,
            "prompt": sample.prompt,
            "target": paths.index(sample.target),
            "source": None if sample.source is None else paths.index(sample.source),
            "images": [paths.index(image) for image in sample.images],
            "images_vit": [referred.index(image) for image in sample.images],
        },
        "latents.npy": np.stack([next(latents) for _ in paths]),
    }
    if referred:
        files["vit.npy"] = np.stack([next(features) for _ in referred])
    return files


def _half(values: torch.Tensor, encoder: str) -> NDArray[np.float16]:
    half = values.half().cpu().numpy()
    if not np.isfinite(half).all():
        raise NotFiniteError(f"the {encoder} gives values that float16 cannot hold; its weights are damaged")
    return half
