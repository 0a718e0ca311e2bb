"""Guidance branches on several devices: a process each, which computes its part of every step's batch.

Started by `torchrun --nproc-per-node 2`. Every process makes the whole image, from the same arguments; only the
denoiser's batch is divided, and its parts are gathered at every step. With two branches, the published setting of an
edit, each of two GPUs computes one.
"""

import os

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from engines.device import parse_device
from engines.interface import Array
from mige_rt.denoise import Denoiser
from mige_rt.errors import InputError


def join_processes(device: str) -> str:
    """Meet the other processes that torchrun started.

    Args:
        device: cpu, or cuda or auto: the GPU of this process's number.

    Returns:
        The device of this process.

    Raises:
        InputError: torchrun did not start this process, or the device is the same for all.
    """
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            "cfg_parallel takes several processes, and this one was started alone; start it by: torchrun "
            "--nproc-per-node 2 SCRIPT"
        )
    name = parse_device(device)
    if name.index is not None:
        raise InputError(f"cfg_parallel gives each process a GPU of its own, and {device} was given; give cuda")
    on_cuda = name.kind == "cuda" or (name.kind == "auto" and torch.cuda.is_available())
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_cuda else "gloo")
    return f"cuda:{os.environ['LOCAL_RANK']}" if on_cuda else "cpu"


class BranchParallelDenoiser:
    """A denoiser of which each process computes as large a part of the batch, in the order of their ranks.

    A batch that cannot be divided so, such as three branches of one image by two processes, is computed by each.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        """Divide the work of a denoiser."""
        self._denoiser = denoiser
        self._rank, self._processes = dist.get_rank(), dist.get_world_size()

    def __call__(self, *, latents: Array, source: Array, timestep: Array, cross_kv: Array, text_mask: Array) -> Array:
        """See `denoise.Denoiser`."""
        size, remainder = divmod(latents.shape[0], self._processes)
        part = slice(None) if remainder else slice(self._rank * size, (self._rank + 1) * size)
        prediction = self._denoiser(
            latents=latents[part],
            source=source[part],
            timestep=timestep[part],
            cross_kv=cross_kv[:, :, part],
            text_mask=text_mask[part],
        )
        return prediction if remainder else _gathered(prediction, self._processes)


def _gathered(part: Array, processes: int) -> Array:
    """The processes' parts, one after the other, in part's library and on its device."""
    tensor: Tensor = torch.as_tensor(part).contiguous()
    parts = [torch.empty_like(tensor) for _ in range(processes)]
    dist.all_gather(parts, tensor)  # pyright: ignore[reportUnknownMemberType]
    whole = torch.cat(parts)
    if isinstance(part, np.ndarray):
        array: NDArray[np.float32] = whole.numpy()
        return array
    return whole  # pyright: ignore[reportReturnType]: a torch tensor is an Array
