"""The moving average of a run's weights; ours, since the authors keep none."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The exponential moving average of parameters, of which each process may have a part.

    Attributes:
        weights: By the parameters' names, float32.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """Start at the parameters' values."""
        self._parameters = parameters
        self._update = get_ema_multi_avg_fn(decay)
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Count the parameters' present values in."""
        weights: list[Tensor] = [*self.weights.values()]
        self._update(weights, [*self._parameters.values()], 0)
