"""The published layout: `model.pth`, and beside it the folders of the VAE and of T5's tokenizer."""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tokenizers import Tokenizer
from torch import Tensor

from mige_rt.atomic import atomic_folder
from mige_rt.config import ModelConfig, VAEConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GraphName
from mige_rt.tokenizer import load_tokenizer, save_tokenizer
from mige_rt.tokenizer_file import read_tokenizer_file
from trainer.checkpoints.model_folder import ModelContent, OnProgress, write_model_folder
from trainer.checkpoints.published_names import check_published, kind_of, our_tensor
from trainer.checkpoints.weights import NAMES_SHOWN, Checkpoint, names_in, our_shapes
from trainer.model.mige import Mige
from trainer.model.vae import make_vae
from trainer.tokenizer import from_spiece

VAE_FOLDER = "sd-vae-ft-ema"
TOKENIZER_FOLDER = "t5-v1_1-xxl"
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")


class PublishedCheckpoint(Checkpoint):
    """The published weights, opened where they lie: `model.pth` is memory-mapped, and read as data alone."""

    def __init__(
        self, ckpt: Path, *, vae: Path | None = None, tokenizer: Path | None = None, config: ModelConfig | None = None
    ) -> None:
        """Open a published checkpoint.

        Args:
            ckpt: `model.pth`, or a folder that holds it.
            vae: the VAE's folder, by default `sd-vae-ft-ema` beside the checkpoint.
            tokenizer: the folder or file of T5's tokenizer, by default `t5-v1_1-xxl` beside the checkpoint.
            config: the sizes of a checkpoint that has none of the published ones.

        Raises:
            InputError: a part is missing or unreadable, or the checkpoint's keys are not exactly the model's.
        """
        path = find_checkpoint(ckpt)
        self._places = [path.parent, ckpt] if ckpt.is_dir() else [path.parent]
        self._tokenizer_folder = tokenizer
        self._vae_folder = vae or find_beside(self._places, VAE_FOLDER, ("config.json",), "--vae")
        self._state = read_checkpoint(path)
        self._path = path
        sizes = check_published(self._state, str(path), config)
        self.config = with_vae(sizes, read_vae_config(self._vae_folder), self._vae_folder)
        self.source = f"converted from the published layout ({path.name})"

    @property
    def files(self) -> Sequence[Path]:
        """The `.pth` file alone: the VAE's weights are small, and loaded."""
        return [self._path]

    @property
    def stored_bytes(self) -> int:
        """The size of our weights as they are stored, the VAE's among them, in bytes."""
        return sum(self.sizes.values()) + sum(tensor.nbytes for tensor in self.vae.values())

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The bytes of each of our weights but the VAE's, by our names."""
        return {name: self.tensor(name).nbytes for name in our_shapes(self.config)}

    @cached_property
    def vae(self) -> dict[str, Tensor]:
        """The VAE's weights, float32, by diffusers' names.

        Raises:
            InputError: they cannot be read.
        """
        return read_vae_weights(self._vae_folder)

    def save_tokenizer(self, path: Path) -> None:
        """Write T5's tokenizer as the file `path`, in the format of `tokenizer.json`.

        Raises:
            InputError: it is missing or is not T5's.
        """
        save_tokenizer(self.tokenizer, path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """T5's tokenizer.

        Raises:
            InputError: it is missing or is not T5's.
        """
        folder = self._tokenizer_folder or find_beside(self._places, TOKENIZER_FOLDER, TOKENIZER_FILES, "--tokenizer")
        tokenizer = read_tokenizer(folder)
        if tokenizer.get_vocab_size() > self.config.text.vocabulary:
            warnings.warn(
                f"the tokenizer in {folder} has {tokenizer.get_vocab_size()} pieces and the model's table has "
                f"{self.config.text.vocabulary} rows: prompts with the pieces behind them will fail",
                stacklevel=2,
            )
        return tokenizer

    def tensor(self, name: str) -> Tensor:
        """One of our weights but the VAE's, as it is stored."""
        return our_tensor(self._state, name)

    def tensors(self, model: Mige, graphs: Collection[GraphName]) -> dict[str, Tensor]:
        """The weights of some graphs, mapped from `model.pth`, the VAE's loaded; see `Checkpoint.tensors`.

        Raises:
            InputError: the VAE's weights cannot be read.
        """
        return {
            name: self.vae[name.partition(".")[2]] if name.startswith("vae_") else self.tensor(name)
            for name in names_in(model, graphs)
        }


def convert(
    ckpt: Path,
    out: Path,
    *,
    vae: Path | None = None,
    tokenizer: Path | None = None,
    config: ModelConfig | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Make the model folder `out` from the published layout.

    Weights keep the dtype they are stored in (the VAE's are float32). Memory stays near one shard's size: the
    checkpoint is memory-mapped and copied a shard at a time.

    Args:
        ckpt: `model.pth`, or a folder that holds it.
        out: the model folder to make.
        vae: the VAE's folder, by default `sd-vae-ft-ema` beside the checkpoint.
        tokenizer: the folder or file of T5's tokenizer, by default `t5-v1_1-xxl` beside the checkpoint.
        config: the sizes of a checkpoint that has none of the published ones.
        on_progress: gets the component that is being written, the bytes written so far, and the bytes in all.

    Raises:
        InputError: `out` exists or cannot be written, a part is missing or unreadable, or the checkpoint's keys are
            not exactly the model's. Nothing is left behind.
    """
    with atomic_folder(out) as folder:
        checkpoint = PublishedCheckpoint(ckpt, vae=vae, tokenizer=tokenizer, config=config)
        content = ModelContent(
            config=checkpoint.config,
            source=checkpoint.source,
            tokenizer=checkpoint.tokenizer,
            sizes=checkpoint.sizes,
            tensor=checkpoint.tensor,
            vae=checkpoint.vae,
        )
        write_model_folder(folder, content, on_progress)


def read_checkpoint(path: Path, entry: str | None = "state_dict", name: str = "MIGE's model.pth") -> dict[str, Tensor]:
    """The state dict of a published file, memory-mapped; nothing pickled in it is ever run.

    Args:
        path: the file.
        entry: where the state dict is in the file's dict; None: it is the file's dict.
        name: what is expected, for errors.

    Raises:
        InputError: the file is truncated, is no torch checkpoint, holds Python objects other than tensors, or has no
            state dict.
    """
    content_expected = "{key: tensor}" if entry is None else f'{{"{entry}": {{key: tensor}}}}'
    expected = f"{name}, {content_expected} written by torch.save, is expected"
    if not zipfile.is_zipfile(path):
        size = path.stat().st_size
        raise InputError(
            f"{path} ({size:,} bytes) is no torch checkpoint, or only the beginning of one: {expected}; "
            "download it again"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise InputError(
            f"{path} holds Python objects{f' ({named[1]})' if named else ''} beside tensors, which could run code "
            f"and are not loaded: {expected}; use a file of tensors alone"
        ) from error
    except Exception as error:  # a damaged file makes the reader raise nearly anything
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path} cannot be read as a torch checkpoint ({reason}): {expected}; download it again"
        ) from error
    state = content if entry is None else content.get(entry) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        held = (
            f"the entries {', '.join(map(str, [*content][:NAMES_SHOWN]))}"
            if isinstance(content, dict)
            else kind_of(content)
        )
        raise InputError(f"{path} is a checkpoint of another model (it holds {held}): {expected}")
    return state


def find_checkpoint(given: Path) -> Path:
    """The `.pth` itself, or the one in a folder or a level below it, `model.pth` before others.

    Raises:
        InputError: there is none, or several of the same rank.
    """
    if given.is_file():
        return given
    if not given.exists():
        raise InputError(f"no checkpoint at {given}: MIGE's model.pth, or a folder that holds it, is expected there")
    for pattern in ("model.pth", "*/model.pth", "*.pth", "*/*.pth"):
        candidates = sorted(given.glob(pattern))
        if len(candidates) > 1:
            names = ", ".join(str(path.relative_to(given)) for path in candidates)
            raise InputError(f"{given} holds several checkpoints ({names}); give the one that is meant")
        if candidates:
            return candidates[0]
    raise InputError(
        f"no checkpoint in {given}: a model.pth is expected there, with the folders {VAE_FOLDER} and "
        f"{TOKENIZER_FOLDER} beside it; give that file or the folder that holds it"
    )


def find_beside(places: Iterable[Path], name: str, files: tuple[str, ...], option: str) -> Path:
    """The folder `name` with one of `files` in it, in `places` or a level below them.

    Args:
        places: folders, searched in this order.
        name: the name of the folder.
        files: names of files, one of which it must hold.
        option: the command's option for the folder, which the error names.

    Raises:
        InputError: there is no such folder.
    """
    places = list(dict.fromkeys(places))
    for place in places:
        for folder in (place / name, *sorted(place.glob(f"*/{name}"))):
            if any((folder / file).is_file() for file in files):
                return folder
    raise InputError(
        f"no folder {name} with {' or '.join(files)} in {' or '.join(map(str, places))}: it is expected beside the "
        f"checkpoint; download it there, or say where it is with {option}"
    )


def read_tokenizer(given: Path) -> Tokenizer:
    """T5's tokenizer, from a folder with `spiece.model` or else `tokenizer.json`, or from either file.

    Raises:
        InputError: there is neither, or it is not T5's.
    """
    inside = [path for path in (given / name for name in TOKENIZER_FILES) if path.is_file()]
    path = given if given.is_file() else next(iter(inside), None)
    if path is None:
        raise InputError(f"no tokenizer in {given}: T5's {' or '.join(TOKENIZER_FILES)} is expected there")
    if path.suffix != ".json":
        return from_spiece(path)
    load_tokenizer(path)  # for its checks
    return Tokenizer.from_str(read_tokenizer_file(path))


_EXPECTED_VAE = "a diffusers AutoencoderKL is expected there, as sd-vae-ft-ema"


def read_vae_config(folder: Path) -> VAEConfig:
    """The sizes of an AutoencoderKL in diffusers' layout.

    Raises:
        InputError: the folder holds no such VAE, or one with parts that ours does not have.
    """
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"no VAE in {folder} ({error}): {_EXPECTED_VAE}") from error
    kind = stored.get("_class_name") if isinstance(stored, dict) else None
    if kind != "AutoencoderKL":
        raise InputError(f"{folder / 'config.json'} describes {kind or 'something else'}: {_EXPECTED_VAE}")
    try:
        with torch.device("meta"):
            vae: Any = AutoencoderKL.from_config(stored)
    except Exception as error:  # diffusers and what it calls raise many kinds
        raise _unreadable_vae(folder, error) from error
    config = VAEConfig(
        channels=vae.config["latent_channels"],
        widths=tuple(vae.config["block_out_channels"]),
        layers=vae.config["layers_per_block"],
        groups=vae.config["norm_num_groups"],
        attention=vae.config["mid_block_add_attention"],
        scale=float(vae.config["scaling_factor"]),
    )
    with torch.device("meta"):
        ours = make_vae(config)
    names = [name for name in ours.config if name not in ("sample_size", "force_upcast") and not name.startswith("_")]
    # As JSON, where tuples and lists are the same.
    unlike = [f"{n} is {vae.config[n]!r}" for n in names if json.dumps(vae.config[n]) != json.dumps(ours.config[n])]
    if unlike:
        raise InputError(
            f"the VAE in {folder} is built in another way than Stable Diffusion's ({'; '.join(unlike)}): "
            f"{_EXPECTED_VAE}"
        )
    return config


def read_vae_weights(folder: Path) -> dict[str, Tensor]:
    """The weights, by the names in `make_vae`, float32, of an AutoencoderKL in diffusers' layout.

    Also reads `.bin` files, if of tensors alone, and the attention's weights by their old names (query, key, value,
    proj_attn).

    Raises:
        InputError: the files cannot be read, or lack weights of the model that they describe.
    """
    try:
        loaded: Any = AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=(folder / "diffusion_pytorch_model.safetensors").is_file(),
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and what it calls raise many kinds
        raise _unreadable_vae(folder, error) from error
    vae, report = loaded
    listed = [f"{kind.split('_')[0]}: {', '.join(map(str, names))}" for kind, names in report.items() if names]
    if listed:
        raise InputError(f"the VAE in {folder} does not have the weights its config.json says: {'; '.join(listed)}")
    return vae.state_dict()


def _unreadable_vae(folder: Path, error: Exception) -> InputError:
    reason = str(error).partition("\n")[0]
    return InputError(f"the VAE in {folder} cannot be read ({reason}): {_EXPECTED_VAE}; download it again")


def with_vae(config: ModelConfig, vae: VAEConfig, folder: Path) -> ModelConfig:
    """`config` with this VAE, whose latents must be those that the model was trained on.

    Raises:
        InputError: their channels, factor or scale are others.
    """
    given, trained = [f"{v.channels} channels, a factor of {v.factor}, a scale of {v.scale}" for v in (vae, config.vae)]
    if given != trained:
        raise InputError(
            f"the VAE in {folder} makes latents with {given}; the model was trained on {trained}: use {VAE_FOLDER}"
        )
    return replace(config, vae=vae)
