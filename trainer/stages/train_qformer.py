"""Stage: the Q-Former, on images alone, as BLIP-2 trains its own before any other model reads it (Li et al., 2023).

Its tokens must tell a reader the VAE's latents of each patch of the image. From the diffusion transformer's errors
alone the Q-Former hardly learns within a small budget what is where (docs/training/comparison.md).
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mige_rt.config import ModelConfig
from trainer.loop import Task, save_trained, train
from trainer.model.dit import MLP, CrossAttention, sincos_positions
from trainer.model.encoders import ImageEncoder
from trainer.settings import StageSettings
from trainer.stages.reading import fourier_code, patch_centres, query_places, ridge, start_to_look
from trainer.stages.rolling import Images, batches, image_series
from trainer.stages.starting_model import with_trained_vit
from trainer.stages.state_plan import begin_state
from trainer.stages.train_looks import HELD_OUT_CHUNKS, START_CHUNKS, WATCH_EVERY, patches
from trainer.synthetic.concepts import Concept

EVERY = 6  # steps, a new chunk of images
QUERY_GAIN = 5.0  # how sharply the Q-Former looks at the start


@torch.no_grad()
def start_qformer(encoder: ImageEncoder, features: Tensor) -> float:
    """Start the Q-Former so that each of its tokens looks at patches of its own.

    A query is the codes of its patches, each in heads of its own; keys are the linear regression from features to
    codes. Residual branches other than the one that looks start at zero.

    Args:
        encoder: Changed in place.
        features: The ViT's, of some images, [N,1+patches,width].

    Returns:
        The share of the code's variance that is read from the features.
    """
    layers: Any = encoder.qformer.encoder.layer
    attention = layers[0].crossattention.attention
    heads, size = attention.num_attention_heads, attention.attention_head_size
    tokens = encoder.vision.post_layernorm(features)[:, 1:]
    grid = round(tokens.shape[1] ** 0.5)
    places = query_places(encoder.query_tokens.shape[1], grid)  # [Q,patches a query,2]
    of_head = torch.arange(heads) * places.shape[1] // heads
    queries = torch.stack([fourier_code(places[:, patch], grid, size) for patch in of_head], dim=1)  # [Q,heads,size]
    encoder.query_tokens.copy_(queries.flatten(1))
    code = fourier_code(patch_centres(grid), grid, size).repeat(len(tokens), 1)
    weight, bias, explained = ridge(tokens.flatten(0, 1), code)
    attention.key.weight.copy_(weight.repeat(heads, 1))
    attention.key.bias.copy_(bias.repeat(heads))
    spread = encoder.query_tokens.std(dim=-1).mean()  # which the norm in front of the first layer takes away
    attention.query.weight.copy_(torch.eye(heads * size) * QUERY_GAIN * spread)
    attention.query.bias.zero_()
    for layer in layers:
        nn.init.zeros_(layer.attention.output.dense.weight)
        nn.init.zeros_(layer.output_query.dense.weight)
    nn.init.xavier_uniform_(attention.value.weight)
    nn.init.xavier_uniform_(layers[0].crossattention.output.dense.weight)
    nn.init.eye_(encoder.projection.weight)
    return explained


class PatchReader(nn.Module):
    """The image encoder from the ViT's features on, and a reader of its tokens.

    The reader is one cross-attention from the patches' positions, and one MLP, as in a block of the diffusion
    transformer. So a token must say not only what it holds but where that is, in a way in which a position can find it.
    """

    def __init__(self, encoder: ImageEncoder, config: ModelConfig) -> None:
        super().__init__()
        dit = config.dit
        self.scale, self.patch, self.heads = config.vae.scale, dit.patch, dit.heads
        self.encoder = encoder
        encoder.freeze_vit()
        encoder.patch_embedder.requires_grad_(False)  # the denoiser's, whose start the next stage needs
        self.grid = config.size // config.vae.factor // dit.patch
        self.register_buffer("positions", sincos_positions(self.grid, self.grid, dit.width, dit.trained_grid))
        self.kv_linear = nn.Linear(config.text.width, 2 * dit.width)
        self.cross_attn = CrossAttention(dit.width, dit.heads)
        self.mlp = MLP(dit.width, dit.mlp, dit.width)
        self.read = nn.Linear(dit.width, config.vae.channels * dit.patch**2)

    positions: Tensor

    def patches(self, latents: Tensor) -> Tensor:
        """What is to be told of unscaled latents [N,c,h,w], [N,T,c*patch*patch]."""
        return patches(latents * self.scale, self.patch)

    def tokens(self, features: Tensor, latents: Tensor) -> Tensor:
        """The image's tokens as T5 passes them on at its start, [N,Q,D]."""
        tokens = self.encoder.tokens(features, latents)
        return F.rms_norm(tokens, tokens.shape[-1:])

    @torch.no_grad()
    def start(self, images: Images) -> dict[str, float]:
        """Start the Q-Former and the reader so that they look.

        Returns:
            The shares of the codes' variance that are read: from the features of the `vit`, by the reader's `queries`
            from positions, and by its `keys` from tokens.
        """
        looked_at = start_qformer(self.encoder, images.features)
        tokens = self.tokens(images.features, images.latents)
        read = start_to_look(self.cross_attn, self.kv_linear, self.positions.expand(2, -1, -1), tokens, self.grid)
        return {"vit": looked_at, **read}

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """The patches as read off the tokens, [N,T,c*patch*patch].

        Args:
            features: The ViT's, [N,1+patches,width].
            latents: Unscaled, [N,c,h,w].
        """
        tokens = self.tokens(features, latents)
        rows, length, _ = tokens.shape
        keys, values = self.kv_linear(tokens).reshape(rows, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=tokens.device)
        x = self.positions.expand(rows, -1, -1)
        x = x + self.cross_attn(x, keys, values, mask)
        return self.read(x + self.mlp(F.layer_norm(x, x.shape[-1:])))


