"""Classifier-free guidance: which rows of conditions a pair of scales needs, and what each counts for in the sum."""

import math
from dataclasses import dataclass

from mige_rt.errors import InputError


@dataclass(frozen=True)
class Branch:
    """One row of guidance: the conditions it sees, and its weight in the guided prediction."""

    text: bool
    source: bool
    weight: float


def branches(text_scale: float, source_scale: float | None) -> list[Branch]:
    """The branches whose weights are not zero, the least conditioned first; their weights add up to 1.

    source_scale None: subject-driven generation, no branch sees a source (Ho & Salimans, 2022, with a scale of 1
    meaning no guidance). Otherwise text guidance stands on top of source guidance (InstructPix2Pix, Brooks et al.,
    2023, section 3.2.1, which MIGE uses). Raises InputError when a scale is NaN or infinite.
    """
    for name, scale in (("text", text_scale), ("source", source_scale)):
        if scale is not None and not math.isfinite(scale):
            raise InputError(f"the {name} scale is {scale}; a finite number is expected, such as 5")
    # Plain floats: a NumPy float64 would widen the float32 predictions it multiplies.
    s_y = float(text_scale)
    if source_scale is None:
        rows = [Branch(False, False, 1 - s_y), Branch(True, False, s_y)]
    else:
        s_s = float(source_scale)
        rows = [Branch(False, False, 1 - s_s), Branch(False, True, s_s - s_y), Branch(True, True, s_y)]
    return [row for row in rows if row.weight != 0]
