"""The diffusion transformer of PixArt-alpha (Chen et al., 2023), split into what runs once and what runs every step.

Shapes: R batch (guidance branches x images), c latent channels, h x w latent size, T = gh x gw patches, L text tokens,
D text width.
"""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mige_rt.config import ModelConfig

KEPT_POSITIONS = 32  # grids whose embeddings are kept: 2.4 MB each in float16 at the published sizes and 512 pixels


def sincos_positions(gh: int, gw: int, width: int, trained_grid: int, device: torch.device | None = None) -> Tensor:
    """Fixed 2D sine-cosine positional embeddings.

    At other sizes than the trained one, indices are stretched by trained_grid / max(gh, gw) along both axes, so that
    the longer side spans what it spanned in training.

    Args:
        gh: Patches along the height.
        gw: Patches along the width.
        width: Of an embedding, a multiple of 4: the first half for x, the second for y, each sin | cos.
        trained_grid: Patches along a side of the trained size.
        device: Of the result.

    Returns:
        float32 [gh*gw,width].
    """
    stretch = trained_grid / max(gh, gw)
    quarter = width // 4
    omega = torch.exp(torch.arange(quarter, dtype=torch.float32, device=device) * (-math.log(10000.0) / quarter))
    x = torch.arange(gw, dtype=torch.float32, device=device)[:, None] * stretch * omega  # [gw, width/4]
    y = torch.arange(gh, dtype=torch.float32, device=device)[:, None] * stretch * omega  # [gh, width/4]
    x = torch.cat([x.sin(), x.cos()], dim=-1)[None, :, :].expand(gh, -1, -1)
    y = torch.cat([y.sin(), y.cos()], dim=-1)[:, None, :].expand(-1, gw, -1)
    return torch.cat([x, y], dim=-1).reshape(gh * gw, width)


def attention_bias(text_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores of attention, of its shape: 0 where it is true, minus infinity where it is not."""
    return torch.zeros_like(text_mask, dtype=dtype).masked_fill_(~text_mask, -math.inf)


class PatchEmbedder(nn.Module):
    """Latents and source latents to patch tokens; shared by denoiser and feature fusion (MIGE, section 3.2)."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        """Embed latents, concatenated with the source's, [R,2c,h,w] as [R,T,width]."""
        # Contiguous, or each norm and each linear layer that reads the sum of it and the blocks' outputs copies it.
        return self.proj(latents).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """Sinusoids of a timestep through a small MLP (DiT, Peebles and Xie, 2023)."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed timesteps [R], which may be fractions, as [R,width]."""
        half = self.frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timestep.device)
        omega = torch.exp(exponents * (-math.log(10000.0) / half))
        angle = timestep.float()[:, None] * omega
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class MLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, width_in: int, hidden: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, hidden)
        self.fc2 = nn.Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [...,width_in] to [...,width_out]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SelfAttention(nn.Module):
    """Multi-head attention among patch tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [R,T,width] to [R,T,width]."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # [R,heads,T,head_dim]
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class CrossAttention(nn.Module):
    """Attention to the text, whose keys and values the conditioner has computed before the denoising loop."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from patches to text tokens.

        Args:
            x: [R,T,width].
            k: Keys, [R,heads,L,head_dim].
            v: Values, [R,heads,L,head_dim].
            mask: bool [R,1,1,L], true where there is a token; or what is added to the scores, of the type of x; None:
                all are tokens.

        Returns:
            [R,T,width].
        """
        batch, tokens, width = x.shape
        q = self.q_linear(x).reshape(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Modulation(NamedTuple):
    """What a block is modulated by, each [R,1,width], or [width] where it is the same for the whole batch."""

    shift_attn: Tensor
    scale_attn: Tensor  # 1 and what the model adds to it
    gate_attn: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


def modulated_norm(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The norm of x [R,T,width], which has no weights of its own, scaled and shifted, both [R,1,width] or [width]."""
    if scale.ndim == 1:
        return F.layer_norm(x, norm.normalized_shape, scale, shift, norm.eps)  # in one kernel
    return torch.addcmul(shift, norm(x), scale)


