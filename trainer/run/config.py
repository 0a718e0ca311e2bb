"""A run's config file: YAML, checked against these types."""

import dataclasses
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen

from mige_rt.config import PRESETS, ModelConfig, PositiveInt
from mige_rt.errors import InputError
from mige_rt.validation import validate
from trainer.data.mixing import Source
from trainer.settings import NonNegativeInt, Seed, StageSettings

RATE_BATCH = 256  # the batch that `base_rate` is for; the authors' code scales it by sqrt(batch / 256)
LARGEST_BATCH = 1_000_000

Component = Literal["image_encoder", "text_encoder", "conditioner", "denoiser"]


@dataclass(frozen=True)
class Start:
    """Where the weights come from: a MIGE checkpoint, or the models that the published run started from.

    Attributes:
        model: A model folder, a bundle, the published model.pth, or tiny, the model that comes with mige-rt. If given,
            it is all that is.
        pixart: PixArt-alpha's .pth, trained at the size of the run.
        blip2: BLIP-2's .pth, pretrained with Flan-T5-XXL.
        eva_clip: EVA-CLIP ViT-g's .pth.
        t5: Folder of T5 v1.1 XXL in Hugging Face's layout, with its tokenizer.
        vae: Folder of the VAE, in diffusers' layout.
    """

    model: str | None = None
    pixart: str | None = None
    blip2: str | None = None
    eva_clip: str | None = None
    t5: str | None = None
    vae: str | None = None


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written, and which are kept.

    Attributes:
        every: Steps between two of them.
        total_limit: How many of the latest are kept, beside the best one; None: all.
    """

    every: PositiveInt
    total_limit: PositiveInt | None = None


@dataclass(frozen=True)
class LogSettings:
    """What is written about the run.

    Attributes:
        every: Steps between two lines of metrics.jsonl.
        tensorboard: Write the same for TensorBoard.
    """

    every: PositiveInt
    tensorboard: bool


@dataclass(frozen=True)
class ValidationSettings:
    """What the run is judged by, at each checkpoint and in between.

    Attributes:
        path: A folder that `mige-rt prepare` made, of samples that are not trained on.
        every: Steps between two validations.
        batches: Batches of `micro_batch` samples whose loss is measured, of all processes.
        images: How many of the first samples an image is made for.
        num_inference_steps: Of each image.
    """

    path: str
    every: PositiveInt
    batches: PositiveInt = 16
    images: Annotated[int, Ge(0), Le(64)] = 8
    num_inference_steps: Annotated[int, Ge(2), Le(1000)] = 20

    @property
    def source(self) -> Source:
        """The samples, as training reads them."""
        return Source(self.path)


@dataclass(frozen=True)
class RunConfig:
    """A config file's content.

    Attributes:
        model: A key of mige_rt.config.PRESETS, the sizes.
        start: Where the weights come from.
        sources: Prepared sets and how they are mixed.
        trained: The components that are trained, besides which the VAE and the ViT never are.
        steps: Number of optimiser steps.
        batch: Samples in a step, of all processes.
        micro_batch: Samples that a process takes at once; what is left of the batch is accumulated.
        base_rate: Learning rate at a batch of RATE_BATCH; it is scaled by the root of the batch.
        warmup: Steps over which the rate rises; then it is constant.
        weight_decay: AdamW's weight decay.
        epsilon: AdamW's epsilon.
        clip: Largest norm of the gradient.
        ema: Decay per step of the weights' moving average; None: none is kept.
        spike: A step is skipped where its loss is this many times the mean; None: only where it is not finite.
        seed: Of the order of the data, of noise, and of weights that no file has.
        precision: Of the computation; weights, gradients, and optimiser are float32.
        distributed: How several processes share the work: each has the whole model (ddp), or a part of it (fsdp2).
        reshard: With fsdp2: also gather weights anew in the backward pass (as ZeRO-3), or keep them (as ZeRO-2).
        activation_checkpointing: Compute each layer's activations again in the backward pass.
        compile: Backend of torch.compile for each layer, such as inductor; None: not compiled.
        checkpoints: When they are written.
        log: What is written about the run.
        validation: What it is judged by; None: by the loss of what it trains on.
    """

    model: str
    start: Start
    sources: Annotated[tuple[Source, ...], MinLen(1)]
    trained: Annotated[tuple[Component, ...], MinLen(1)]
    steps: PositiveInt
    batch: Annotated[int, Gt(0), Le(LARGEST_BATCH)]
    micro_batch: Annotated[int, Gt(0), Le(LARGEST_BATCH)]
    base_rate: Annotated[float, Gt(0)]
    warmup: NonNegativeInt
    weight_decay: Annotated[float, Ge(0)]
    epsilon: Annotated[float, Gt(0)]
    clip: Annotated[float, Gt(0)]
    seed: Seed
    precision: Literal["fp32", "bf16"]
    distributed: Literal["ddp", "fsdp2"]
    reshard: bool
    activation_checkpointing: bool
    checkpoints: CheckpointSettings
    log: LogSettings
    ema: Annotated[float, Ge(0), Lt(1)] | None = None
    spike: Annotated[float, Gt(1)] | None = None
    compile: str | None = None
    validation: ValidationSettings | None = None

    @property
    def sizes(self) -> ModelConfig:
        """The model's."""
        return PRESETS[self.model]

    @property
    def rate(self) -> float:
        """The learning rate after warm-up."""
        return self.base_rate * math.sqrt(self.batch / RATE_BATCH)

    def accumulation(self, processes: int) -> int:
        """Batches whose gradients each process adds up in a step.

        Raises:
            InputError: The batch does not divide.
        """
        at_once = self.micro_batch * processes
        if self.batch % at_once:
            below, above = self.batch // at_once * at_once, -(-self.batch // at_once) * at_once
            nearest = " or ".join(str(batch) for batch in (below, above) if batch)
            raise InputError(
                f"batch is {self.batch}, which {processes} processes of micro_batch {self.micro_batch} do not divide: "
                f"give a multiple of {at_once}, such as {nearest}, or another micro_batch"
            )
        return self.batch // at_once

    def optimisation(self, processes: int) -> StageSettings:
        """How to optimise, as the loop wants it."""
        return StageSettings(
            steps=self.steps,
            batch=self.batch // processes,
            rate=self.rate,
            warmup=self.warmup,
            decay=0,
            weight_decay=self.weight_decay,
            epsilon=self.epsilon,
            clip=self.clip,
            ema=self.ema or 0.0,
            seed=self.seed,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def load_run_config(path: Path) -> RunConfig:
    """Read a config file.

    Args:
        path: A YAML file as in trainer/configs.

    Raises:
        InputError: The file cannot be read, or the message names what is unknown, missing or wrong in it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, expected the keys of a run, as in trainer/configs")
    config = validate(RunConfig, content, str(path))
    if config.model not in PRESETS:
        raise InputError(f"{path}: model is {config.model!r}, expected one of {', '.join(PRESETS)}")
    _check_start(config.start, path)
    if len(set(config.trained)) < len(config.trained):
        raise InputError(f"{path}: trained names a component twice: {', '.join(config.trained)}")
    return config


def with_total_limit(config: RunConfig, total_limit: int) -> RunConfig:
    """The same, but keep this many of the latest checkpoints."""
    return replace(config, checkpoints=replace(config.checkpoints, total_limit=total_limit))


def _check_start(start: Start, path: Path) -> None:
    pretrained = {name: value for name, value in vars(start).items() if name != "model"}
    missing = [name for name, value in pretrained.items() if value is None]
    if start.model is not None and len(missing) < len(pretrained):
        raise InputError(f"{path}: start has a model and {', '.join(set(pretrained) - set(missing))}; give either")
    if start.model is None and missing:
        raise InputError(
            f"{path}: start lacks {', '.join(missing)}; give either model, a MIGE checkpoint, or all of "
            f"{', '.join(pretrained)}"
        )
