"""A LoRA (Hu et al., 2021) and how strongly it counts, as the command line and the Python API take it."""

import math
from dataclasses import dataclass
from pathlib import Path

from mige_rt.errors import InputError, NotAvailableError

LORA_FILE = "lora_weights.safetensors"


@dataclass(frozen=True)
class Lora:
    """A LoRA to merge into a model's weights.

    Attributes:
        path: The file, or the folder that holds LORA_FILE.
        scale: What its change of the weights is multiplied by; 0 leaves them as they are.
    """

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Raises InputError when the scale is not finite."""
        if not math.isfinite(self.scale):
            raise InputError(f"the scale of the LoRA {self.path} is {self.scale}; give a number such as 0.8")

    @staticmethod
    def parse(text: str) -> "Lora":
        """Read FILE or FILE:SCALE; a file of that whole name comes first.

        Raises:
            InputError: The scale is not finite.
        """
        path, colon, scale = text.rpartition(":")
        if not (path and colon) or Path(text).exists():
            return Lora(Path(text))
        try:
            number = float(scale)
        except ValueError:  # the colon of a drive, as in C:/lora
            return Lora(Path(text))
        return Lora(Path(path), number)

    @property
    def file(self) -> Path:
        """The file itself."""
        return self.path / LORA_FILE if self.path.is_dir() else self.path

    def __str__(self) -> str:
        return f"{self.path}:{self.scale:g}"


def require_pytorch(engine: str) -> None:
    """Check that an engine takes LoRAs.

    Raises:
        NotAvailableError: It does not.
    """
    if engine != "pytorch":
        raise NotAvailableError(
            f"the engine {engine} runs exported graphs, whose weights are fixed: merge the LoRA with "
            "mige-rt export --lora FILE --out BUNDLE and run that bundle, or use the engine pytorch"
        )
