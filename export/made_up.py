"""Models of any size with made-up weights, for what needs no trained ones: rehearsals and measurements."""

import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from mige_rt.atomic import atomic_folder
from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE
from mige_rt.config import PRESETS, ModelConfig

BLOCK = 4_194_301  # numbers drawn once and repeated; a prime, so that no two weights begin alike


def make_block(device: str = "cpu") -> Tensor:
    """The normal numbers that `made_up` repeats, [BLOCK], the same on every device."""
    return torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(device)


def made_up(name: str, shape: tuple[int, ...], block: Tensor) -> Tensor:
    """A weight of about the size that a trained one has, fixed by its name and shape.

    Norms are near 1, biases are small, and products keep the size of what they are applied to.

    Args:
        name: the weight's name.
        shape: its shape.
        block: `make_block`'s.

    Returns:
        A bfloat16 tensor of the shape, on the block's device.
    """
    size, start = math.prod(shape), zlib.crc32(name.encode()) % len(block)
    values = block.roll(-start).repeat(-(-size // len(block)))[:size].reshape(shape)
    leaf = name.rpartition(".")[2]
    if len(shape) == 1:
        return (1 + 0.1 * values if leaf == "weight" else 0.05 * values).bfloat16()
    if "embed_tokens" in name or "shared" in name:
        return values.bfloat16()
    if name.endswith("SelfAttention.q.weight"):
        # T5 divides no scores by the square root of the head's width, since its training starts from queries that are
        # smaller by it; larger ones make 24 layers of hard choices, which no precision but the same follows.
        values = values / math.sqrt(PRESETS["xl"].text.head_width)
    return (values / math.sqrt(math.prod(shape[1:]))).bfloat16()


def make_model(config: ModelConfig, out: Path, device: str = "cpu") -> None:
    """Write a model folder of made-up weights, and with the default model's tokenizer.

    Args:
        config: the model's sizes.
        out: the folder to make.
        device: makes the weights, one at a time.

    Raises:
        InputError: `out` exists, or the disk has too little room.
    """
    from tokenizers import Tokenizer  # here, so that `made_up` needs neither these packages nor diffusers

    from trainer.checkpoints.model_folder import ModelContent, write_model_folder
    from trainer.checkpoints.weights import our_shapes
    from trainer.model.vae import make_vae

    shapes = our_shapes(config)
    block = make_block(device)
    with atomic_folder(out) as folder:
        content = ModelContent(
            config=config,
            source="made up",
            tokenizer=Tokenizer.from_file(str(DEFAULT_MODEL / TOKENIZER_FILE)),
            sizes={name: 2 * math.prod(shape) for name, shape in shapes.items()},
            tensor=lambda name: made_up(name, shapes[name], block).cpu(),
            vae=make_vae(config.vae).state_dict(),
        )
        write_model_folder(folder, content)
