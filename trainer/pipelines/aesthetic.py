"""LAION's aesthetic predictor (Schuhmann et al., 2022): a head on the unit vectors of CLIP ViT-L/14."""

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from mige_rt.errors import InputError
from trainer.vision_models import Clip

_LAYER = re.compile(r"layers\.(\d+)\.weight")


def load_head(path: Path) -> nn.Sequential:
    """The head in a file: the one linear layer of the first predictor, or the linear layers of the improved one.

    Neither has a non-linearity: the improved one's dropout between its layers does nothing in use.

    Args:
        path: .safetensors, or .pth, of which tensors alone are read.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            tensors: Any = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the readers raise nearly anything
        raise InputError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error
    numbers = sorted(int(match[1]) for name in tensors if (match := _LAYER.fullmatch(str(name))))
    prefixes = [f"layers.{number}." for number in numbers] or [""]
    names = {f"{prefix}{kind}" for prefix in prefixes for kind in ("weight", "bias")}
    if set(tensors) != names:
        raise InputError(f"{path} is no aesthetic head: it holds {', '.join(sorted(map(str, tensors))[:5])}")
    layers: list[nn.Module] = []
    for prefix in prefixes:
        weight, bias = tensors[f"{prefix}weight"].float(), tensors[f"{prefix}bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(False)


class LaionAesthetic:
    """See `roles.AestheticScorer`."""

    def __init__(self, clip: Clip, head: Path) -> None:
        """Raises InputError where the head is for vectors of another length than this CLIP's."""
        self._clip, self._head = clip, load_head(head)
        wanted = self._head[0].in_features
        if wanted != clip.dimensions:
            raise InputError(
                f"{head} is for vectors of {wanted} numbers, and those of this CLIP have {clip.dimensions}; LAION's "
                "heads are for openai/clip-vit-large-patch14"
            )

    @torch.inference_mode()
    def score(self, image: Image.Image) -> float:
        """See `roles.AestheticScorer`."""
        return float(self._head(torch.from_numpy(self._clip.embed_images([image])))[0, 0])
