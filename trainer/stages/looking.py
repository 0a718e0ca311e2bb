"""Where the diffusion transformer's attention should look, taught directly: the world tells where a thing is shown.

What is put in is smaller than its image, and elsewhere. By the prediction's error alone, attention hardly ever learns
such a map: it only helps once it is nearly right.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mige_rt.config import ModelConfig
from trainer.model.dit import Block, CrossAttention, Denoiser
from trainer.stages.features import Batch
from trainer.stages.reading import query_places


@dataclass(frozen=True)
class Look:
    """What one cross-attention was called with.

    Attributes:
        attention: The layer.
        x: What positions ask with, [R,T,width].
        k: Keys, [R,heads,L,head_dim].
        mask: bool [R,1,1,L], true where there is a token.
    """

    attention: CrossAttention
    x: Tensor
    k: Tensor
    mask: Tensor


@dataclass
class Watch:
    """The calls of the cross-attentions in the second half of a denoiser; the first half finds the places."""

    looks: list[Look] = field(default_factory=list)

    @contextmanager
    def of(self, denoiser: Denoiser) -> Iterator["Watch"]:
        """Keep what is called while this is open."""
        blocks = [block for block in denoiser.blocks if isinstance(block, Block)]
        hooks = [block.cross_attn.register_forward_pre_hook(self._keep) for block in blocks[len(blocks) // 2 :]]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, attention: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(attention, CrossAttention)
        x, k, _, mask = arguments
        self.looks.append(Look(attention, x, k, mask))


def places_to_look(batch: Batch, config: ModelConfig, heads: int, column: float) -> tuple[Tensor, Tensor]:
    """Where each head should look from each position: at its point of what the position shows.

    A point between the places of tokens is looked at by bilinear interpolation.

    Args:
        batch: B samples.
        config: The model's sizes.
        heads: Number of heads; their points are one below another.
        column: Where these points are across a position, -0.5 (left) to 0.5 (right).

    Returns:
        The shares of attention, [B,heads,T,L], and which positions have an image to look at, bool [B,T].
    """
    number, device, queries = len(batch.target), batch.target.device, config.qformer.queries
    patches = config.vision.side // config.vision.patch
    image, where = batch.origin_image.reshape(number, -1), batch.origin.reshape(number, -1, 3)
    places = query_places(queries, patches).mean(dim=1).to(device)  # [queries,2]
    wide = patches**2 // queries  # patches of a token, one beside another
    rows = (torch.arange(heads, device=device) + 0.5) / heads - 0.5
    x = (where[:, None, :, 0] + column * where[:, None, :, 2]).clamp(wide / 2, patches - wide / 2)
    y = (where[:, None, :, 1] + rows[None, :, None] * where[:, None, :, 2]).clamp(0.5, patches - 0.5)
    near = (1 - (x[..., None] - places[:, 0]).abs() / wide).clamp(min=0)
    near = near * (1 - (y[..., None] - places[:, 1]).abs()).clamp(min=0)  # [B,heads,T,queries]
    slots = batch.slot_index  # [B,L]
    of_token = torch.where(slots >= 0, slots % queries, 0)
    same = (torch.where(slots >= 0, slots // queries, -2)[:, None, :] == image[:, :, None]).float()  # [B,T,L]
    shares = near.gather(3, of_token[:, None, None, :].expand(-1, heads, near.shape[2], -1)) * same[:, None]
    seen = shares.sum(dim=3, keepdim=True)
    return shares / seen.clamp(min=1e-6), (seen[..., 0] > 0.5).all(dim=1)


def looking_loss(looks: Sequence[Look], batch: Batch, config: ModelConfig, counted: Tensor) -> Tensor:
    """The mean divergence of half of the heads from where they should look; the other half looks at its own place.

    Together, the layers' heads look at the points of a grid in what a position shows: a layer at a column, a head at a
    row.

    Args:
        looks: What was called, of K*B rows.
        batch: B samples.
        config: The model's sizes.
        counted: Which rows count, bool [K*B].
    """
    draws = len(counted) // len(batch.target)
    divergences = []
    for look, wanted, positions in _taught(looks, batch, config):
        entropy = torch.special.entr(wanted).sum(dim=3).repeat(draws, 1, 1)
        divergence = -(wanted.repeat(draws, 1, 1, 1) * _log_attention(look)).sum(dim=3) - entropy
        divergences.append(_mean(divergence, positions.repeat(draws, 1) & counted[:, None]))
    return torch.stack(divergences).mean()


def share_looked_right(looks: Sequence[Look], batch: Batch, config: ModelConfig) -> Tensor:
    """The mean share of these heads' attention that is on a token that they should look at.

    Args:
        looks: What was called, of B rows.
        batch: B samples.
        config: The model's sizes.
    """
    shares = [
        _mean((_log_attention(look).exp() * (wanted > 0)).sum(dim=3), positions)
        for look, wanted, positions in _taught(looks, batch, config)
    ]
    return torch.stack(shares).mean()


def _taught(looks: Sequence[Look], batch: Batch, config: ModelConfig) -> Iterator[tuple[Look, Tensor, Tensor]]:
    """Each call, where its taught heads should look [B,heads,T,L], and at which positions, bool [B,T]."""
    for number, look in enumerate(looks):
        column = (number + 0.5) / len(looks) - 0.5
        yield look, *places_to_look(batch, config, look.attention.heads // 2, column)


def _log_attention(look: Look) -> Tensor:
    """The logarithms of the second half of the heads' attention, [R,heads/2,T,L]."""
    q_linear, heads = look.attention.q_linear, look.attention.heads // 2
    rows = q_linear.out_features // 2
    q = F.linear(look.x.float(), q_linear.weight[rows:], q_linear.bias[rows:])
    q = q.unflatten(2, (heads, -1)).transpose(1, 2)
    scores = q @ look.k[:, heads:].float().transpose(2, 3) / q.shape[-1] ** 0.5
    return scores.masked_fill(~look.mask, -1e4).log_softmax(dim=3)


def _mean(values: Tensor, positions: Tensor) -> Tensor:
    """The mean of values [R,heads,T] at some positions, bool [R,T]; 0 where there is none."""
    weight = positions.float()[:, None]
    return (values * weight).sum() / (values.shape[1] * weight.sum().clamp(min=1))
