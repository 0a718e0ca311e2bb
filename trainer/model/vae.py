"""The graphs `vae_encoder` and `vae_decoder`: diffusers' AutoencoderKL in two halves. Latents here are unscaled.

Shapes: M images to encode, B to decode, c latent channels, h x w latent size, f pixels along a side of a latent.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from mige_rt.config import VAEConfig
from mige_rt.graphs import VAE_QUERY_SLICES

SCORES_BYTES = 256 << 20  # of attention's scores that are held at once


class QuerySlicedAttention:
    """A processor of diffusers' attention: slices of the queries one after the other, where the scores are large.

    The VAE's one head is as wide as its channels, 512 in the published sizes, for which no fused kernel is. Its scores
    grow with the fourth power of an image's side: 8.6 GB in float16 at 2,048 pixels. Each query's result is its own, so
    slices change nothing but rounding. Graphs have a fixed number of slices, here they are of at most SCORES_BYTES.
    """

    def __call__(self, attn: Attention, hidden_states: Tensor, *, temb: None = None, **_: Any) -> Tensor:
        """Self-attention of hidden_states [B,c,h,w]; see `diffusers.models.attention_processor.AttnProcessor2_0`."""
        batch, channels, height, width = hidden_states.shape
        assert attn.group_norm is not None and attn.to_q is not None
        assert attn.to_k is not None and attn.to_v is not None and attn.to_out is not None
        x = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)  # [B,T,c]
        q, k, v = (
            linear(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )  # each [B,heads,T,head_dim]
        if torch.compiler.is_exporting():  # T has no value there
            slices = q.unflatten(2, (VAE_QUERY_SLICES, -1)).unbind(2)
        else:
            row_bytes = q.shape[0] * q.shape[1] * q.shape[2] * q.element_size()  # of one query's scores
            slices = q.split(max(1, SCORES_BYTES // row_bytes), dim=2)
        attended = torch.cat([F.scaled_dot_product_attention(part, k, v) for part in slices], dim=2)
        x = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        x = x.transpose(1, 2).reshape(batch, channels, height, width)
        return (x + hidden_states) / attn.rescale_output_factor


def make_vae(config: VAEConfig) -> AutoencoderKL:
    """An autoencoder of these sizes with random weights."""
    levels = len(config.widths)
    vae = AutoencoderKL(
        # diffusers annotates these as tuples of one; they have one entry for each level.
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        block_out_channels=config.widths,  # pyright: ignore[reportArgumentType]
        layers_per_block=config.layers,
        latent_channels=config.channels,
        norm_num_groups=config.groups,
        mid_block_add_attention=config.attention,
        scaling_factor=config.scale,
    )
    vae.set_attn_processor(QuerySlicedAttention())  # pyright: ignore[reportArgumentType]: typed as their own classes
    return vae


class VAEEncoder(nn.Module):
    """Images to the mean and log-variance of their latents."""

    def __init__(self, vae: AutoencoderKL) -> None:
        """Share the weights of `vae`."""
        super().__init__()
        assert isinstance(vae.quant_conv, nn.Conv2d)
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, pixels_vae: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            pixels_vae: float32 [M,3,f*h,f*w] in [-1,1].

        Returns:
            latent_mean and latent_logvar, float32 [M,c,h,w].
        """
        moments = self.quant_conv(self.encoder(pixels_vae.to(self.quant_conv.weight.dtype))).float()
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)


class VAEDecoder(nn.Module):
    """Latents to images."""

    def __init__(self, vae: AutoencoderKL) -> None:
        """Share the weights of `vae`."""
        super().__init__()
        assert isinstance(vae.post_quant_conv, nn.Conv2d)
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents.

        Args:
            latents: Unscaled, float32 [B,c,h,w].

        Returns:
            pixels, float32 [B,3,f*h,f*w], about [-1,1].
        """
        return self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype))).float()
