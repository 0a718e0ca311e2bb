"""The graphs `vae_encoder` and `vae_decoder`: diffusers' AutoencoderKL in two halves. Latents here are unscaled.

Shapes: M images to encode, B to decode, c latent channels, h x w latent size, f pixels along a side of a latent.
"""

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from mige_rt.config import VAEConfig


def make_vae(config: VAEConfig) -> AutoencoderKL:
    """An autoencoder of these sizes with random weights."""
    levels = len(config.widths)
    return AutoencoderKL(
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
