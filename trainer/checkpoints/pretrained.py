"""The models that the published run started from, as one checkpoint of MIGE.

PixArt-alpha gives the DiT, BLIP-2 the Q-Former with its queries and projection, EVA-CLIP the ViT, T5 v1.1 the text
encoder. New are the feature fusion, the source's channels of the patch embedder, which start at zero, and the null
text, which is drawn once and never trained.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5EncoderModel

from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GraphName
from mige_rt.tokenizer import save_tokenizer
from trainer.checkpoints.convert_published import (
    read_checkpoint,
    read_tokenizer,
    read_vae_config,
    read_vae_weights,
    with_vae,
)
from trainer.checkpoints.published_names import T5_EMBEDDINGS, our_tensor, published_shapes
from trainer.checkpoints.weights import Checkpoint, Shapes, differences, names_in
from trainer.model.encoders import FeatureFusion
from trainer.model.mige import Mige

PATCHES = "x_embedder.proj.weight"
NULL_TEXT = "y_embedder.y_embedding"
VIT, FUSION, T5 = "visual_encoder.", "FFM.", "t5_model."
FROM_BLIP2 = ("query_tokens", "Qformer.", "ln_vision.", "t5_proj.")
LEFT_OUT_OF_PIXART = ("pos_embed", NULL_TEXT)  # computed, and drawn anew
POSITION_IDS = "Qformer.bert.embeddings.position_ids"
LEFT_OUT_OF_T5 = ("decoder.", "lm_head.")


@dataclass(frozen=True)
class PretrainedFiles:
    """Where the models are.

    Attributes:
        pixart: The .pth file, {"state_dict": ...}.
        blip2: The .pth file, {"model": ...}.
        eva_clip: The .pth file, a flat dict.
        t5: A folder in Hugging Face's layout, with the tokenizer.
        vae: A folder in diffusers' layout.
    """

    pixart: Path
    blip2: Path
    eva_clip: Path
    t5: Path
    vae: Path


class PretrainedCheckpoint(Checkpoint):
    """A model to start from: every key of every file is accounted for."""

    def __init__(self, files: PretrainedFiles, config: ModelConfig, seed: int) -> None:
        """Open the files.

        Args:
            files: Where they are.
            config: The model's sizes.
            seed: Of the weights that no file has.

        Raises:
            InputError: A file is missing or unreadable, or its keys and shapes are not exactly those expected.
        """
        self._files, self._seed = files, seed
        self.config = with_vae(config, read_vae_config(files.vae), files.vae)
        self.source = "PixArt-alpha, BLIP-2, EVA-CLIP and T5, not trained together yet"
        self._shapes = published_shapes(config)
        self._state = {**self._vit(), **self._qformer(), **self._dit(), **self._new()}

    @property
    def files(self) -> Sequence[Path]:
        """The .pth files; T5 and the VAE are loaded."""
        return [self._files.pixart, self._files.blip2, self._files.eva_clip]

    @property
    def stored_bytes(self) -> int:
        """The size of the weights as they are stored, in bytes."""
        states = (self._state, self._text, self._vae)
        return sum(tensor.nbytes for state in states for tensor in state.values())

    def save_tokenizer(self, path: Path) -> None:
        """Write T5's tokenizer as the file `path`; see `Checkpoint.save_tokenizer`."""
        save_tokenizer(read_tokenizer(self._files.t5), path)

    def tensors(self, model: Mige, graphs: Collection[GraphName]) -> dict[str, Tensor]:
        """See `Checkpoint.tensors`."""
        tensors: dict[str, Tensor] = {}
        for name in names_in(model, graphs):
            if name.startswith("vae_"):
                tensors[name] = self._vae[name.partition(".")[2]]
            else:
                state = self._text if name.startswith("text_encoder.") else self._state
                tensors[name] = our_tensor(state, name)
        return tensors

    def _expected(self, *prefixes: str) -> dict[str, tuple[int, ...]]:
        return {key: shape for key, shape in self._shapes.items() if key.startswith(prefixes)}

    def _vit(self) -> dict[str, Tensor]:
        state = read_checkpoint(_file(self._files.eva_clip), None, "EVA-CLIP ViT-g")
        expected = {key.removeprefix(VIT): shape for key, shape in self._expected(VIT).items()}
        # BLIP-2 takes the features before the last block.
        left_out = (f"blocks.{self.config.vision.depth}.", "norm.", "head.")
        _check(state, expected, left_out, self._files.eva_clip, "EVA-CLIP ViT-g")
        return {VIT + key: state[key] for key in expected}

    def _qformer(self) -> dict[str, Tensor]:
        state = read_checkpoint(_file(self._files.blip2), "model", "BLIP-2 pretrained with Flan-T5-XXL")
        expected = self._expected(*FROM_BLIP2)
        _check(state, expected, (POSITION_IDS,), self._files.blip2, "BLIP-2 pretrained with Flan-T5-XXL")
        return {key: state[key] for key in expected}

    def _dit(self) -> dict[str, Tensor]:
        state = read_checkpoint(_file(self._files.pixart), "state_dict", "PixArt-alpha")
        others = (VIT, FUSION, T5, *FROM_BLIP2, *LEFT_OUT_OF_PIXART)
        expected = {key: shape for key, shape in self._shapes.items() if not key.startswith(others)}
        width, channels, *patch = expected[PATCHES]
        expected[PATCHES] = (width, channels // 2, *patch)
        _check(state, expected, LEFT_OUT_OF_PIXART, self._files.pixart, "PixArt-alpha")
        patches = state[PATCHES]
        return {key: state[key] for key in expected} | {PATCHES: torch.cat([patches, torch.zeros_like(patches)], dim=1)}

    def _new(self) -> dict[str, Tensor]:
        """The weights that no file has, drawn from the seed; the state of other draws is left as it is."""
        qformer = self.config.qformer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            fusion = FeatureFusion(qformer.width, self.config.dit.width, qformer.fusion_heads)
            rows, width = self._shapes[NULL_TEXT]
            null_text = torch.randn(rows, width) / math.sqrt(width)
        return {FUSION + key: tensor for key, tensor in fusion.state_dict().items()} | {NULL_TEXT: null_text}

    @cached_property
    def _text(self) -> dict[str, Tensor]:
        folder = self._files.t5
        if not (folder / "config.json").is_file():
            raise InputError(f"no T5 in {folder}: a folder in Hugging Face's layout, with config.json, is expected")
        try:
            loaded: Any = T5EncoderModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype="auto"
            )
        except Exception as error:  # transformers and what it calls raise many kinds
            reason = str(error).partition("\n")[0]
            raise InputError(f"the T5 in {folder} cannot be read ({reason}); download it again") from error
        t5, report = loaded
        lacking = [name for name in report["missing_keys"] if not name.endswith("embed_tokens.weight")]
        unknown = [name for name in report["unexpected_keys"] if not name.startswith(LEFT_OUT_OF_T5)]
        if lacking or unknown:
            raise InputError(
                f"the T5 in {folder} does not have the weights its config.json says: missing: {', '.join(lacking)}; "
                f"unexpected: {', '.join(unknown)}"
            )
        state = {T5 + key: tensor for key, tensor in t5.state_dict().items() if T5 + key != T5_EMBEDDINGS[1]}
        _check(state, self._expected(T5), (), folder, "T5 v1.1 XXL")
        return state

    @cached_property
    def _vae(self) -> dict[str, Tensor]:
        return read_vae_weights(self._files.vae)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"no file {path}: download it, or say in the config's start where it is")
    return path


def _check(state: Mapping[str, Tensor], expected: Shapes, left_out: tuple[str, ...], path: Path, what: str) -> None:
    """The keys and shapes must be those expected, beside keys that begin as those that are left out."""
    unfit = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if unfit:
        raise InputError(f"{path} has entries that are no weights: {', '.join(map(str, unfit[:9]))}; it is no {what}")
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if not key.startswith(left_out)}
    count, listed = differences(shapes, expected)
    if count:
        raise InputError(f"{path} does not hold the weights of {what} as published:\n{listed}")
