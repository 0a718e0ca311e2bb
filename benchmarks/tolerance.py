"""What two engines may differ by, and one figure judged by it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from export import validate

# Least structural similarity of the pictures. Measured on the default model on a CPU, the lowest of 24 pictures of 20
# steps: fp32 1.0000, fp16 0.9995, bf16 0.9970, int8 0.9964.
SIMILARITY: Mapping[str, float] = {"fp32": 0.999, "fp16": 0.99, "bf16": 0.95, "int8": 0.95}


@dataclass(frozen=True)
class Tolerance:
    """What two engines may differ by: relative RMS errors at most, PSNR (dB) and structural similarity at least."""

    graph: float
    latents: float
    psnr: float
    similarity: float


def tolerance(*precisions: str) -> Tolerance:
    """The widest of some precisions' tolerances: those that exports are validated by (`export.validate`), and
    SIMILARITY."""
    return Tolerance(
        max(validate.TOLERANCES[precision] for precision in precisions),
        max(validate.LATENT_TOLERANCES[precision] for precision in precisions),
        min(validate.MIN_PSNR[precision] for precision in precisions),
        min(SIMILARITY[precision] for precision in precisions),
    )


@dataclass(frozen=True)
class Figure:
    """The worst of one figure over all pictures.

    allowed: the limit in words, empty where the figure is shown and not judged; at: the picture that it is of.
    """

    what: str
    value: float
    text: str
    allowed: str
    at: str
    ok: bool

    @property
    def judged(self) -> str:
        """In a word."""
        return "" if not self.allowed else "ok" if self.ok else "FAILED"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "value": finite(self.value)}


def at_most(what: str, value: float, at: str, limit: float) -> Figure:
    """A relative error."""
    text = f"{value:.1e}" if isfinite(value) else "not finite"
    return Figure(what, value, text, f"at most {limit:.2g}", at, value <= limit)


def at_least(what: str, value: float, at: str, limit: float, text: str) -> Figure:
    return Figure(what, value, text, f"at least {limit:g}", at, value >= limit)


def shown(what: str, value: float, at: str) -> Figure:
    """A figure that is not judged."""
    return Figure(what, value, f"{value:g}", "", at, True)


def finite(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return value if isfinite(value) else None
