"""Stage 4: the Q-Former, on pictures alone, as BLIP-2 trains its own before any other model reads it (Li et al., 2023).

Each of a picture's tokens must tell the VAE's latents of its own cell of the picture. From the diffusion transformer's
errors alone the Q-Former hardly learns within a small budget what stands where (docs/training/comparison.md).
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn

from mige_rt.config import ModelConfig
from trainer.loop import train
from trainer.model.dit import MLP, CrossAttention, sincos_positions
from trainer.model.encoders import ImageEncoder
from trainer.settings import StageSettings
from trainer.stages.compute_features import Batch, FeatureStore, batches
from trainer.stages.train_mige import starting_model


class PatchReader(nn.Module):
    """The image encoder from the ViT's features on, and a reader of its tokens: one cross-attention from the patches'
    positions, and one MLP, as in a block of the diffusion transformer. So a token must say not only what it holds but
    where that stands, in a way in which a position can find it."""

    def __init__(self, encoder: ImageEncoder, config: ModelConfig) -> None:
        super().__init__()
        dit = config.dit
        self.scale, self.patch, self.heads = config.vae.scale, dit.patch, dit.heads
        self.encoder = encoder
        encoder.freeze_vit()
        encoder.patch_embedder.requires_grad_(False)  # the denoiser's, whose start the next stage needs
        grid = config.size // config.vae.factor // dit.patch
        self.register_buffer("positions", sincos_positions(grid, grid, dit.width, dit.trained_grid))
        self.kv_linear = nn.Linear(config.text.width, 2 * dit.width)
        self.cross_attn = CrossAttention(dit.width, dit.heads)
        self.mlp = MLP(dit.width, dit.mlp, dit.width)
        self.read = nn.Linear(dit.width, config.vae.channels * dit.patch**2)

    positions: Tensor

    def patches(self, latents: Tensor) -> Tensor:
        """latents [N,c,h,w], unscaled -> what is to be told, [N,T,c*patch*patch]"""
        return F.pixel_unshuffle(latents * self.scale, self.patch).flatten(2).transpose(1, 2)

    def forward(self, vit: Tensor, latents: Tensor) -> Tensor:
        """vit [N,1+patches,ViT width]; latents [N,c,h,w], unscaled -> patches as read off the tokens"""
        tokens = self.encoder.tokens(vit, latents)  # [N,Q,D]
        tokens = F.rms_norm(tokens, tokens.shape[-1:])  # as T5's last norm
        rows, length, _ = tokens.shape
        keys, values = self.kv_linear(tokens).reshape(rows, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=tokens.device)
        x = self.positions.expand(rows, -1, -1)
        x = x + self.cross_attn(x, keys, values, mask)
        return self.read(x + self.mlp(F.layer_norm(x, x.shape[-1:])))


def _loss(module: nn.Module, batch: Batch, reader: PatchReader) -> tuple[Tensor, dict[str, float]]:
    wanted = reader.patches(batch.ref_latents)
    error = (module(batch.vit, batch.ref_latents) - wanted).square().mean()
    return error, {"explained": 1 - error.item() / wanted.var(dim=0).mean().item()}


def train_qformer(config: ModelConfig, settings: StageSettings, state: Path) -> Path:
    """Train a model's image encoder, but for the ViT, on the features of a state folder; returns the file with its
    weights, state/qformer/trained.safetensors. Raises InputError when the features are not there."""
    torch.manual_seed(settings.seed)
    folder = state / "qformer"
    store = FeatureStore(state / "features", config)
    reader = PatchReader(starting_model(config, state).image_encoder, config)
    average = train(
        "qformer", reader, partial(_loss, reader=reader), partial(batches, store, settings), settings, folder
    )
    assert isinstance(average, PatchReader)
    save_model(average.encoder, str(folder / "trained.safetensors"))
    return folder / "trained.safetensors"
