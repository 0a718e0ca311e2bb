"""What training minimises: the error of the prediction and, where it is learned, the variational bound of the variance.

Improved DDPM (Nichol & Dhariwal, 2021). B samples, c latent channels; timesteps 0 to 999 of the sampler's schedule.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mige_rt.config import ModelConfig
from mige_rt.scheduler import ALPHAS, BETAS, SIGMAS

# q(x_{t-1} | x_t, data), Ho et al., 2020, equations 6 and 7; before the first timestep there is data and no noise.
_ALPHAS_BEFORE = np.append(1.0, ALPHAS[:-1])
_SIGMAS_BEFORE = np.append(0.0, SIGMAS[:-1])
_MEAN_FROM_DATA = BETAS * _ALPHAS_BEFORE / SIGMAS**2
_MEAN_FROM_NOISY = np.sqrt(1 - BETAS) * (_SIGMAS_BEFORE / SIGMAS) ** 2
_VARIANCE = BETAS * (_SIGMAS_BEFORE / SIGMAS) ** 2
_VARIANCE[0] = _VARIANCE[1]  # there it is 0, whose logarithm does not exist
_LOG_VARIANCE = np.log(_VARIANCE)
_LOG_BETAS = np.log(BETAS)

DROP = 0.05  # chance to drop the text, the same to drop the source, the same to drop both (paper, section 4.1)
NOISY_FROM = 700  # timesteps from which on next to nothing of the data is left

_HALF_BIN = 1 / 255  # half the distance of two of the 256 values that a datum in [-1, 1] is taken to have
_LAST_BIN = 0.999  # data beyond it count as the first or the last value, whose bin is open


def add_noise(latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """The latents at int64 timestep [B], from scaled latents and standard normal noise, all [B,c,h,w]."""
    return _at(ALPHAS, timestep) * latents + _at(SIGMAS, timestep) * noise


@dataclass(frozen=True, eq=False)
class SampleLosses:
    """The losses of a batch of K*B draws of noise.

    Attributes:
        losses: float32 [K*B].
        timestep: int64 [K*B].
        whole: bool [K*B], whether neither text nor source was dropped.
    """

    losses: Tensor
    timestep: Tensor
    whole: Tensor


def sample_losses(
    config: ModelConfig, module: Callable[..., Tensor], batch: Any, timestep: Tensor, weight: Tensor | None = None
) -> SampleLosses:
    """Draw noise and which conditions are dropped, and compute the losses.

    Args:
        config: The model's sizes.
        module: A `TrainedPart`, as the processes share it.
        batch: B samples, with `target` and `source` [B,c,h,w].
        timestep: int64 [K*B], K draws of each sample, draw by draw.
        weight: [B,1,h,w]: how much the prediction's error counts where.
    """
    number, device = len(timestep), timestep.device
    draws = number // len(batch.target)
    target, source = batch.target.repeat(draws, 1, 1, 1), batch.source.repeat(draws, 1, 1, 1)
    noise, draw = torch.randn_like(target), torch.rand(number, device=device)
    # both between DROP and 2 * DROP
    without_text, without_source = draw < 2 * DROP, (draw > DROP) & (draw < 3 * DROP)
    source = source * ~without_source[:, None, None, None]
    output = module(batch, add_noise(target, noise, timestep), source, timestep, ~without_text)
    weight = None if weight is None else weight.repeat(draws, 1, 1, 1)
    losses = objective(config, output, target, noise, timestep, weight)
    return SampleLosses(losses, timestep, ~without_text & ~without_source)


def objective(
    config: ModelConfig,
    output: Tensor,
    latents: Tensor,
    noise: Tensor,
    timestep: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Each sample's loss, float32 [B]: `prediction_error`, plus `variance_bound` where the model learns its variance.

    output [B,c,h,w], or [B,2c,h,w] with the variance channels, is the denoiser's at `add_noise(latents, noise,
    timestep)`; latents (scaled) and noise [B,c,h,w]; timestep int64 [B]; weight [B,1,h,w]: how much the prediction's
    error counts where.
    """
    error = prediction_error(config, output, latents, noise, timestep, weight)
    if not config.learned_variance:
        return error
    return error + variance_bound(config, output, latents, noise, timestep)


def prediction_error(
    config: ModelConfig,
    output: Tensor,
    latents: Tensor,
    noise: Tensor,
    timestep: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """The mean squared error of the noise, or of v = alpha * noise - sigma * latents (Salimans & Ho, 2022), [B]."""
    if config.prediction == "epsilon":
        target = noise
    else:
        target = _at(ALPHAS, timestep) * noise - _at(SIGMAS, timestep) * latents
    error = (output[:, : config.vae.channels].float() - target) ** 2
    return _per_sample(error if weight is None else error * weight)


def data_prediction(config: ModelConfig, output: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
    """The latents that an output [B,c or 2c,h,w] of the denoiser at `noisy` speaks of, [B,c,h,w]."""
    return _data(config, output[:, : config.vae.channels].float(), noisy, timestep)


def _data(config: ModelConfig, prediction: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
    alpha, sigma = _at(ALPHAS, timestep), _at(SIGMAS, timestep)
    return (
        (noisy - sigma * prediction) / alpha if config.prediction == "epsilon" else alpha * noisy - sigma * prediction
    )


def variance_bound(config: ModelConfig, output: Tensor, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """One timestep's term of the variational bound, in bits per dimension, [B] (Nichol & Dhariwal, section 3.1).

    The KL divergence of the model's step from the true one; at timestep 0 the likelihood of the latents, as if they
    were 8-bit values in [-1, 1], as published. Its gradient reaches the variance channels alone.
    """
    channels = config.vae.channels
    prediction, between = output[:, :channels].detach().float(), (output[:, channels:].float() + 1) / 2
    noisy = add_noise(latents, noise, timestep)
    data = _data(config, prediction, noisy, timestep)
    true_log_variance = _at(_LOG_VARIANCE, timestep)
    log_variance = true_log_variance + between * (_at(_LOG_BETAS, timestep) - true_log_variance)

    true_mean = _at(_MEAN_FROM_DATA, timestep) * latents + _at(_MEAN_FROM_NOISY, timestep) * noisy
    mean = _at(_MEAN_FROM_DATA, timestep) * data + _at(_MEAN_FROM_NOISY, timestep) * noisy
    ratio = true_log_variance - log_variance
    divergence = 0.5 * (torch.expm1(ratio) - ratio + (true_mean - mean) ** 2 * torch.exp(-log_variance))
    surprise = -_log_likelihood(latents, mean, torch.exp(-0.5 * log_variance))
    nats = torch.where(timestep == 0, _per_sample(surprise), _per_sample(divergence))
    return nats / math.log(2)


def _log_likelihood(values: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """Of 8-bit values in [-1, 1] under a normal distribution of that mean and of standard deviation 1 / precision."""
    below_top = _normal_cdf((values - mean + _HALF_BIN) * precision)
    below_bottom = _normal_cdf((values - mean - _HALF_BIN) * precision)
    top = torch.where(values > _LAST_BIN, 1.0, below_top)
    bottom = torch.where(values < -_LAST_BIN, 0.0, below_bottom)
    return torch.log((top - bottom).clamp(min=1e-12))


def _normal_cdf(x: Tensor) -> Tensor:
    """The approximation that the published objective uses (Page, 1977), off by up to 2e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _at(values: NDArray[np.float64], timestep: Tensor) -> Tensor:
    """The values of B timesteps, float32 [B,1,1,1]."""
    return torch.from_numpy(values.astype(np.float32)).to(timestep.device)[timestep][:, None, None, None]


def _per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)
