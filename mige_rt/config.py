"""The model's sizes and defaults, as frozen dataclasses, and a literal table of presets."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mige_rt.errors import InputError

Prediction = Literal["epsilon", "v_prediction"]
Solver = Literal["dpm_solver_pp_2m", "ddim"]


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder's ViT (published: EVA-CLIP ViT-g/14)."""

    side: int = 224  # pixels
    patch: int = 14  # pixels
    width: int = 1408
    depth: int = 39
    heads: int = 16
    mlp: int = 6144


@dataclass(frozen=True)
class QFormerConfig:
    """The Q-Former (published: BERT-base with cross-attention in every second layer)."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    queries: int = 32  # image tokens a picture
    fusion_heads: int = 8


@dataclass(frozen=True)
class TextConfig:
    """The text encoder (published: T5 v1.1 XXL's)."""

    vocabulary: int = 32128
    width: int = 4096
    head_width: int = 64
    mlp: int = 10240
    depth: int = 24
    heads: int = 64


@dataclass(frozen=True)
class DiTConfig:
    """The denoiser (published: PixArt-alpha XL/2 with eight input channels)."""

    width: int = 1152
    depth: int = 28
    heads: int = 16
    mlp: int = 4608
    patch: int = 2  # latent pixels
    trained_grid: int = 32  # patches along a side of the trained size


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder (published: Stable Diffusion's sd-vae-ft-ema)."""

    channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2  # residual blocks a level
    groups: int = 32
    attention: bool = True
    scale: float = 0.18215  # latents times this have about unit variance

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent pixel."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class TaskDefaults:
    """What a task runs with unless told otherwise. source_scale counts only where there is a source picture."""

    steps: int
    text_scale: float
    source_scale: float


@dataclass(frozen=True)
class Defaults:
    """The defaults of each task (published: the paper's scripts)."""

    subject: TaskDefaults = TaskDefaults(steps=50, text_scale=7.0, source_scale=1.0)
    edit: TaskDefaults = TaskDefaults(steps=60, text_scale=5.0, source_scale=1.0)
    compose: TaskDefaults = TaskDefaults(steps=60, text_scale=5.0, source_scale=1.0)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes of MIGE's weights, and how its prediction is read."""

    name: str
    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig()
    text: TextConfig = TextConfig()
    dit: DiTConfig = DiTConfig()
    vae: VAEConfig = VAEConfig()
    prediction: Prediction = "epsilon"
    learned_variance: bool = True
    max_tokens: int = 256
    defaults: Defaults = Defaults()

    @property
    def multiple(self) -> int:
        """What the sides of a picture must be multiples of, in pixels."""
        return self.dit.patch * self.vae.factor

    @property
    def size(self) -> int:
        """The trained side of a picture, in pixels."""
        return self.dit.trained_grid * self.dit.patch * self.vae.factor

    def to_json(self) -> dict[str, Any]:
        """As plain data, for config.json and manifest.json."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_json`.

        Raises InputError that names every field that is unknown, missing, of a wrong type, or does not fit the others.
        """
        wrong: list[str] = []
        config = _read(ModelConfig, data, "config", wrong)
        if not wrong:
            wrong = [f"{what} does not hold" for what, holds in _rules(config).items() if not holds]
        if wrong:
            raise InputError(f"not a configuration of this model: {'; '.join(wrong)}")
        return config


def _rules(config: ModelConfig) -> dict[str, bool]:
    """What must hold between the sizes, in words."""
    vision, qformer, text, dit, vae = config.vision, config.qformer, config.text, config.dit, config.vae
    tasks = (config.defaults.subject, config.defaults.edit, config.defaults.compose)
    return {
        "vision.side is a multiple of vision.patch": vision.side % vision.patch == 0,
        "vision.width is a multiple of vision.heads": vision.width % vision.heads == 0,
        "qformer.width is a multiple of qformer.heads and qformer.fusion_heads": qformer.width % qformer.heads == 0
        and qformer.width % qformer.fusion_heads == 0,
        "dit.width is a multiple of dit.heads and of 4": dit.width % dit.heads == 0 and dit.width % 4 == 0,
        "vae.widths are multiples of vae.groups": bool(vae.widths) and all(w % vae.groups == 0 for w in vae.widths),
        "vae.scale is a finite number above 0": math.isfinite(vae.scale) and vae.scale > 0,
        "text.vocabulary holds the special tokens": text.vocabulary > 2,
        "defaults have 2 steps or more and finite scales": all(
            task.steps >= 2 and math.isfinite(task.text_scale) and math.isfinite(task.source_scale) for task in tasks
        ),
    }


_SECTIONS = {
    "vision": VisionConfig,
    "qformer": QFormerConfig,
    "text": TextConfig,
    "dit": DiTConfig,
    "vae": VAEConfig,
    "defaults": Defaults,
    "subject": TaskDefaults,
    "edit": TaskDefaults,
    "compose": TaskDefaults,
}


def _read(kind: type[Any], data: Any, where: str, wrong: list[str]) -> Any:
    """A section of the configuration; what is wrong with it is added to `wrong`, and None returned."""
    if not isinstance(data, dict):
        wrong.append(f"{where} is a {type(data).__name__} instead of an object")
        return None
    fields = {field.name: field for field in dataclasses.fields(kind)}
    before = len(wrong)
    wrong += [f"unknown {where}.{name}" for name in data if name not in fields]
    wrong += [f"missing {where}.{name}" for name in fields if name not in data]
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in fields:
            continue
        if name in _SECTIONS:
            values[name] = _read(_SECTIONS[name], value, f"{where}.{name}", wrong)
            continue
        expected = fields[name].type
        if name == "prediction":
            accepted = value in get_args(Prediction)
        elif name == "widths":
            accepted = isinstance(value, list | tuple) and all(type(width) is int and width > 0 for width in value)
            value = tuple(value) if accepted else value
        else:
            accepted = type(value) is expected and (expected is not int or value > 0)
        if not accepted:
            wrong.append(f"{where}.{name} is {value!r}")
        values[name] = value
    return kind(**values) if len(wrong) == before else None


PRESETS: dict[str, ModelConfig] = {
    # The published sizes (paper, section 4.1).
    "xl": ModelConfig(name="xl"),
    # The sizes of the golden data that the fidelity check runs on.
    "reduced": ModelConfig(
        name="reduced",
        vision=VisionConfig(depth=2),
        qformer=QFormerConfig(depth=2),
        text=TextConfig(vocabulary=384, width=64, head_width=16, mlp=128, depth=2, heads=4),
        dit=DiTConfig(depth=2),
    ),
    # The default model, trained on two cores: 64 px pictures, 64 patches.
    "tiny": ModelConfig(
        name="tiny",
        vision=VisionConfig(side=64, patch=8, width=192, depth=4, heads=6, mlp=576),
        qformer=QFormerConfig(width=192, depth=2, heads=6, mlp=576, queries=16, fusion_heads=6),
        text=TextConfig(vocabulary=1024, width=192, head_width=32, mlp=512, depth=3, heads=6),
        dit=DiTConfig(width=192, depth=6, heads=6, mlp=768, trained_grid=8),
        vae=VAEConfig(channels=8, widths=(24, 48, 64), layers=1, groups=8, attention=False, scale=1.0),
        prediction="v_prediction",
        learned_variance=False,
        defaults=Defaults(
            subject=TaskDefaults(steps=20, text_scale=1.5, source_scale=1.0),
            edit=TaskDefaults(steps=20, text_scale=2.0, source_scale=1.5),
            compose=TaskDefaults(steps=20, text_scale=1.0, source_scale=2.5),
        ),
    ),
}
