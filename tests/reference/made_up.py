"""Made-up weights and inputs: a stated rule that gives anyone the same numbers from names and shapes alone.

A name is hashed with CRC-32; the hash seeds NumPy's default generator; standard normal float32 numbers are drawn.
Inputs are these numbers. Weights are them scaled so that every layer's output has about unit variance, see `weight`.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_T5_EMBEDDING = ("t5_model.shared.weight", "t5_model.encoder.embed_tokens.weight")  # two names of one table
_HALF_UNIT = ("query_tokens", "cls_token", "pos_embed", "relative_attention_bias.weight")
_TABLES = ("scale_shift_table", "y_embedding")


def normal(name: str, shape: Sequence[int], salt: str = "") -> NDArray[np.float32]:
    """Standard normal numbers of a shape, the same ones whenever name and salt are."""
    generator = np.random.default_rng(zlib.crc32(f"{salt}{name}".encode()))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


def weight(key: str, shape: Sequence[int], salt: str = "") -> NDArray[Any]:
    """The weight of a published key: float32, and int64 for position ids."""
    if key.endswith("position_ids"):
        return np.arange(shape[1])[None]
    if key == "pos_embed":
        return _sincos_table(math.isqrt(shape[1]), shape[2])
    numbers = normal(_T5_EMBEDDING[0] if key in _T5_EMBEDDING else key, shape, salt)
    if key.endswith(".weight") and ("norm" in key.lower() or "ln_" in key):
        return 1 + 0.1 * numbers
    if len(shape) == 1:  # biases
        return 0.05 * numbers
    if key.endswith(_HALF_UNIT):
        return 0.5 * numbers
    if key in _T5_EMBEDDING:
        return numbers
    inputs = shape[-1] if key.endswith(_TABLES) else math.prod(shape[1:])
    return numbers / np.float32(math.sqrt(inputs))


def _sincos_table(side: int, width: int) -> NDArray[np.float32]:
    """Fixed positions of a square grid, [1, side * side, width]: first half for x, then y; each sin | cos."""
    quarter = width // 4
    angles = np.arange(side)[:, None] * 10000.0 ** (-np.arange(quarter) / quarter)  # [side, width / 4]
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [side, width / 2]
    columns, rows = np.tile(waves, (side, 1)), np.repeat(waves, side, axis=0)
    return np.concatenate([columns, rows], axis=1)[None].astype(np.float32)
