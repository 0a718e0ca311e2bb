"""Stage 4: MIGE itself, all but the two image encoders, jointly (paper, section 4.1)."""

from collections.abc import Iterator
from copy import copy, deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_model
from torch import Tensor, nn

from engines.pytorch import PyTorchEngine
from mige_rt.config import ModelConfig
from mige_rt.instruction import load_tokenizer
from mige_rt.pipeline import MigePipeline, Settings
from mige_rt.sampler import TRAIN_STEPS
from trainer.checkpoint import COMPONENTS
from trainer.features import Batch, FeatureStore
from trainer.loop import train
from trainer.model.dit import CrossAttention
from trainer.model.mige import Mige
from trainer.model.vae import VAEDecoder, VAEEncoder
from trainer.objective import add_noise, objective
from trainer.preview import PREVIEW_SEED, answer, first_of_each_kind, grid
from trainer.settings import StageSettings
from trainer.world.concepts import Concept
from trainer.world.tasks import KINDS

PREVIEW_EVERY = 1000  # steps
DROP = 0.05  # chance to drop the text, the same to drop the source, the same to drop both


def initialise(model: Mige) -> None:
    """The DiT's starting weights (DiT, Peebles & Xie, 2023): gates, cross-attention and output start at zero, so each
    block starts as the identity; and the source channels start at zero (MIGE's paper, section 4.1)."""
    denoiser, conditioner = model.denoiser, model.conditioner
    for module in [*denoiser.modules(), *conditioner.modules()]:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    embedder = denoiser.x_embedder.proj
    nn.init.xavier_uniform_(embedder.weight.data.view(embedder.weight.shape[0], -1))
    embedder.weight.data[:, model.config.vae.channels :] = 0
    for part in (denoiser.t_embedder.mlp, denoiser.t_block):
        for layer in part:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
    for module in denoiser.modules():
        if isinstance(module, CrossAttention):
            nn.init.zeros_(module.proj.weight)
    nn.init.zeros_(denoiser.final_layer.linear.weight)


class TrainedPart(nn.Module):
    """What this stage trains, and the frozen ViT beside it: a prediction from a batch of features."""

    def __init__(self, model: Mige) -> None:
        super().__init__()
        self.config = model.config
        self.image_encoder, self.text_encoder = model.image_encoder, model.text_encoder
        self.conditioner, self.denoiser = model.conditioner, model.denoiser
        vision = self.image_encoder.vision
        for frozen in (vision.embeddings, vision.encoder):
            frozen.requires_grad_(False)

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


def _batches(store: FeatureStore, settings: StageSettings, step: int, rank: int, ranks: int) -> Iterator[Batch]:
    while True:
        rng = np.random.default_rng([settings.seed, step, rank])
        yield store.batch(rng.integers(len(store), size=settings.batch))
        step += 1


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


def assemble(config: ModelConfig, state: Path) -> Mige:
    """A model with the trained VAE and ViT of a state folder; the rest at its starting weights."""
    model = Mige(config)
    vae = AutoencoderKL.from_pretrained(state / "vae" / "trained")
    model.vae_encoder, model.vae_decoder = VAEEncoder(vae), VAEDecoder(vae)
    norm = {k: v.clone() for k, v in model.image_encoder.vision.post_layernorm.state_dict().items()}
    load_model(model.image_encoder.vision, state / "vit" / "trained.safetensors")
    model.image_encoder.vision.post_layernorm.load_state_dict(norm)
    initialise(model)
    return model


def train_mige(config: ModelConfig, settings: StageSettings, concepts: list[Concept], state: Path) -> None:
    """Train on the features of a state folder; the state, with the moving average of the weights, and previews are in
    state/mige. Raises InputError when the features are not there."""
    torch.manual_seed(settings.seed)
    folder = state / "mige"
    store = FeatureStore(state / "features", config)
    model = assemble(config, state)
    samples = first_of_each_kind(concepts, config.size, PREVIEW_SEED, 4)
    tokenize = load_tokenizer(state / "features" / "tokenizer.json")

    def preview(average: nn.Module, step: int) -> None:
        assert isinstance(average, TrainedPart)
        pipe = MigePipeline(config, tokenize, PyTorchEngine(deepcopy(average).cpu().with_vae(model)))
        grid(samples, answer(pipe, samples, Settings()), folder / f"preview-{step:06d}.png")

    module = TrainedPart(model)
    batches = partial(_batches, store, settings)
    train("mige", module, partial(_loss, config), batches, settings, folder, preview, PREVIEW_EVERY)