class Block(nn.Module):
    """Self-attention, cross-attention, MLP, modulated by adaLN-single (PixArt-alpha, section 2.3).

    adaLN-single: each block has a table of its own, on top of a modulation by the timestep that all blocks share.
    """

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width, mlp, width)

    def forward(self, x: Tensor, modulation: Tensor | Modulation, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Map [R,T,width] to [R,T,width].

        Args:
            x: [R,T,width].
            modulation: Shift, scale and gate of attention and MLP by the timestep, [R,6,width], to which the block adds
                its table; or the sums.
            k: As in CrossAttention.
            v: As in CrossAttention.
            mask: As in CrossAttention.
        """
        m = modulation if isinstance(modulation, Modulation) else self._with_table(modulation)
        x = torch.addcmul(x, m.gate_attn, self.attn(modulated_norm(self.norm1, x, m.shift_attn, m.scale_attn)))
        x = x + self.cross_attn(x, k, v, mask)
        return torch.addcmul(x, m.gate_mlp, self.mlp(modulated_norm(self.norm2, x, m.shift_mlp, m.scale_mlp)))

    def _with_table(self, modulation: Tensor) -> Modulation:
        m = Modulation(*(self.scale_shift_table[None] + modulation).chunk(6, dim=1))
        return m._replace(scale_attn=1 + m.scale_attn, scale_mlp=1 + m.scale_mlp)


class FinalLayer(nn.Module):
    """Modulated normalization and a linear layer to the values of a patch."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map x [R,T,width] to [R,T,out], with the timestep's embedding t [R,width], or [width] for the whole batch."""
        table = self.scale_shift_table + t if t.ndim == 1 else self.scale_shift_table[None] + t[:, None]
        shift, scale = table.unbind() if t.ndim == 1 else table.chunk(2, dim=1)
        return self.linear(modulated_norm(self.norm_final, x, shift, 1 + scale))


class Conditioner(nn.Module):
    """The graph `conditioner`: caption projection and the keys and values of all cross-attentions, once a prompt."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dit = config.dit
        self.heads = dit.heads
        # The null text: drawn once and never trained.
        self.register_buffer("y_embedding", torch.randn(config.max_tokens, config.text.width) / config.text.width**0.5)
        self.y_proj = MLP(config.text.width, dit.width, dit.width)
        self.kv_linears = nn.ModuleList(nn.Linear(dit.width, 2 * dit.width) for _ in range(dit.depth))

    y_embedding: Tensor

    def forward(self, text_states: Tensor, has_text: Tensor) -> Tensor:
        """Compute keys and values.

        Args:
            text_states: The text encoder's, [R,L,D]; L is at most the model's max_tokens.
            has_text: bool [R]; false takes the null text's first L embeddings instead.

        Returns:
            cross_kv [2,depth,R,heads,L,head_dim]: keys, then values.
        """
        batch, length, _ = text_states.shape
        null = self.y_embedding[None, :length].to(text_states.dtype)
        y = self.y_proj(torch.where(has_text[:, None, None], text_states, null))  # [R,L,width]
        layers = [
            linear(y).reshape(batch, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4) for linear in self.kv_linears
        ]
        return torch.stack(layers, dim=1)


class Denoiser(nn.Module):
    """The graph `denoiser`: one prediction of the diffusion transformer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dit = config.dit
        channels = config.vae.channels
        self.config = config
        self.x_embedder = PatchEmbedder(2 * channels, dit.width, dit.patch)
        self.t_embedder = TimestepEmbedder(dit.width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dit.width, 6 * dit.width))
        self.blocks = nn.ModuleList(Block(dit.width, dit.heads, dit.mlp) for _ in range(dit.depth))
        out = channels * (2 if config.learned_variance else 1)
        self.final_layer = FinalLayer(dit.width, dit.patch**2 * out)
        self._tables: Tensor | None = None  # see `prepare`
        self._positions: dict[tuple[int, int], Tensor] = {}  # by grid

    def prepare(self) -> None:
        """Compute now what does not change between calls, for inference; to be called again when weights change.

        From then on one timestep is enough for the whole batch, and takes fewer kernels.
        """
        with torch.inference_mode(False), torch.no_grad():
            tables = torch.stack([cast("Block", block).scale_shift_table for block in self.blocks])  # [depth,6,width]
            tables[:, [Modulation._fields.index("scale_attn"), Modulation._fields.index("scale_mlp")]] += 1
        self._tables = tables
        self._positions.clear()

    def embed_timesteps(self, timestep: Tensor) -> Tensor:
        """What timesteps [R] become before they meet the image: the embedding, then the modulation, [R,7*width]."""
        return torch.cat(self._time(timestep), dim=-1)

    def _time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[R,width] and [R,6*width]."""
        t = self.t_embedder(timestep)
        return t, self.t_block(t)

    def predict(
        self, latents: Tensor, source: Tensor, timestep: Tensor, cross_kv: Tensor, text_mask: Tensor | None
    ) -> Tensor:
        """Like `forward`, but keep the variance channels at the end where the model learns them: [R,c or 2c,h,w]."""
        dit = self.config.dit
        batch, _, h, w = latents.shape
        gh, gw = h // dit.patch, w // dit.patch
        dtype = self.x_embedder.proj.weight.dtype
        x = self.x_embedder(torch.cat([latents, source], dim=1).to(dtype))  # [R,T,width]
        x = x + self._position_embeddings(gh, gw, x)
        t, modulation = self._time(timestep) if timestep.ndim == 1 else timestep.to(dtype).tensor_split([dit.width], -1)
        modulation = modulation.reshape(-1, 6, dit.width)
        of_blocks: list[Tensor] | list[Modulation] = [modulation] * len(self.blocks)
        if self._tables is not None and timestep.shape[0] == 1:
            t = t[0]
            of_blocks = [Modulation(*table.unbind()) for table in self._tables + modulation]
        mask = None if text_mask is None else text_mask[:, None, None, :]
        for i, block in enumerate(self.blocks):
            x = block(x, of_blocks[i], cross_kv[0, i], cross_kv[1, i], mask)
        x = self.final_layer(x, t)  # [R,T,patch*patch*out]
        x = x.reshape(batch, gh, gw, dit.patch, dit.patch, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, h, w).float()

    def _position_embeddings(self, gh: int, gw: int, like: Tensor) -> Tensor:
        """[gh*gw,width], of the type and on the device of `like`; kept once `prepare` was called."""
        dit = self.config.dit
        if (gh, gw) in self._positions:
            return self._positions[gh, gw]
        with torch.inference_mode(False):
            positions = sincos_positions(gh, gw, dit.width, dit.trained_grid, like.device).to(like.dtype)
        if self._tables is not None and len(self._positions) < KEPT_POSITIONS:
            self._positions[gh, gw] = positions  # and never dropped, since captured CUDA graphs read it
        return positions

    def forward(
        self, latents: Tensor, source: Tensor, timestep: Tensor, cross_kv: Tensor, text_mask: Tensor | None
    ) -> Tensor:
        """Predict the noise, or v.

        Args:
            latents: Noisy latents, scaled, float32 [R,c,h,w]; h and w are multiples of the patch size.
            source: Latents of the image to edit, scaled, float32 [R,c,h,w]; zeros without one.
            timestep: float32 [R], 0 to 1000, or [R,7*width], what `embed_timesteps` gives for them; after `prepare`,
                also one for the whole batch.
            cross_kv: The conditioner's, [2,depth,R,heads,L,head_dim].
            text_mask: bool [R,L], true where there is a token; or what is added to the scores of cross-attention, of
                the weights' type; None: all are tokens.

        Returns:
            float32 [R,c,h,w].
        """
        return self.predict(latents, source, timestep, cross_kv, text_mask)[:, : self.config.vae.channels]


def block_layers(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks, by name: those that fp8 and int8-sq quantise, which neither begin nor end it."""
    names = (name for name, _ in denoiser.named_parameters() if name.startswith("blocks.") and name.endswith(".weight"))
    parts = {name.removesuffix(".weight"): denoiser.get_submodule(name.removesuffix(".weight")) for name in names}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Linear)}
