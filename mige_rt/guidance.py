"""Classifier-free guidance: the branches that a pair of scales needs, and the weight of each."""

import math
from dataclasses import dataclass

from mige_rt.errors import InputError


@dataclass(frozen=True)
class Branch:
    """One branch of guidance: the conditions that it sees, and its weight in the guided prediction."""

    text: bool
    source: bool
    weight: float


def branches(guidance_scale: float, image_guidance_scale: float | None) -> list[Branch]:
    """The branches whose weights are not zero, the least conditioned first; their weights add up to 1.

    Args:
        guidance_scale: s_y, of the text. 1 means no guidance (Ho & Salimans, 2022).
        image_guidance_scale: s_s, of the source. Text guidance stands on top of source guidance (InstructPix2Pix,
            Brooks et al., 2023, section 3.2.1, which MIGE uses). None: subject-driven generation, no branch sees a
            source.

    Raises:
        InputError: A scale is NaN or infinite.
    """
    for name, scale in (("guidance scale", guidance_scale), ("image guidance scale", image_guidance_scale)):
        if scale is not None and not math.isfinite(scale):
            raise InputError(f"the {name} is {scale}; a finite number is expected, such as 5")
    # Plain floats: a NumPy float64 would widen the float32 predictions it multiplies.
    s_y = float(guidance_scale)
    if image_guidance_scale is None:
        candidates = [Branch(False, False, 1 - s_y), Branch(True, False, s_y)]
    else:
        s_s = float(image_guidance_scale)
        candidates = [Branch(False, False, 1 - s_s), Branch(False, True, s_s - s_y), Branch(True, True, s_y)]
    return [branch for branch in candidates if branch.weight != 0]
