"""The published layout: `model.pth`, and beside it the folders of the VAE and of T5's tokenizer.

The authors' implementation (github.com/Eureka-Maggie/MIGE) saves `{"state_dict": {key: tensor}}` with torch.save.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tokenizers import Tokenizer
from torch import Tensor

from mige_rt.config import PRESETS, ModelConfig, VAEConfig
from mige_rt.errors import InputError
from mige_rt.tokenizer import load_tokenizer
from trainer.model.mige import Mige
from trainer.model.vae import make_vae
from trainer.tokenizer import from_spiece

Shapes = Mapping[str, tuple[int, ...]]

VAE_FOLDER = "sd-vae-ft-ema"
TOKENIZER_FOLDER = "t5-v1_1-xxl"
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
SIZES = ("xl", "reduced")  # presets that exist in the published layout
NAMES_SHOWN = 2000  # of each kind, in an error: all of a published checkpoint's

# Our name -> the published one; the first pattern that fits counts.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^image_encoder\.query_tokens$", "query_tokens"),
    (r"^image_encoder\.vision\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^image_encoder\.vision\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^image_encoder\.vision\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^image_encoder\.vision\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"visual_encoder.blocks.\1.norm\2."),
    (r"^image_encoder\.vision\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"visual_encoder.blocks.\1.attn.qkv."),
    (
        r"^image_encoder\.vision\.encoder\.layers\.(\d+)\.self_attn\.projection\.",
        r"visual_encoder.blocks.\1.attn.proj.",
    ),
    (r"^image_encoder\.vision\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder.blocks.\1.mlp."),
    (r"^image_encoder\.vision\.post_layernorm\.", "ln_vision."),
    (r"^image_encoder\.qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (
        r"^image_encoder\.qformer\.encoder\.layer\.(\d+)\.(attention|crossattention)\.attention\.",
        r"Qformer.bert.encoder.layer.\1.\2.self.",
    ),
    (r"^image_encoder\.qformer\.encoder\.", "Qformer.bert.encoder."),
    (r"^image_encoder\.fusion\.", "FFM."),
    (r"^image_encoder\.projection\.", "t5_proj."),
    (r"^text_encoder\.t5\.", "t5_model."),
    (r"^conditioner\.y_embedding$", "y_embedder.y_embedding"),
    (r"^conditioner\.y_proj\.", "y_embedder.y_proj."),
    (r"^conditioner\.kv_linears\.(\d+)\.", r"blocks.\1.cross_attn.kv_linear."),
    (r"^denoiser\.", ""),
)

T5_EMBEDDINGS = ("t5_model.shared.weight", "t5_model.encoder.embed_tokens.weight")  # two names of one table
VIT_BIAS = re.compile(r"^(visual_encoder\.blocks\.\d+\.attn\.)qkv\.bias$")  # published as q_bias and v_bias; k has none


def published_name(name: str) -> str:
    """The published key of one of our weights (`denoiser.t_block.1.bias` -> `t_block.1.bias`).

    The biases of the ViT's attention, `...attn.qkv.bias`, are under that name in no file: see `our_tensor`.
    Raises KeyError for a weight that `model.pth` does not hold, as the VAE's.
    """
    for pattern, replacement in RENAMES:
        renamed, fits = re.subn(pattern, replacement, name)
        if fits:
            return renamed
    raise KeyError(name)


def distinct_tensors(model: Mige) -> dict[str, list[str]]:
    """Every weight once, by its first name in the state dict -> all its names there, that one first.

    Two have several names: the patch embedder, which the fusion shares with the denoiser, and T5's embedding.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all our weights but the VAE's, each once."""
    with torch.device("meta"):
        model = Mige(config)
    state = model.state_dict()
    return {name: tuple(state[name].shape) for name in distinct_tensors(model) if not name.startswith("vae_")}


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes that a checkpoint of this size must have; T5's embedding under the first of its two names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in our_shapes(config).items():
        key = published_name(name)
        if bias := VIT_BIAS.match(key):
            shapes[bias[1] + "q_bias"] = shapes[bias[1] + "v_bias"] = (shape[0] // 3,)
        else:
            shapes[key] = shape
    return shapes


def optional_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes that a checkpoint may have: tables that we compute, and the second name of T5's embedding."""
    return {
        "Qformer.bert.embeddings.position_ids": (1, 512),
        "pos_embed": (1, config.dit.trained_grid**2, config.dit.width),
        T5_EMBEDDINGS[1]: (config.text.vocabulary, config.text.width),
    }


