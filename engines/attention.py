"""Which of PyTorch's implementations of attention is the fastest on a card, measured on it."""

import time
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.interface import Attention
from mige_rt.errors import NotAvailableError

BACKENDS: Mapping[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
WARM_UPS, RUNS = 3, 20

# (backend, device, dtype, shape [R,heads,T,head_dim]) -> seconds of one attention
Measure = Callable[[SDPBackend, str, torch.dtype, tuple[int, int, int, int]], float]


def attention_order(
    choice: Attention,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    measure: Measure | None = None,
) -> list[SDPBackend]:
    """The implementations in the order of preference, the last of which takes every input.

    Args:
        choice: One of them, which comes first; auto: the fastest without a mask comes first.
        device: cpu, cuda or cuda:N; on the CPU the order is PyTorch's own, and empty here.
        dtype: Of queries, keys and values.
        shape: Theirs, [R,heads,T,head_dim].
        measure: Stands in for the measurement.

    Raises:
        NotAvailableError: The one that was chosen does not take such inputs here.
    """
    if device == "cpu":
        if choice != "auto":
            raise NotAvailableError(f"--attention {choice} is for CUDA, and the device is cpu: leave it out")
        return []
    seconds: dict[SDPBackend, float] = {}
    for name in BACKENDS if choice == "auto" else (choice,):
        try:
            seconds[BACKENDS[name]] = (measure or _seconds)(BACKENDS[name], device, dtype, shape)
        except RuntimeError as error:  # it does not take such inputs, or this build has none
            if choice != "auto":
                raise NotAvailableError(
                    f"attention by {choice} is not to be had here ({error}); expected one of "
                    f"{', '.join(get_args(Attention))}"
                ) from error
    fastest = sorted(seconds, key=lambda backend: seconds[backend])
    return [*fastest, *(backend for backend in BACKENDS.values() if backend not in seconds)]


@torch.inference_mode()
def _seconds(backend: SDPBackend, device: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> float:
    batch, heads, tokens, width = shape
    # As the blocks make them: parts of one product, [R,T,3,heads,head_dim].
    q, k, v = torch.randn(batch, tokens, 3, heads, width, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)
    cuda: Any = torch.cuda
    with sdpa_kernel(backend):
        for _ in range(WARM_UPS):
            F.scaled_dot_product_attention(q, k, v)
        cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(RUNS):
            F.scaled_dot_product_attention(q, k, v)
        cuda.synchronize(device)
    return (time.perf_counter() - start) / RUNS
