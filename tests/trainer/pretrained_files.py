"""Made-up files in the layouts of the models that the published run started from."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from mige_rt.config import ModelConfig
from trainer.checkpoints.published_names import published_shapes
from trainer.model.vae import make_vae
from trainer.run.config import Start
from trainer.tokenizer import from_spiece, train_tokenizer

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
VIT, T5, FUSION = "visual_encoder.", "t5_model.", "FFM."
BLIP2 = ("query_tokens", "Qformer.", "ln_vision.", "t5_proj.")

Make = Callable[[tuple[int, ...]], Tensor]


def hollow(shape: tuple[int, ...]) -> Tensor:
    """A weight of any size, one number in memory and in a file."""
    return torch.full((1,), 0.5).expand(*shape)


def small_numbers(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 0.02


def states(config: ModelConfig, make: Make) -> dict[str, dict[str, Any]]:
    """What is in the three .pth files."""
    shapes = published_shapes(config)
    vit = {key.removeprefix(VIT): make(shape) for key, shape in shapes.items() if key.startswith(VIT)}
    width, last = config.vision.width, f"blocks.{config.vision.depth}."
    vit |= {last + "norm1.weight": make((width,)), "norm.weight": make((width,)), "head.weight": make((7, width))}
    blip2 = {key: make(shape) for key, shape in shapes.items() if key.startswith(BLIP2)}
    blip2["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    others = (VIT, T5, FUSION, *BLIP2)
    pixart = {key: make(shape) for key, shape in shapes.items() if not key.startswith(others)}
    channels = config.vae.channels
    pixart["x_embedder.proj.weight"] = make((config.dit.width, channels, config.dit.patch, config.dit.patch))
    pixart["pos_embed"] = make((1, config.dit.trained_grid**2, config.dit.width))
    pixart["y_embedder.y_embedding"] = make((120, config.text.width))
    return {"eva_clip": vit, "blip2": {"model": blip2}, "pixart": {"state_dict": pixart}}


def write_pth(folder: Path, contents: Mapping[str, dict[str, Any]]) -> Start:
    """Write the files; the start names them, and the folders that `write_folders` makes."""
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pth")
    paths = {name: str(folder / f"{name}.pth") for name in contents}
    return Start(**paths, t5=str(folder / "t5"), vae=str(folder / "vae"))


def write_folders(folder: Path, config: ModelConfig) -> T5EncoderModel:
    """The VAE, and T5 with its tokenizer."""
    make_vae(config.vae).save_pretrained(folder / "vae")
    text = config.text
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=text.vocabulary,
            d_model=text.width,
            d_kv=text.head_width,
            d_ff=text.mlp,
            num_layers=text.depth,
            num_heads=text.heads,
            feed_forward_proj="gated-gelu",
        )
    )
    t5.save_pretrained(folder / "t5")
    pieces = from_spiece(REFERENCE / "spiece.model").get_vocab_size()
    if pieces <= text.vocabulary:
        shutil.copy(REFERENCE / "spiece.model", folder / "t5")
    else:
        prompts = ["make the <imagehere> blue", "a <imagehere> in the rain", "put <imagehere> into <imagehere>"]
        train_tokenizer(prompts, text.vocabulary).save(str(folder / "t5" / "tokenizer.json"))
    return t5