def our_tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    """Our weight `name` out of a published state dict, which is not copied (the ViT's attention biases are)."""
    key = published_name(name)
    if bias := VIT_BIAS.match(key):
        q, v = state[bias[1] + "q_bias"], state[bias[1] + "v_bias"]
        return torch.cat([q, torch.zeros_like(q), v])
    if key == T5_EMBEDDINGS[0] and key not in state:
        key = T5_EMBEDDINGS[1]
    return state[key]


def differences(found: Shapes, expected: Shapes, optional: Shapes | None = None) -> tuple[int, str]:
    """How many names are missing, unexpected or of another shape, and a text that lists them by kind."""
    allowed = {**expected, **(optional or {})}
    wrong = [name for name in found if name in allowed and found[name] != allowed[name]]
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in allowed],
        "wrongly shaped": [f"{name} {list(found[name])} instead of {list(allowed[name])}" for name in wrong],
    }
    lines = []
    for kind, names in kinds.items():
        rest = f", ... ({len(names) - NAMES_SHOWN} more)" if len(names) > NAMES_SHOWN else ""
        if names:
            lines.append(f"{len(names)} {kind}: {', '.join(names[:NAMES_SHOWN])}{rest}")
    return sum(map(len, kinds.values())), "\n".join(lines)


def check_published(state: Mapping[str, Any], what: str, config: ModelConfig | None = None) -> ModelConfig:
    """The sizes that a published state dict has: `config`, or without it the preset of SIZES that it comes closest to.

    Every key must be accounted for. Raises InputError, which calls the state dict `what`, that names the missing,
    unexpected and wrongly shaped keys, all in one.
    """
    odd = [key for key, value in state.items() if not _is_weight(key, value)]
    if odd:
        shown = ", ".join(f"{key} ({_kind(state[key])})" for key in odd[:NAMES_SHOWN])
        raise InputError(
            f"{what} has {len(odd)} entries that are no weights: {shown}; floating-point tensors are expected"
        )
    found = {key: tuple(value.shape) for key, value in state.items()}
    expected_embedding, other_embedding = T5_EMBEDDINGS
    if expected_embedding not in found and other_embedding in found:
        found = {expected_embedding if key == other_embedding else key: shape for key, shape in found.items()}
    candidates = [config] if config else [PRESETS[name] for name in SIZES]
    compared = [(differences(found, published_shapes(c), optional_shapes(c)), c) for c in candidates]
    (count, listed), closest = min(compared, key=lambda entry: entry[0][0])
    if count:
        raise InputError(
            f"{what} does not hold MIGE's weights as published (sizes {closest.name!r}):\n{listed}\n"
            "Use the authors' model.pth, whole and unchanged."
        )
    tables = [state[key] for key in T5_EMBEDDINGS if key in state]
    if len(tables) == 2 and not any(table.is_meta for table in tables) and not torch.equal(*tables):
        raise InputError(
            f"{what} holds two tables of T5's embedding that differ, under {' and '.join(T5_EMBEDDINGS)}; they are two "
            "names of one table: use the authors' model.pth, whole and unchanged"
        )
    return closest


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a published `model.pth`, memory-mapped; nothing pickled in it is ever run.

    Raises InputError when the file is truncated, is no torch checkpoint, holds Python objects other than tensors,
    or has no state dict.
    """
    expected = 'MIGE\'s model.pth, {"state_dict": {key: tensor}} written by torch.save, is expected'
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
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        held = (
            f"the entries {', '.join(map(str, [*content][:NAMES_SHOWN]))}"
            if isinstance(content, dict)
            else _kind(content)
        )
        raise InputError(f"{path} is a checkpoint of another model (it holds {held}): {expected}")
    return state


def find_checkpoint(given: Path) -> Path:
    """The `.pth` itself, or the one in a folder or a level below it, `model.pth` before others.

    Raises InputError when there is none, or no telling which.
    """
    if given.is_file():
        return given
    if not given.exists():
        raise InputError(f"no checkpoint at {given}: MIGE's model.pth, or a folder that holds it, is expected there")
    for pattern in ("model.pth", "*/model.pth", "*.pth", "*/*.pth"):
        found = sorted(given.glob(pattern))
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(given)) for path in found)
            raise InputError(f"{given} holds several checkpoints ({names}); give the one that is meant")
        if found:
            return found[0]
    raise InputError(
        f"no checkpoint in {given}: a model.pth is expected there, with the folders {VAE_FOLDER} and "
        f"{TOKENIZER_FOLDER} beside it; give that file or the folder that holds it"
    )


def find_beside(places: Iterable[Path], name: str, files: tuple[str, ...], option: str) -> Path:
    """The folder `name` with one of `files` in it, in `places` or a level below them. Raises InputError without."""
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

    Raises InputError when there is neither, or it is not T5's.
    """
    found = [path for path in (given / name for name in TOKENIZER_FILES) if path.is_file()]
    path = given if given.is_file() else next(iter(found), None)
    if path is None:
        raise InputError(f"no tokenizer in {given}: T5's {' or '.join(TOKENIZER_FILES)} is expected there")
    if path.suffix != ".json":
        return from_spiece(path)
    load_tokenizer(path)  # for its checks
    return Tokenizer.from_file(str(path))


