"""How much of a thing comes through from its image, before any sampling: the error of one prediction from noise.

At the noisiest timestep the latents hold nothing of the data, so whatever is right inside a thing's mask was read off
the image tokens; and attention can only have found them by the words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mige_rt.scheduler import TRAIN_STEPS
from trainer.objective import add_noise, data_prediction
from trainer.stages.features import Batch
from trainer.stages.looking import Watch, share_looked_right
from trainer.stages.trained_part import TrainedPart


@dataclass(frozen=True)
class OneShot:
    """Mean squared errors of latents, over the latent pixels of what the instruction asks for.

    Attributes:
        error: Of the prediction.
        mean_color: Of the true mean in each sample's mask.
        looked_right: The share of attention, of the heads that are taught where to look, that is at the right place.
    """

    error: float
    mean_color: float
    looked_right: float

    @property
    def share(self) -> float:
        """The error over that of the mean color: 1 where no more than a color is known."""
        return self.error / self.mean_color


@torch.no_grad()
def one_shot(module: TrainedPart, batch: Batch, seed: int) -> OneShot:
    """Measure a model on some samples.

    Args:
        module: The model.
        batch: The samples.
        seed: Of the noise.
    """
    noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(seed)).to(batch.target.device)
    timestep = torch.full((len(noise),), TRAIN_STEPS - 1, device=noise.device)
    noisy = add_noise(batch.target, noise, timestep)
    with_text = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
    with Watch().of(module.denoiser) as watch:
        output = module(batch, noisy, batch.source, timestep, with_text)
    data = data_prediction(module.config, output, noisy, timestep)
    weight = (batch.asked > 0.5).float()
    mean = (batch.target * weight).sum(dim=(2, 3), keepdim=True) / weight.sum(dim=(2, 3), keepdim=True).clamp(min=1)

    def within(latents: Tensor) -> float:
        error = (latents - batch.target).square().mean(dim=1, keepdim=True)
        return float((error * weight).sum() / weight.sum())

    looked_right = float(share_looked_right(watch.looks, batch, module.config))
    return OneShot(within(data), within(mean.expand_as(batch.target)), looked_right)
