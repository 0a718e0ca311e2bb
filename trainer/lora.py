"""LoRA (Hu et al., 2021) by peft: which layers of the model are adapted, and the file that comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from trainer.checkpoints.lora_file import MAX_RANK, SCHEMA, LoraDescription, norm_of, save_lora

# The projections of the DiT's self-attention and cross-attention, whose keys and values the conditioner computes.
DEFAULT_TARGETS = ("attn", "cross_attn", "kv_linears")
FROZEN = ("vae_encoder", "vae_decoder", "image_encoder.vision")  # whose outputs are computed once


@dataclass(frozen=True)
class LoraOptions:
    """Which layers are adapted, and how.

    Attributes:
        rank: Of each layer's change.
        alpha: The change is alpha / rank * B A. None: the rank.
        targets: Names of layers or of modules whose linear layers are all adapted: whole names or parts of them, from
            dot to dot, such as `qkv`, `denoiser.blocks.0` or `image_encoder.fusion`.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = DEFAULT_TARGETS

    def check(self) -> None:
        """Raises InputError when no model can be adapted so."""
        if not 1 <= self.rank <= MAX_RANK:
            raise InputError(f"the LoRA's rank is {self.rank}; 1 to {MAX_RANK} are expected")
        if self.alpha is not None and not 0 < self.alpha <= 1e6:
            raise InputError(f"the LoRA's alpha is {self.alpha}; a number above 0 is expected, by default the rank")
        if not self.targets:
            raise InputError("no target was given; name layers such as attn, or leave the targets out")


def adapted_layers(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The linear layers that targets name, in the model's order.

    Args:
        model: All of it, or what is trained of it.
        targets: See `LoraOptions`.

    Raises:
        InputError: A target names none; with the nearest name.
    """
    # Not of subclasses: nn.MultiheadAttention reads its projection's weight and never calls it.
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    names = [name for name in names if not any(_names(frozen, name) for frozen in FROZEN)]
    for target in targets:
        if not any(_names(target, name) for name in names):
            raise InputError(f"the target {target!r} names no linear layer that is trained{_nearest(target, names)}")
    return [name for name in names if any(_names(target, name) for target in targets)]


def add_lora(module: nn.Module, config: ModelConfig, options: LoraOptions, prompt: str | None) -> LoraDescription:
    """Freeze a model, and put LoRA layers, whose change is zero, around the adapted ones.

    Args:
        module: All of the model, or what is trained of it, with its weights; changed in place.
        config: Its sizes.
        options: Which layers.
        prompt: For the description.

    Returns:
        The LoRA's description.

    Raises:
        InputError: The options are not possible, or a target names no layer.
    """
    options.check()
    layers = adapted_layers(module, options.targets)
    alpha = float(options.rank if options.alpha is None else options.alpha)
    norms = {layer: norm_of(module.get_parameter(f"{layer}.weight")) for layer in layers}
    module.requires_grad_(False)
    scaled: Any = alpha  # which peft divides by the rank, and says is an integer
    inject_adapter_in_model(LoraConfig(r=options.rank, lora_alpha=scaled, target_modules=layers), module)
    for parameter in lora_parameters(module):
        parameter.data = parameter.data.float()  # also where the model's weights are bfloat16
    return LoraDescription(SCHEMA, config, options.rank, alpha, tuple(options.targets), norms, prompt)


def lora_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What is trained of a model with LoRA layers."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def save_adapted(path: Path, module: nn.Module, description: LoraDescription) -> None:
    """Write the LoRA of a model that `add_lora` has changed.

    Raises:
        InputError: The file cannot be written.
    """
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(module)
    factors = {
        layer: (state[f"{layer}.lora_A.weight"].cpu(), state[f"{layer}.lora_B.weight"].cpu())
        for layer in description.norms
    }
    save_lora(path, description, factors)


def _names(target: str, layer: str) -> bool:
    return f".{target}." in f".{layer}."


def _nearest(target: str, layers: Sequence[str]) -> str:
    """What an unknown target may have meant, as the end of a sentence."""
    parts = dict.fromkeys(part for layer in layers for part in (*layer.split("."), layer) if not part.isdigit())
    if nearest := get_close_matches(target, parts, n=1, cutoff=0.5):
        return f"; did you mean {nearest[0]}?"
    return f"; there are {', '.join(part for part in parts if '.' not in part)}"
