"""The start of the diffusion transformer's cross-attention: half of its heads look at the place that they stand at."""

import torch
from torch import Tensor, nn

from mige_rt.scheduler import TRAIN_STEPS
from trainer.model.dit import Block, CrossAttention
from trainer.objective import NOISY_FROM, add_noise
from trainer.stages.features import Batch
from trainer.stages.reading import start_to_look
from trainer.stages.starting_model import pass_on
from trainer.stages.trained_part import TrainedPart


def attention_layers(module: TrainedPart) -> list[tuple[CrossAttention, nn.Linear]]:
    """Each block's cross-attention, and the layer that makes its keys and values."""
    pairs: list[tuple[CrossAttention, nn.Linear]] = []
    for block, kv_linear in zip(module.denoiser.blocks, module.conditioner.kv_linears, strict=True):
        assert isinstance(block, Block) and isinstance(kv_linear, nn.Linear)
        pairs.append((block.cross_attn, kv_linear))
    return pairs


@torch.no_grad()
def attention_inputs(module: TrainedPart, batch: Batch, noisy: Tensor, timestep: Tensor) -> tuple[list[Tensor], Tensor]:
    """What the cross-attentions of a model make their queries and their keys from.

    Args:
        module: The model.
        batch: B samples.
        noisy: Their latents with noise, [B,c,h,w].
        timestep: int64 [B].

    Returns:
        For each block, the image's patches [B,T,width]; and the projected text states [B,L,width].
    """
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


def start_reading(module: TrainedPart, batch: Batch) -> list[dict[str, float]]:
    """Start half of the heads of each block's cross-attention so that they look at the image tokens of their place.

    What they read counts for nothing yet. T5 starts by passing tokens on, since what it makes of them does not tell
    their places.

    Args:
        module: The model, changed in place.
        batch: Samples of one image each, which the start is found from.

    Returns:
        For each block, the shares of the codes' variance that `queries` and `keys` explain.
    """
    config = module.config
    pass_on(module.text_encoder)
    width = config.dit.width
    rows = width // config.dit.heads * (config.dit.heads // 2)
    pairs = attention_layers(module)
    with torch.no_grad():
        for attention, kv_linear in pairs:
            attention.proj.weight[:, :rows] = 0
            nn.init.xavier_uniform_(kv_linear.weight[width : width + rows])
            kv_linear.bias[width : width + rows] = 0
    noise = torch.randn_like(batch.target)
    timestep = torch.randint(NOISY_FROM, TRAIN_STEPS, (len(noise),))
    asked, keys_from = attention_inputs(module, batch, add_noise(batch.target, noise, timestep), timestep)
    image_tokens = keys_from[batch.slot_index >= 0].reshape(len(noise), config.qformer.queries, -1)
    return [
        start_to_look(attention, kv_linear, x, image_tokens, config.dit.trained_grid)
        for (attention, kv_linear), x in zip(pairs, asked, strict=True)
    ]