def read_vae(folder: Path) -> tuple[VAEConfig, dict[str, Tensor]]:
    """Sizes and weights (by the names in `make_vae`, float32) of an AutoencoderKL in diffusers' layout.

    Also reads `.bin` files, if of tensors alone, and the attention's weights by their old names (query, key, value,
    proj_attn).

    Raises InputError when the folder holds no such VAE, or one with parts that ours does not have.
    """
    expected = "a diffusers AutoencoderKL is expected there, as sd-vae-ft-ema"
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"no VAE in {folder} ({error}): {expected}") from error
    kind = stored.get("_class_name") if isinstance(stored, dict) else None
    if kind != "AutoencoderKL":
        raise InputError(f"{folder / 'config.json'} describes {kind or 'something else'}: {expected}")
    try:
        loaded: Any = AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=(folder / "diffusion_pytorch_model.safetensors").is_file(),
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and what it calls raise many kinds
        reason = str(error).partition("\n")[0]
        raise InputError(f"the VAE in {folder} cannot be read ({reason}): {expected}; download it again") from error
    vae, report = loaded
    listed = [f"{kind.split('_')[0]}: {', '.join(map(str, names))}" for kind, names in report.items() if names]
    if listed:
        raise InputError(f"the VAE in {folder} does not have the weights its config.json says: {'; '.join(listed)}")
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
    odd = [f"{n} is {vae.config[n]!r}" for n in names if json.dumps(vae.config[n]) != json.dumps(ours.config[n])]
    if odd:
        raise InputError(
            f"the VAE in {folder} is built in another way than Stable Diffusion's ({'; '.join(odd)}): {expected}"
        )
    return config, vae.state_dict()


def with_vae(config: ModelConfig, vae: VAEConfig, folder: Path) -> ModelConfig:
    """`config` with this VAE, whose latents must be those that the model was trained on.

    Raises InputError when their channels, factor or scale are others.
    """
    given, trained = [f"{v.channels} channels, a factor of {v.factor}, a scale of {v.scale}" for v in (vae, config.vae)]
    if given != trained:
        raise InputError(
            f"the VAE in {folder} makes latents with {given}; the model was trained on {trained}: use {VAE_FOLDER}"
        )
    return replace(config, vae=vae)


def _is_weight(key: Any, value: Any) -> bool:
    if not isinstance(key, str) or not isinstance(value, Tensor):
        return False
    return key.endswith("position_ids") or (value.is_floating_point() and value.layout == torch.strided)


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
