"""The model's sizes and defaults, as frozen dataclasses, and a literal table of presets.

What `validate` reads from files is checked against these types: no field is left out, none is unknown, and none is
larger than its type says. The bounds are several times the published sizes, and far below those that no machine has
memory for.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le, MaxLen

from mige_rt.errors import InputError

Prediction = Literal["epsilon", "v_prediction"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int8-sq"]
QUANTISED: frozenset[str] = frozenset({"int8", "fp8", "int8-sq"})  # bundles whose weights PyTorch does not read
SchedulerName = Literal["dpm_solver_pp_2m", "ddim"]
PositiveInt = Annotated[int, Gt(0)]
LONGEST_TEXT = 500  # characters of a name or a description in a file

Depth = Annotated[int, Gt(0), Le(256)]  # layers of one kind
Heads = Annotated[int, Gt(0), Le(256)]  # of attention, and groups of a norm
Width = Annotated[int, Gt(0), Le(16_384)]  # channels of a layer
Hidden = Annotated[int, Gt(0), Le(65_536)]  # channels inside of a feed-forward layer
Patch = Annotated[int, Gt(0), Le(64)]  # along a side
Steps = Annotated[int, Gt(0), Le(1000)]  # the timesteps that the models were trained with


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder's ViT (published: EVA-CLIP ViT-g/14)."""

    side: Annotated[int, Gt(0), Le(2048)] = 224  # pixels
    patch: Patch = 14  # pixels
    width: Width = 1408
    depth: Depth = 39
    heads: Heads = 16
    mlp: Hidden = 6144


@dataclass(frozen=True)
class QFormerConfig:
    """The Q-Former (published: BERT-base with cross-attention in every second layer)."""

    width: Width = 768
    depth: Depth = 12
    heads: Heads = 12
    mlp: Hidden = 3072
    queries: Annotated[int, Gt(0), Le(1024)] = 32  # image tokens an image
    fusion_heads: Heads = 8


@dataclass(frozen=True)
class TextConfig:
    """The text encoder (published: T5 v1.1 XXL's)."""

    vocabulary: Annotated[int, Gt(0), Le(1_048_576)] = 32128
    width: Width = 4096
    head_width: Width = 64
    mlp: Hidden = 10240
    depth: Depth = 24
    heads: Heads = 64


@dataclass(frozen=True)
class DiTConfig:
    """The denoiser (published: PixArt-alpha XL/2 with eight input channels)."""

    width: Width = 1152
    depth: Depth = 28
    heads: Heads = 16
    mlp: Hidden = 4608
    patch: Patch = 2  # latent pixels
    trained_grid: Annotated[int, Gt(0), Le(512)] = 32  # patches along a side of the trained size


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder (published: Stable Diffusion's sd-vae-ft-ema)."""

    channels: Annotated[int, Gt(0), Le(128)] = 4
    widths: Annotated[tuple[Width, ...], MaxLen(8)] = (128, 256, 512, 512)
    layers: Annotated[int, Gt(0), Le(16)] = 2  # residual blocks a level
    groups: Heads = 32
    attention: bool = True
    scale: float = 0.18215  # latents times this have about unit variance

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent pixel."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class TaskDefaults:
    """What a task runs with unless told otherwise; image_guidance_scale counts only where there is a source image."""

    num_inference_steps: Steps
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

    name: Annotated[str, MaxLen(LONGEST_TEXT)]
    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig()
    text: TextConfig = TextConfig()
    dit: DiTConfig = DiTConfig()
    vae: VAEConfig = VAEConfig()
    prediction: Prediction = "epsilon"
    learned_variance: bool = True
    max_tokens: Annotated[int, Gt(0), Le(4096)] = 256
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
        "the name is printable": config.name.isprintable(),
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
        qformer=QFormerConfig(width=192, depth=2, heads=6, mlp=576, queries=32, fusion_heads=6),
        text=TextConfig(vocabulary=1024, width=192, head_width=32, mlp=512, depth=3, heads=6),
        dit=DiTConfig(width=192, depth=6, heads=6, mlp=768, trained_grid=8),
        vae=VAEConfig(channels=8, widths=(24, 48, 64), layers=1, groups=8, attention=False, scale=1.0),
        prediction="v_prediction",
        learned_variance=False,
        defaults=Defaults(
            subject=TaskDefaults(num_inference_steps=4, guidance_scale=2.0, image_guidance_scale=1.0),
            edit=TaskDefaults(num_inference_steps=8, guidance_scale=2.0, image_guidance_scale=1.5),
            compose=TaskDefaults(num_inference_steps=4, guidance_scale=1.5, image_guidance_scale=1.0),
        ),
    ),
}