def reading_error(module: nn.Module, reader: PatchReader, images: Images) -> tuple[Tensor, Tensor]:
    """The patches' mean squared error, and the share of their variance that is explained, on the module's device."""
    images = images.to(reader.positions.device)
    target = reader.patches(images.latents)
    error = (module(images.features, images.latents).float() - target).square().mean()
    return error, 1 - error.detach() / target.flatten(0, -2).var(dim=0).mean()


def train_qformer(
    config: ModelConfig, settings: StageSettings, concepts: list[Concept], state: Path, start: Path | None = None
) -> Path:
    """Train a model's image encoder, but for the ViT.

    Args:
        config: The model's sizes.
        settings: How to optimise.
        concepts: All of them; those held out are measured on.
        state: The state folder.
        start: The model folder or bundle to go on from, if there is one.

    Returns:
        The file with the image encoder's weights, state/qformer/trained.safetensors.

    Raises:
        InputError: As `with_trained_vit` and `begin_state`.
    """
    torch.manual_seed(settings.seed)
    model, folder = with_trained_vit(config, state, start).train(), state / "qformer"
    begin_state(folder, config, settings, start)
    series, unseen = image_series(model, concepts, settings.seed)
    held_out = unseen.first(HELD_OUT_CHUNKS)
    reader = PatchReader(model.image_encoder, config)
    shares = reader.start(series.first(START_CHUNKS))
    (folder / "start.json").write_text(json.dumps(shares) + "\n")

    def loss(module: nn.Module, images: Images) -> tuple[Tensor, dict[str, float]]:
        error, explained = reading_error(module, reader, images)
        return error, {"explained": explained.item()}

    @torch.no_grad()
    def watch(average: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(average, PatchReader)
        return {"held-out explained": reading_error(average, average, held_out)[1].item()}

    stream = partial(batches, series, EVERY, settings)
    average = train(reader, Task("qformer", loss, stream, watch, WATCH_EVERY), settings, folder)
    assert isinstance(average, PatchReader)
    return save_trained(average.encoder, folder)
