"""What the last stage trains, as one module."""

from copy import copy

import torch
from torch import Tensor, nn

from trainer.checkpoints.model_folder import COMPONENTS
from trainer.model.dit import Block, CrossAttention
from trainer.model.mige import Mige
from trainer.stages.features import Batch


class TrainedPart(nn.Module):
    """All but the VAE, with the frozen ViT beside the rest: a prediction from a batch of features."""

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

    def text_states(self, batch: Batch) -> Tensor:
        """[B,L,D]"""
        image_tokens = self.image_encoder.tokens(batch.vit, batch.ref_latents)
        return self.text_encoder(batch.token_ids, image_tokens, batch.slot_index, batch.text_mask)

    def forward(self, batch: Batch, noisy: Tensor, source: Tensor, timestep: Tensor, has_text: Tensor) -> Tensor:
        """noisy, source [K*B,c,h,w]; timestep int64 [K*B]; has_text bool [K*B] -> the denoiser's output,
        [K*B,c or 2c,h,w]: for K draws of each sample, draw by draw, which share one encoding."""
        draws = len(noisy) // len(batch.target)
        states, mask = self.text_states(batch).repeat(draws, 1, 1), batch.text_mask.repeat(draws, 1)
        cross_kv = self.conditioner(states, has_text)
        return self.denoiser.predict(noisy, source, timestep.float(), cross_kv, mask)


def attention_layers(module: TrainedPart) -> list[tuple[CrossAttention, nn.Linear]]:
    """Each block's cross-attention, and the layer that makes its keys and values."""
    pairs: list[tuple[CrossAttention, nn.Linear]] = []
    for block, kv_linear in zip(module.denoiser.blocks, module.conditioner.kv_linears, strict=True):
        assert isinstance(block, Block) and isinstance(kv_linear, nn.Linear)
        pairs.append((block.cross_attn, kv_linear))
    return pairs


@torch.no_grad()
def attention_inputs(module: TrainedPart, batch: Batch, noisy: Tensor, timestep: Tensor) -> tuple[list[Tensor], Tensor]:
    """What each block's cross-attention is asked with, [B,T,width] a block, and what its keys are made of,
    [B,L,width]."""
    asked: list[Tensor] = []
    hooks = [
        attention.register_forward_pre_hook(lambda _, arguments: asked.append(arguments[0]))
        for attention, _ in attention_layers(module)
    ]
    try:
        with_text = torch.ones(len(noisy), dtype=torch.bool, device=noisy.device)
        module(batch, noisy, batch.source, timestep, with_text)
    finally:
        for hook in hooks:
            hook.remove()
    return asked, module.conditioner.y_proj(module.text_states(batch))
