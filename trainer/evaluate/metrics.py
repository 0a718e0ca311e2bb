"""Metrics that compare two images. They need nothing but numpy, so that any part of the toolchain can use them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def mean_squared_error(image: np.ndarray, truth: np.ndarray) -> float:
    """The mean squared error of two uint8 images of one shape, in squared levels of 255."""
    return float(((image.astype(np.float64) - truth.astype(np.float64)) ** 2).mean())


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """The peak signal-to-noise ratio of two uint8 images of one shape, in dB."""
    return float(10 * np.log10(255**2 / max(mean_squared_error(image, truth), 1e-9)))


def within(image: np.ndarray, other: np.ndarray, tolerance: int) -> np.ndarray:
    """Where two images agree.

    Args:
        image: uint8 [H,W,3].
        other: uint8 [H,W,3].
        tolerance: Largest difference in each channel, in levels of 255.

    Returns:
        bool [H,W].
    """
    return np.abs(image.astype(np.int16) - other.astype(np.int16)).max(axis=-1) <= tolerance


def rounded(data: Any) -> Any:
    """JSON-like data with floats of six significant digits, for reports to be read; what is not finite becomes None."""
    if isinstance(data, Mapping):
        return {key: rounded(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [rounded(value) for value in data]
    if isinstance(data, float):
        return float(f"{data:.6g}") if math.isfinite(data) else None
    return data
