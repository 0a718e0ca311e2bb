"""Stage 5: MIGE itself, all but the two image encoders, jointly (paper, section 4.1)."""

import math
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_model
from torch import Tensor, nn

from engines.pytorch import PyTorchEngine
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams
from mige_rt.scheduler import TRAIN_STEPS
from mige_rt.tokenizer import load_tokenizer
from trainer.checkpoints.model_folder import COMPONENTS
from trainer.checkpoints.model_folder import load_model as load_model_folder
from trainer.loop import train
from trainer.model.dit import CrossAttention, Denoiser, sincos_positions
from trainer.model.mige import Mige
from trainer.model.vae import VAEDecoder, VAEEncoder
from trainer.objective import add_noise, objective
from trainer.preview import PREVIEW_SEED, answer, first_of_each_kind, grid
from trainer.settings import StageSettings
from trainer.stages.compute_features import Batch, FeatureStore, batches
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import KINDS

PREVIEW_EVERY = 1000  # steps
COPY_GAIN = 0.5  # of latents and source in their own channels at the start
COPY_LATENTS, COPY_SOURCE = 0.5, -0.8  # what they count for in v at the start: about right in mid-schedule
DROP = 0.05  # chance to drop the text, the same to drop the source, the same to drop both


def initialise(model: Mige) -> None:
    """The DiT's starting weights: gates and cross-attention start at zero, so that each block starts as the identity
    (DiT, Peebles & Xie, 2023); and what is in the latents and in the source can be read off the last layer's input as
    it is, so that the network need not first find out how to copy (ours: published weights start from PixArt-alpha's,
    with zeros for the source's channels)."""
    denoiser, conditioner = model.denoiser, model.conditioner
    for name, weight in model.text_encoder.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            nn.init.zeros_(weight)
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


class TrainedPart(nn.Module):
    """What this stage trains, and the frozen ViT beside it: a prediction from a batch of features."""

    def __init__(self, model: Mige) -> None:
        super().__init__()
        self.config = model.config
        self.image_encoder, self.text_encoder = model.image_encoder, model.text_encoder
        self.conditioner, self.denoiser = model.conditioner, model.denoiser
        self.image_encoder.freeze_vit()

    def with_vae(self, other: Mige) -> Mige:
        """A whole model that shares this part's weights and another's VAE."""
        whole = copy(other)
        whole._modules = {**other._modules, **{name: self._modules[name] for name in COMPONENTS}}
        return whole

    def forward(self, batch: Batch, noisy: Tensor, source: Tensor, timestep: Tensor, has_text: Tensor) -> Tensor:
        """noisy, source [B,c,h,w]; timestep int64 [B]; has_text bool [B] -> the denoiser's output, [B,c or 2c,h,w]"""
        image_tokens = self.image_encoder.tokens(batch.vit, batch.ref_latents)
        states = self.text_encoder(batch.token_ids, image_tokens, batch.slot_index, batch.text_mask)
        cross_kv = self.conditioner(states, has_text)
        return self.denoiser.predict(noisy, source, timestep.float(), cross_kv, batch.text_mask)


def _loss(config: ModelConfig, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    number, device = len(batch.target), batch.target.device
    timestep, noise = torch.randint(TRAIN_STEPS, (number,), device=device), torch.randn_like(batch.target)
    draw = torch.rand(number, device=device)
    without_text, without_source = draw < 2 * DROP, (draw > DROP) & (draw < 3 * DROP)  # both between DROP and 2 * DROP
    source = batch.source * ~without_source[:, None, None, None]
    output = module(batch, add_noise(batch.target, noise, timestep), source, timestep, ~without_text)
    losses = objective(config, output, batch.target, noise, timestep)
    kept = (~without_text & ~without_source).cpu().numpy()
    each = losses.detach().cpu().numpy()
    figures = {}
    for index, kind in enumerate(KINDS):
        of_kind = each[(batch.kinds == index) & kept]
        if len(of_kind):
            figures[kind] = float(of_kind.mean())
    return losses.mean(), figures


def starting_model(config: ModelConfig, state: Path) -> Mige:
    """A model with the trained VAE and ViT of a state folder; the rest at its starting weights."""
    model = Mige(config)
    vae = AutoencoderKL.from_pretrained(state / "vae" / "trained")
    model.vae_encoder, model.vae_decoder = VAEEncoder(vae), VAEDecoder(vae)
    norm = {k: v.clone() for k, v in model.image_encoder.vision.post_layernorm.state_dict().items()}
    load_model(model.image_encoder.vision, state / "vit" / "trained.safetensors")
    model.image_encoder.vision.post_layernorm.load_state_dict(norm)
    initialise(model)
    return model


def assemble(config: ModelConfig, state: Path, start: Path | None = None) -> Mige:
    """The model that training starts from: that of the model folder or bundle `start`; without it the trained VAE and
    image encoder of a state folder, the rest at its starting weights.

    Raises InputError when `start` is no such folder or its sizes are not those of `config`, or the Q-Former of the
    state folder has not been trained yet.
    """
    if start is not None:
        model = load_model_folder(start)
        if replace(model.config, defaults=config.defaults) != config:
            raise InputError(f"{start} holds a model of other sizes than the config's ({config.name}): change either")
        return model.train()
    path = state / "qformer" / "trained.safetensors"
    if not path.exists():
        raise InputError(f"{path} is not there; run the stage qformer first")
    model = starting_model(config, state)
    load_model(model.image_encoder, path)
    return model


def train_mige(
    config: ModelConfig, settings: StageSettings, concepts: list[Concept], state: Path, start: Path | None = None
) -> None:
    """Train on the features of a state folder, from a model's weights if `start` gives one; the state, with the moving
    average of the weights, and previews are in state/mige. Raises InputError when the features are not there, and as
    `assemble` does."""
    torch.manual_seed(settings.seed)
    folder = state / "mige"
    store = FeatureStore(state / "features", config)
    model = assemble(config, state, start)
    samples = first_of_each_kind(concepts, config.size, PREVIEW_SEED, 4)
    tokenize = load_tokenizer(state / "features" / "tokenizer.json")

    def preview(average: nn.Module, step: int) -> None:
        assert isinstance(average, TrainedPart)
        pipe = MigePipeline(config, tokenize, PyTorchEngine(deepcopy(average).cpu().with_vae(model)))
        grid(samples, answer(pipe, samples, SamplingParams()), folder / f"preview-{step:06d}.png")

    module = TrainedPart(model)
    stream = partial(batches, store, settings)
    train("mige", module, partial(_loss, config), stream, settings, folder, preview, PREVIEW_EVERY)
