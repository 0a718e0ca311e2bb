"""Figures about pictures, and the intervals that they are sure to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure over samples and its confidence interval."""

    value: float
    low: float
    high: float


def estimate(numerators: Sequence[float], denominators: Sequence[float] | None = None) -> Estimate | None:
    """The sum of one figure over the sum of another, one of each a sample; the mean, if there are no denominators.

    The interval is the percentile bootstrap's: samples drawn with replacement RESAMPLES times, by a generator of fixed
    seed. None where the denominators' sum is not above zero.
    """
    top = np.asarray(numerators, np.float64)
    bottom = np.ones_like(top) if denominators is None else np.asarray(denominators, np.float64)
    if bottom.sum() <= 0:
        return None
    drawn = np.random.default_rng(0).integers(len(top), size=(RESAMPLES, len(top)))
    sums = bottom[drawn].sum(axis=1)
    ratios = top[drawn].sum(axis=1)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high))


def squared_error(picture: np.ndarray, truth: np.ndarray) -> float:
    """Mean squared error of two uint8 pictures, in squared levels of 255."""
    return float(((picture.astype(np.float64) - truth.astype(np.float64)) ** 2).mean())


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 pictures, in dB."""
    return float(10 * np.log10(255**2 / max(squared_error(picture, truth), 1e-9)))


def within(picture: np.ndarray, other: np.ndarray, tolerance: int) -> np.ndarray:
    """Where two uint8 pictures [H,W,3] differ by at most `tolerance` of 255 in each channel; bool [H,W]."""
    return np.abs(picture.astype(np.int16) - other.astype(np.int16)).max(axis=-1) <= tolerance


def rounded(data: Any) -> Any:
    """With figures of six digits, so that files can be read and compared."""
    if isinstance(data, Mapping):
        return {key: rounded(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [rounded(value) for value in data]
    return float(f"{data:.6g}") if isinstance(data, float) else data
