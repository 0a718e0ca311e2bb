"""Stage 1: the autoencoder, on images of the synthetic data; its latents get mean 0 and deviation 1 a channel."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from mige_rt.atomic import atomic_file, atomic_folder
from mige_rt.config import ModelConfig
from mige_rt.postprocessing import to_image
from trainer.loop import Task, train
from trainer.model.vae import VAEDecoder, VAEEncoder, make_vae
from trainer.settings import StageSettings
from trainer.stages.state_plan import begin_state
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import make_sample

KL_WEIGHT = 1e-3


class Autoencoder(nn.Module):
    """A VAE, both halves."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.encode, self.decode = VAEEncoder(vae), VAEDecoder(vae)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction of pixels [M,3,H,W] from a drawn latent, the latent's mean, and its log variance."""
        mean, logvar = self.encode(pixels)
        return self.decode(mean + torch.exp(logvar / 2) * torch.randn_like(mean)), mean, logvar


def _images(
    concepts: list[Concept], settings: StageSettings, side: int, step: int, rank: int, ranks: int
) -> Iterator[Tensor]:
    """Batches [batch,3,side,side] in [-1,1]: every image of the samples that belong to a step."""
    while True:
        kept: list[np.ndarray] = []
        index = (step * ranks + rank) * settings.batch
        while len(kept) < settings.batch:
            sample = make_sample(settings.seed, index, concepts, side)
            kept += [sample.target, *sample.images]
            index += 1
        batch = torch.from_numpy(np.stack(kept[: settings.batch])).permute(0, 3, 1, 2)
        yield batch.float() / 127.5 - 1
        step += 1


def _loss(module: nn.Module, pixels: Tensor) -> tuple[Tensor, dict[str, float]]:
    pixels = pixels.to(memory_format=torch.channels_last)
    made, mean, logvar = module(pixels)
    error = made - pixels
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    edges = sum((error.diff(dim=d)).abs().mean() for d in (2, 3))
    mse = F.mse_loss(made, pixels)
    figures = {"psnr": 10 * math.log10(4 / mse.item()), "divergence": divergence.item()}
    return error.abs().mean() + edges + mse + KL_WEIGHT * divergence, figures


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Fold each latent channel's mean and deviation over `pixels` into the two 1x1 convolutions around the latent.

    The reconstruction stays what it was; latents get mean 0 and deviation 1 a channel, which diffusion learns fastest.
    """
    encode, decode = VAEEncoder(vae), VAEDecoder(vae)
    mean, _ = encode(pixels)
    centre, spread = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3))
    channels = len(centre)
    before, after = encode.quant_conv, decode.post_quant_conv
    assert before.bias is not None and after.bias is not None
    after.bias += after.weight[:, :, 0, 0] @ centre
    after.weight *= spread[None, :, None, None]
    before.weight[:channels] /= spread[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - centre) / spread
    before.bias[channels:] -= 2 * spread.log()


def train_vae(config: ModelConfig, settings: StageSettings, concepts: list[Concept], state: Path) -> Path:
    """Train the VAE; returns the folder with it in diffusers' layout, state/vae/trained.

    Raises InputError as `begin_state`.
    """
    torch.manual_seed(settings.seed)
    folder = state / "vae"
    begin_state(folder, config, settings)
    batches = partial(_images, concepts, settings, config.size)

    @torch.no_grad()
    def preview(average: nn.Module, step: int) -> dict[str, float]:
        pixels = next(batches(10**6, 0, 1))[:8]
        made = average(pixels.to(next(average.parameters()).device))[0].cpu()
        columns = [
            np.concatenate([np.asarray(to_image(p.numpy())) for p in pair]) for pair in zip(pixels, made, strict=True)
        ]
        with atomic_file(folder / f"preview-{step:06d}.png") as temporary:
            Image.fromarray(np.concatenate(columns, axis=1)).save(temporary, format="PNG")
        return {}

    module = Autoencoder(make_vae(config.vae)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average = train(module, Task("vae", _loss, batches, preview, 500), settings, folder)
    assert isinstance(average, Autoencoder)
    stream = batches(2 * 10**6, 0, 1)
    normalise_latents(average.vae, torch.cat([next(stream) for _ in range(64)]))
    with atomic_folder(folder / "trained", replace=True) as trained:
        average.vae.save_pretrained(trained)
    return folder / "trained"
