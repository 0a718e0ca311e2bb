"""Confidence intervals of metrics over samples, by scipy's bootstrap."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A metric over samples, and the ends of its confidence interval; None: there are too few samples for one."""

    value: float
    low: float | None
    high: float | None

    def text(self, form: str) -> str:
        """The value and, in brackets, its interval; form: of a number, for str.format."""
        value = form.format(self.value)
        if self.low is None or self.high is None:
            return value
        return f"{value} ({form.format(self.low)} to {form.format(self.high)})"


def estimate(numerators: Sequence[float], denominators: Sequence[float] | None = None) -> Estimate | None:
    """A ratio of sums over samples with its percentile bootstrap interval.

    The generator's seed is fixed: the same samples give the same interval.

    Args:
        numerators: One value for each sample.
        denominators: One value for each sample; without them, the estimate is the numerators' mean.

    Returns:
        None where the denominators' sum is not above zero; without an interval where fewer than two samples count.
    """
    top = np.asarray(numerators, np.float64)
    bottom = np.ones_like(top) if denominators is None else np.asarray(denominators, np.float64)
    if bottom.sum() <= 0:
        return None
    value = float(_ratio(top, bottom))
    if np.count_nonzero(bottom) < 2:  # all resamples are the same, which says nothing of other samples
        return Estimate(value, None, None)
    with warnings.catch_warnings():
        # A resample without a ratio makes scipy's own interval NaN, of which it warns; ours leaves that resample out.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        distribution = bootstrap(
            (top, bottom),
            _ratio,
            n_resamples=RESAMPLES,
            vectorized=True,
            paired=True,
            method="percentile",
            rng=np.random.default_rng(0),
        ).bootstrap_distribution
    low, high = np.nanquantile(distribution, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def _ratio(top: np.ndarray, bottom: np.ndarray, axis: int = -1) -> np.ndarray:
    """The ratio of sums along an axis; NaN where the lower sum is not above zero."""
    totals = bottom.sum(axis=axis)
    return np.divide(top.sum(axis=axis), totals, out=np.full_like(totals, np.nan), where=totals > 0)
