"""Fine-tuning a model by LoRA on a few images, on one device."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import SchedulerType, get_scheduler
from torch import Tensor, nn

from engines.pytorch import torch_device
from mige_rt.atomic import check_folder
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError, reason
from mige_rt.lora import LORA_FILE
from mige_rt.scheduler import TRAIN_STEPS
from mige_rt.tokenizer import Tokenize, load_tokenizer
from trainer.checkpoints.model_folder import COMPONENTS
from trainer.checkpoints.open_checkpoint import CheckpointLocation, open_checkpoint
from trainer.checkpoints.weights import Checkpoint
from trainer.data.batches import TrainingBatch, collate
from trainer.data.encode import Encoders, encode_samples, load_encoders
from trainer.data.manifest import ManifestSample
from trainer.data.prepared import PreparedSample
from trainer.data.tar_images import open_sample_image
from trainer.loop import Float32Attention, Task, Trained, make_optimiser, optimisation_steps
from trainer.lora import LoraOptions, adapted_layers, add_lora, lora_parameters, save_adapted
from trainer.objective import sample_losses
from trainer.settings import LARGEST_SEED, StageSettings
from trainer.stages.trained_part import TrainedPart

ENCODED_AT_ONCE = 8  # images
SHOWN_EVERY = 10  # steps
WEIGHT_DECAY, EPSILON = 1e-2, 1e-8  # AdamW's, as in diffusers' training scripts
SCHEDULERS = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]  # it needs rules
MixedPrecision = Literal["no", "bf16"]
OnProgress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


@dataclass(frozen=True, kw_only=True)
class FineTuningOptions:
    """How a LoRA is trained; the names are those of diffusers' training scripts.

    Attributes:
        max_train_steps: Optimiser steps.
        train_batch_size: Samples in a batch.
        gradient_accumulation_steps: Batches in a step.
        learning_rate: AdamW's, after the warm-up.
        lr_scheduler: How it goes on, one of diffusers' names.
        lr_warmup_steps: Steps over which it rises, with any scheduler but `constant`.
        max_grad_norm: Largest norm of the gradient.
        mixed_precision: `bf16`: the model's weights are bfloat16, and the LoRA's float32.
        device: cpu, cuda, cuda:1, or auto: cuda where there is a GPU.
        seed: Of every random draw. On a CPU the same seed gives the same file.
    """

    max_train_steps: int = 500
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    mixed_precision: MixedPrecision = "no"
    device: str = "auto"
    seed: int = 0

    def check(self) -> None:
        """Raises InputError when one of them is impossible."""
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"{name} is {value}; 1 or more is expected")
        if self.lr_warmup_steps < 0:
            raise InputError(f"lr_warmup_steps is {self.lr_warmup_steps}; 0 or more is expected")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"seed is {self.seed}; 0 to {LARGEST_SEED} is expected")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise InputError(f"{name} is {value}; a number above 0 is expected")
        if self.lr_scheduler not in SCHEDULERS:
            raise InputError(f"lr_scheduler is {self.lr_scheduler!r}; one of {', '.join(SCHEDULERS)} is expected")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:  # diffusers' has no warm-up
            raise InputError(
                f"lr_warmup_steps is {self.lr_warmup_steps}, and the lr_scheduler constant does not warm up; give the "
                "lr_scheduler constant_with_warmup, or no warm-up"
            )
        if self.mixed_precision not in get_args(MixedPrecision):
            raise InputError(f"mixed_precision is {self.mixed_precision!r}; no or bf16 is expected")

    def optimisation(self) -> StageSettings:
        """How to optimise, as the loop wants it; its rate is scheduled by `lr_scheduler`."""
        return StageSettings(
            steps=self.max_train_steps,
            batch=self.train_batch_size,
            rate=self.learning_rate,
            warmup=0,
            decay=0,
            weight_decay=WEIGHT_DECAY,
            epsilon=EPSILON,
            clip=self.max_grad_norm,
            ema=0.0,
            seed=self.seed,
        )


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tuning gave.

    Attributes:
        path: The LoRA's file.
        layers: How many layers it adapts.
        parameters: How many numbers were trained.
        losses: Of each step.
    """

    path: Path
    layers: int
    parameters: int
    losses: list[float]


