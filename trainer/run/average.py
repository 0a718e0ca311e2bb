"""The moving average of a run's weights; ours, since the authors keep none."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters have the averaged values in this block, and their own after it, to the last bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():  # one by one, so that no second copy of all is held
            before = weight.clone()
            weight.copy_(self._parameters[name])
            self._parameters[name].copy_(before)
