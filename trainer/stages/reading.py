"""Positions as short Fourier codes, and starting weights with which attention looks where a code says.

Attention that starts at random hardly ever learns, within a small budget, which of its keys belongs to which place:
no gradient leads there before something is read at the right one. A regression finds such keys and queries at once.
"""

import math

import torch
from torch import Tensor, nn

from mige_rt.config import ModelConfig
from trainer.model.dit import CrossAttention

LOOK_GAIN = 3.0  # how sharply positions look at the start


def fourier_code(points: Tensor, grid: int, numbers: int) -> Tensor:
    """The codes of points [n,2], x and y in patches (0 to grid): cosines and sines of half waves, [n,numbers].

    The product of two points' codes is largest where they are one, and falls to about half of it, or less, a patch away
    along one axis.
    """
    frequencies = torch.arange(1, numbers // 4 + 1, dtype=torch.float32)
    angles = math.pi * points[:, :, None] * frequencies / grid  # [n,2,numbers/4]
    return torch.cat([angles.cos(), angles.sin()], dim=2).flatten(1)


def patch_centres(grid: int) -> Tensor:
    """The centres of grid * grid patches, row by row, [patches,2]."""
    y, x = torch.meshgrid(torch.arange(grid) + 0.5, torch.arange(grid) + 0.5, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def code_size(config: ModelConfig) -> int:
    """As many numbers as a cross-attention head of the diffusion transformer is wide."""
    return config.dit.width // config.dit.heads


def ridge(inputs: Tensor, targets: Tensor, penalty: float = 1e-4) -> tuple[Tensor, Tensor, float]:
    """The linear map of least squares, with a penalty on its weights.

    Args:
        inputs: [n,a]
        targets: [n,b]
        penalty: Over the mean of the inputs' variances.

    Returns:
        Its weight [b,a], as nn.Linear has it, its bias [b], and the share of the targets' variance that it explains.
    """
    mean, centre = inputs.double().mean(dim=0), targets.double().mean(dim=0)
    x, y = inputs.double() - mean, targets.double() - centre
    gram = x.T @ x
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, x.T @ y)  # [a,b]
    explained = 1 - float((x @ solution - y).square().sum() / y.square().sum())
    return solution.T.float(), (centre - mean @ solution).float(), explained


def query_places(queries: int, grid: int) -> Tensor:
    """Which neighbouring patches each of an image's tokens looks at, in their order, [queries,patches a query,2]."""
    if grid**2 % queries:
        raise ValueError(f"{queries} tokens cannot share {grid} x {grid} patches evenly")
    return patch_centres(grid).reshape(queries, -1, 2)


def start_to_look(
    attention: CrossAttention, kv_linear: nn.Linear, x: Tensor, tokens: Tensor, grid: int
) -> dict[str, float]:
    """Start half of a cross-attention's heads so that each position looks at the image tokens of its own place.

    Queries and keys are linear regressions to the codes of their places.

    Args:
        attention: Its queries are changed in place.
        kv_linear: The layer that makes its keys and values; the keys are changed in place.
        x: What positions ask with, [N,T,width].
        tokens: Image tokens, as `kv_linear` takes them, [M,Q,width].
        grid: Patches along a side, T = grid * grid.

    Returns:
        The shares of the codes' variance that `queries` and `keys` explain.
    """
    size, looking = kv_linear.out_features // 2 // attention.heads, attention.heads // 2
    here = fourier_code(patch_centres(grid), grid, size).repeat(len(x), 1)
    places = query_places(tokens.shape[1], grid).mean(dim=1)
    there = fourier_code(places, grid, size).repeat(len(tokens), 1)
    query, query_bias, asked = ridge(x.flatten(0, 1), here)
    key, key_bias, told = ridge(tokens.flatten(0, 1), there)
    rows = looking * size
    with torch.no_grad():
        attention.q_linear.weight[:rows] = LOOK_GAIN * query.repeat(looking, 1)
        attention.q_linear.bias[:rows] = LOOK_GAIN * query_bias.repeat(looking)
        kv_linear.weight[:rows] = key.repeat(looking, 1)
        kv_linear.bias[:rows] = key_bias.repeat(looking)
    return {"queries": asked, "keys": told}