def train_lora(
    model: CheckpointLocation,
    samples: Sequence[ManifestSample],
    out: Path,
    lora: LoraOptions = LoraOptions(),  # noqa: B008, frozen
    options: FineTuningOptions = FineTuningOptions(),
    *,
    on_progress: OnProgress | None = None,
) -> FineTuned:
    """Fine-tune a model by LoRA, and write the folder `out` with `lora_weights.safetensors`.

    The samples' features are computed once and stay in memory: this is for some hundred samples, not for datasets.

    Args:
        model: A model folder, a bundle with unquantised weights, or the published checkpoint.
        samples: At least one.
        out: The folder; made where it is not there.
        lora: Which layers are adapted.
        options: How they are trained.
        on_progress: Gets what is being done, how many steps are done, and how many there are.

    Raises:
        InputError: The model, an image or an option cannot be used, `out` holds a LoRA already, or the training does
            not converge. No LoRA is written then.
    """
    lora.check()
    options.check()
    device = torch_device(options.device)
    path = out / LORA_FILE
    if path.exists():
        raise InputError(f"{path} exists already; give another folder, or remove it first")
    checkpoint = open_checkpoint(model)
    adapted_layers(checkpoint.empty(), lora.targets)  # for its errors, before anything takes long
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_folder(out)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"{out} cannot be written ({reason(error)}); give a folder of your own") from error
    tokenize = _tokenizer(checkpoint)
    prepared = _prepare(load_encoders(model, device), samples)
    dtype = torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32
    module = TrainedPart(checkpoint.load(COMPONENTS, dtype=dtype, device=device))
    del module.image_encoder.vision.encoder, module.image_encoder.vision.embeddings  # whose features are there
    prompts = {sample.prompt for sample in samples}
    torch.manual_seed(options.seed)
    description = add_lora(module, checkpoint.config, lora, prompts.pop() if len(prompts) == 1 else None)
    batches = _Batches(prepared, checkpoint.config, tokenize, options)
    losses = _train(module, batches, options, on_progress)
    save_adapted(path, module, description)
    parameters = sum(parameter.numel() for parameter in lora_parameters(module))
    return FineTuned(path, len(description.norms), parameters, losses)


def _tokenizer(checkpoint: Checkpoint) -> Tokenize:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        checkpoint.save_tokenizer(path)
        return load_tokenizer(path)


def _prepare(encoders: Encoders, samples: Sequence[ManifestSample]) -> list[PreparedSample]:
    """The samples' features. Raises InputError when an image cannot be read."""
    paths = dict.fromkeys(path for sample in samples for path in sample.paths())
    images = {path: open_sample_image(path) for path in paths}
    opened = [(sample, {path: images[path] for path in sample.paths()}) for sample in samples]
    files = encode_samples(encoders, opened, ENCODED_AT_ONCE)
    return [PreparedSample.of(file["json"], file["latents.npy"], file.get("vit.npy")) for file in files]


@dataclass(frozen=True)
class _Batches:
    """Batches without end: all samples in random order, again and again."""

    samples: Sequence[PreparedSample]
    config: ModelConfig
    tokenize: Tokenize
    options: FineTuningOptions

    def __call__(self, first: int, rank: int, ranks: int) -> Iterator[TrainingBatch]:
        """The batches of a run on one device, from its beginning."""
        assert first == rank == 0 and ranks == 1
        generator = np.random.default_rng(self.options.seed)
        order: list[int] = []
        while True:
            while len(order) < self.options.train_batch_size:
                order += generator.permutation(len(self.samples)).tolist()
            chosen, order = order[: self.options.train_batch_size], order[self.options.train_batch_size :]
            yield collate([self.samples[i] for i in chosen], self.config, self.tokenize, generator)


def _train(
    module: TrainedPart, batches: _Batches, options: FineTuningOptions, on_progress: OnProgress | None
) -> list[float]:
    """Each step's loss. Raises InputError when one is not finite."""
    parameters = lora_parameters(module)
    settings = options.optimisation()
    optimiser = make_optimiser(parameters, settings)
    schedule = get_scheduler(
        options.lr_scheduler,
        optimiser,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
    )
    trained = Trained(Accelerator(), module, parameters, optimiser)
    task = Task("train-lora", _Loss(options.mixed_precision), batches)
    losses: list[float] = []
    for result in optimisation_steps(
        trained,
        task,
        settings,
        0,
        accumulation=options.gradient_accumulation_steps,
        schedule=lambda step, _: schedule.lr_lambdas[0](step),
    ):
        if not np.isfinite(result.loss):
            raise InputError(f"the loss is {result.loss} at step {result.step}; give a lower learning rate")
        losses.append(result.loss)
        if on_progress and result.step % SHOWN_EVERY == 0:
            on_progress(f"loss {np.mean(losses[-SHOWN_EVERY:]):.3f}", result.step, settings.steps)
    return losses


@dataclass(frozen=True)
class _Loss:
    """The mean objective of a batch, each sample at a timestep of its own (paper, section 4.1)."""

    mixed_precision: MixedPrecision

    def __call__(self, module: nn.Module, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(module, TrainedPart)
        batch = replace(batch, vit=batch.vit.to(module.image_encoder.query_tokens.dtype))
        timestep = torch.randint(TRAIN_STEPS, (len(batch.target),), device=batch.target.device)
        with _precision(batch.target.device, self.mixed_precision):
            return sample_losses(module.config, module, batch, timestep).losses.mean(), {}


@contextmanager
def _precision(device: torch.device, mixed_precision: MixedPrecision) -> Generator[None]:
    """What a forward pass is computed in."""
    if mixed_precision == "no":
        yield
    else:
        with Float32Attention(), torch.autocast(device.type, torch.bfloat16):
            yield
