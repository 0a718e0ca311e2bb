"""The names in the published checkpoint, and ours for them.

The authors' implementation (github.com/Eureka-Maggie/MIGE) saves `{"state_dict": {key: tensor}}` with torch.save.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mige_rt.config import PRESETS, ModelConfig
from mige_rt.errors import InputError
from trainer.checkpoints.weights import NAMES_SHOWN, differences, our_shapes

SIZES = ("xl", "reduced")  # presets that exist in the published layout

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

    Raises:
        KeyError: `model.pth` does not hold the weight, as those of the VAE.
    """
    for pattern, replacement in RENAMES:
        renamed, fits = re.subn(pattern, replacement, name)
        if fits:
            return renamed
    raise KeyError(name)


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


def check_published(state: Mapping[str, Any], what: str, config: ModelConfig | None = None) -> ModelConfig:
    """Check a published state dict, every key of which must be accounted for.

    Args:
        state: the state dict.
        what: what errors call it.
        config: the sizes; None: the preset of SIZES that it comes closest to.

    Returns:
        The model's sizes.

    Raises:
        InputError: keys are missing, unexpected or wrongly shaped (one message names them all), an entry is no weight,
            or two copies of T5's embedding differ.
    """
    unfit = [key for key, value in state.items() if not _is_weight(key, value)]
    if unfit:
        shown = ", ".join(f"{key} ({kind_of(state[key])})" for key in unfit[:NAMES_SHOWN])
        raise InputError(
            f"{what} has {len(unfit)} entries that are no weights: {shown}; floating-point tensors are expected"
        )
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    expected_embedding, other_embedding = T5_EMBEDDINGS
    if expected_embedding not in shapes and other_embedding in shapes:
        shapes = {expected_embedding if key == other_embedding else key: shape for key, shape in shapes.items()}
    candidates = [config] if config else [PRESETS[name] for name in SIZES]
    compared = [(differences(shapes, published_shapes(c), optional_shapes(c)), c) for c in candidates]
    (count, listed), closest = min(compared, key=lambda entry: entry[0][0])
    if count:
        raise InputError(
            f"{what} does not hold MIGE's weights as published (sizes {closest.name!r}):\n{listed}\n"
            "Use the authors' model.pth, whole and unchanged."
        )
    tables = [state[key] for key in T5_EMBEDDINGS if key in state]
    # Saved together they are one table in the file as well, which need not be read.
    if len(tables) == 2 and tables[0].data_ptr() != tables[1].data_ptr() and not torch.equal(tables[0], tables[1]):
        raise InputError(
            f"{what} holds two tables of T5's embedding that differ, under {' and '.join(T5_EMBEDDINGS)}; they are two "
            "names of one table: use the authors' model.pth, whole and unchanged"
        )
    return closest


def _is_weight(key: Any, value: Any) -> bool:
    if not isinstance(key, str) or not isinstance(value, Tensor):
        return False
    return key.endswith("position_ids") or (value.is_floating_point() and value.layout == torch.strided)


def kind_of(value: Any) -> str:
    """A tensor's dtype, or the type of anything else, as an error names it."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
