"""The model that a stage starts from: what the stages before it made, on a bundle or on nothing."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_model
from torch import nn

from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from trainer.checkpoints.model_folder import load_model as load_model_folder
from trainer.model.dit import CrossAttention, Denoiser, sincos_positions
from trainer.model.encoders import ImageEncoder, TextEncoder
from trainer.model.mige import Mige
from trainer.model.vae import VAEDecoder, VAEEncoder

COPY_GAIN = 0.5  # of latents and source in their own channels at the start
COPY_LATENTS, COPY_SOURCE = 0.5, -0.8  # what they count for in v at the start: about right in mid-schedule


def initialise(model: Mige) -> None:
    """Set the starting weights of the DiT and T5.

    Gates and cross-attention start at zero, so that each block starts as the identity (DiT, Peebles & Xie, 2023). What
    is in the latents and in the source can be read off the last layer's input as it is, so that the network need not
    first find out how to copy (ours: published weights start from PixArt-alpha's, with zeros for the source's
    channels).
    """
    denoiser, conditioner = model.denoiser, model.conditioner
    pass_on(model.text_encoder)
    for module in [*denoiser.modules(), *conditioner.modules()]:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for part in (denoiser.t_embedder.mlp, denoiser.t_block):
        for layer in part:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
    for module in denoiser.modules():
        if isinstance(module, CrossAttention):
            nn.init.zeros_(module.proj.weight)
    _start_as_a_copy(denoiser)


def pass_on(text_encoder: TextEncoder) -> None:
    """Start T5's residual branches at zero, so that its output is what it is given, normalized."""
    for name, weight in text_encoder.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            nn.init.zeros_(weight)


@torch.no_grad()
def _start_as_a_copy(denoiser: Denoiser) -> None:
    """Give each value of a patch, of the latents and of the source, a channel of its own, which the output adds up.

    v is (alpha * noisy - data) / sigma, and the data are nearly the source's: the timestep's factors are left to learn.
    The channels are those whose positions hardly vary.
    """
    config = denoiser.config
    dit, channels = config.dit, config.vae.channels
    positions = sincos_positions(dit.trained_grid, dit.trained_grid, dit.width, dit.trained_grid)
    values = dit.patch**2 * channels
    order = positions.std(dim=0).argsort()[: 2 * values]
    weight = denoiser.x_embedder.proj.weight  # [width,2c,patch,patch]
    flat = weight.view(dit.width, -1)
    nn.init.xavier_uniform_(flat)
    flat[order] = 0
    flat[order, torch.arange(2 * values)] = COPY_GAIN
    assert denoiser.x_embedder.proj.bias is not None
    nn.init.zeros_(denoiser.x_embedder.proj.bias)
    spread = math.sqrt(float(positions.var(dim=1, unbiased=False).mean()) + float(flat.square().sum()) / dit.width)
    last = denoiser.final_layer.linear.weight  # [patch*patch*out,width], the patch's place before the channel
    nn.init.zeros_(last)
    out = last.shape[0] // dit.patch**2
    for c in range(channels):
        for place in range(dit.patch**2):
            row, value = place * out + c, c * dit.patch**2 + place
            last[row, order[value]] = COPY_LATENTS * spread / COPY_GAIN
            last[row, order[values + value]] = COPY_SOURCE * spread / COPY_GAIN


def _load(module: nn.Module, path: Path, stage: str) -> None:
    if not path.exists():
        raise InputError(f"{path} is not there; run the stage {stage} first")
    load_model(module, path)


def starting_model(config: ModelConfig, state: Path, start: Path | None = None) -> Mige:
    """The model that training starts from.

    Args:
        config: The model's sizes.
        state: The state folder, whose VAE and ViT are taken where there is no `start`; the rest is at its starting
            weights.
        start: The model folder or bundle to go on from. Its Q-Former starts anew where the config's has another number
            of image tokens.

    Raises:
        InputError: The stages `vae` and `vit` have not run, or `start` is no such folder or has other sizes.
    """
    model = Mige(config)
    norm = {k: v.clone() for k, v in model.image_encoder.vision.post_layernorm.state_dict().items()}
    if start is None:
        vae = state / "vae" / "trained"
        if not vae.exists():
            raise InputError(f"{vae} is not there; run the stages vae and vit first")
        autoencoder = AutoencoderKL.from_pretrained(vae)
        model.vae_encoder, model.vae_decoder = VAEEncoder(autoencoder), VAEDecoder(autoencoder)
        _load(model.image_encoder.vision, state / "vit" / "trained.safetensors", "vit")
        model.image_encoder.vision.post_layernorm.load_state_dict(norm)
        initialise(model)
        return model
    given = load_model_folder(start)
    _check_sizes(replace(given.config, qformer=config.qformer), config, start)
    if given.config.qformer == config.qformer:
        return given.train()
    for name in ("vae_encoder", "vae_decoder", "text_encoder", "conditioner", "denoiser"):
        setattr(model, name, getattr(given, name))
    model.image_encoder = ImageEncoder(config, given.denoiser.x_embedder)
    model.image_encoder.vision = given.image_encoder.vision
    model.image_encoder.vision.post_layernorm.load_state_dict(norm)
    return model


def climbed_model(config: ModelConfig, start: Path | None) -> Mige:
    """A model that has been up the ladder, as it is.

    Args:
        config: The model's sizes.
        start: Its folder or bundle.

    Raises:
        InputError: `start` is missing, is no such folder or has other sizes.
    """
    if start is None:
        raise InputError("training goes on from a model that has been up the ladder (climbed): give it by --start")
    model = load_model_folder(start)
    _check_sizes(model.config, config, start)
    return model.train()


def _check_sizes(found: ModelConfig, config: ModelConfig, start: Path) -> None:
    if replace(found, defaults=config.defaults) != config:
        raise InputError(f"{start} holds a model of other sizes than the config's ({config.name}): change either")


def with_trained_vit(config: ModelConfig, state: Path, start: Path | None = None) -> Mige:
    """The starting model with the ViT that the stage `looks` trained.

    Raises:
        InputError: That stage has not run, or as `starting_model`.
    """
    model = starting_model(config, state, start)
    _load(model.image_encoder.vision, state / "looks" / "trained.safetensors", "looks")
    model.image_encoder.vision.post_layernorm.reset_parameters()
    return model


def with_trained_encoder(config: ModelConfig, state: Path, start: Path | None = None) -> Mige:
    """The starting model with the image encoder that the stage `qformer` trained.

    Raises:
        InputError: That stage has not run, or as `starting_model`.
    """
    model = starting_model(config, state, start)
    _load(model.image_encoder, state / "qformer" / "trained.safetensors", "qformer")
    return model
