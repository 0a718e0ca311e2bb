"""The model's sizes and defaults, as frozen dataclasses, and a literal table of presets.

What `validate` reads from files is checked against these types: no field is left out, none is unknown.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt

from mige_rt.errors import InputError

Prediction = Literal["epsilon", "v_prediction"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int8-sq"]
QUANTISED: frozenset[str] = frozenset({"int8", "fp8", "int8-sq"})  # bundles whose weights PyTorch does not read
SchedulerName = Literal["dpm_solver_pp_2m", "ddim"]
PositiveInt = Annotated[int, Gt(0)]


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder's ViT (published: EVA-CLIP ViT-g/14)."""

    side: PositiveInt = 224  # pixels
    patch: PositiveInt = 14  # pixels
    width: PositiveInt = 1408
    depth: PositiveInt = 39
    heads: PositiveInt = 16
    mlp: PositiveInt = 6144


@dataclass(frozen=True)
class QFormerConfig:
    """The Q-Former (published: BERT-base with cross-attention in every second layer)."""

    width: PositiveInt = 768
    depth: PositiveInt = 12
    heads: PositiveInt = 12
    mlp: PositiveInt = 3072
    queries: PositiveInt = 32  # image tokens an image
    fusion_heads: PositiveInt = 8


@dataclass(frozen=True)
class TextConfig:
    """The text encoder (published: T5 v1.1 XXL's)."""

    vocabulary: PositiveInt = 32128
    width: PositiveInt = 4096
    head_width: PositiveInt = 64
    mlp: PositiveInt = 10240
    depth: PositiveInt = 24
    heads: PositiveInt = 64


@dataclass(frozen=True)
class DiTConfig:
    """The denoiser (published: PixArt-alpha XL/2 with eight input channels)."""

    width: PositiveInt = 1152
    depth: PositiveInt = 28
    heads: PositiveInt = 16
    mlp: PositiveInt = 4608
    patch: PositiveInt = 2  # latent pixels
    trained_grid: PositiveInt = 32  # patches along a side of the trained size


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder (published: Stable Diffusion's sd-vae-ft-ema)."""

    channels: PositiveInt = 4
    widths: tuple[PositiveInt, ...] = (128, 256, 512, 512)
    layers: PositiveInt = 2  # residual blocks a level
    groups: PositiveInt = 32
    attention: bool = True
    scale: float = 0.18215  # latents times this have about unit variance

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent pixel."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class TaskDefaults:
    """What a task runs with unless told otherwise; image_guidance_scale counts only where there is a source image."""

    num_inference_steps: PositiveInt
    guidance_scale: float
    image_guidance_scale: float


@dataclass(frozen=True)
class Defaults:
    """The defaults of each task (published: the paper's scripts)."""

    subject: TaskDefaults = TaskDefaults(num_inference_steps=50, guidance_scale=7.0, image_guidance_scale=1.0)
    edit: TaskDefaults = TaskDefaults(num_inference_steps=60, guidance_scale=5.0, image_guidance_scale=1.0)
    compose: TaskDefaults = TaskDefaults(num_inference_steps=60, guidance_scale=5.0, image_guidance_scale=1.0)


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
    max_tokens: PositiveInt = 256
    defaults: Defaults = Defaults()

    @property
    def multiple(self) -> int:
        """What the sides of an image must be multiples of, in pixels."""
        return self.dit.patch * self.vae.factor

    @property
    def size(self) -> int:
        """The trained side of an image, in pixels."""
        return self.dit.trained_grid * self.dit.patch * self.vae.factor

    def to_json(self) -> dict[str, Any]:
        """As plain data, for config.json and manifest.json."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: object) -> "ModelConfig":
        """The inverse of `to_json`.

        Raises:
            InputError: Names every field that is unknown, missing, of a wrong type, or does not fit the others.
        """
        from mige_rt.validation import validate

        config = validate(_ConfigFile, {"config": data}, "not a configuration of this model").config
        if broken := [rule for rule, holds in _rules(config).items() if not holds]:
            raise InputError(f"not a configuration of this model: {'; '.join(broken)}, which does not hold")
        return config


@dataclass(frozen=True)
class _ConfigFile:
    """What errors call the configuration."""

    config: ModelConfig


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
            task.num_inference_steps >= 2
            and math.isfinite(task.guidance_scale)
            and math.isfinite(task.image_guidance_scale)
            for task in tasks
        ),
    }


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
    # The default model, trained on two cores: 64 px images, 64 patches.
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
            subject=TaskDefaults(num_inference_steps=20, guidance_scale=1.5, image_guidance_scale=1.0),
            edit=TaskDefaults(num_inference_steps=20, guidance_scale=2.0, image_guidance_scale=1.5),
            compose=TaskDefaults(num_inference_steps=20, guidance_scale=1.0, image_guidance_scale=2.5),
        ),
    ),
}
