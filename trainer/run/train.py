"""A run from its config to its last checkpoint."""

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mige_rt.atomic import atomic_file
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.terminal import report
from mige_rt.tokenizer import load_tokenizer
from mige_rt.validation import differing_fields
from trainer.checkpoints.model_folder import COMPONENTS
from trainer.checkpoints.weights import Checkpoint
from trainer.data.mixing import MixedBatches
from trainer.loop import (
    Float32Attention,
    LossGuard,
    StepResult,
    Task,
    Trained,
    make_optimiser,
    optimisation_steps,
    rate_at,
)
from trainer.run.average import WeightAverage
from trainer.run.batches import RunBatches
from trainer.run.checkpoints import LATEST, Checkpoints, SavedRun, load_tensors, saved_runs
from trainer.run.config import RunConfig
from trainer.run.log import RunLog, RunProgress
from trainer.run.loss import RunLoss
from trainer.run.module import make_accelerator, make_trained_module, on_main, share, trained_parameters
from trainer.run.start import StartWeights, open_start
from trainer.run.validation import Validation, best_by, check_samples

TOKENIZER_FILE = "tokenizer.json"
REJECTED_FILE = "rejected.json"
MOST_REJECTED = 10  # steps in a row
# What a resumed run may have otherwise: it does not change what the steps compute, but for rounding.
FREE = (
    "start",
    "steps",
    "checkpoints",
    "log",
    "validation",
    "distributed",
    "reshard",
    "activation_checkpointing",
    "compile",
)
# What may be changed where a run does not go well; the log then says so.
ADJUSTABLE = ("base_rate", "clip", "spike")


@dataclass(frozen=True)
class RunOptions:
    """Where a run is, and what of it is done.

    Attributes:
        out: The run's folder.
        resume: A checkpoint to go on from, or `latest`; None: begin a new run.
        max_steps: Steps of the whole run after which to stop, where that is before its end.
    """

    out: Path
    resume: str | None = None
    max_steps: int | None = None


def train_run(config: RunConfig, options: RunOptions) -> None:
    """Train, in as many processes as were launched, all of which call this.

    Args:
        config: The run's.
        options: Where, and from where on.

    Raises:
        InputError: The config does not fit the processes, the data, the start, or the checkpoint; the disk is full; or
            MOST_REJECTED steps in a row had to be skipped.
    """
    accelerator = make_accelerator(config)
    accumulation = config.accumulation(accelerator.num_processes)
    mixed = MixedBatches(config.sources, config.micro_batch, config.seed)
    start = open_start(config.start, config.sizes, config.seed)
    check_sizes(config.sizes, start.config, "start")
    check_sizes(config.sizes, mixed.config, "sources")
    check_samples(config)
    weights = on_main(accelerator, lambda: StartWeights.of(start, config.trained))
    check_encoders(config, weights, mixed, accelerator)
    run = Run(config, options, accelerator, start, weights)
    task = Task("train", RunLoss(config.sizes), RunBatches(mixed, run.tokenize))
    settings = replace(config.optimisation(accelerator.num_processes), steps=run.last_step)
    # Its backward pass in bfloat16 is slow on the CPU, and compilers do not know it.
    slow_attention = accelerator.device.type == "cpu" and config.precision == "bf16"
    with Float32Attention() if slow_attention else nullcontext(), run.progress as progress:
        for result in optimisation_steps(
            run.trained, task, settings, run.step, accumulation=accumulation, guard=run.guard
        ):
            run.after_step(result, settings.rate * rate_at(result.step - 1, settings))
            progress.update(result)


class Run:
    """What a run consists of, on one of its processes, and what is done after each step."""

    def __init__(
        self,
        config: RunConfig,
        options: RunOptions,
        accelerator: Accelerator,
        start: Checkpoint,
        start_weights: StartWeights,
    ) -> None:
        """Make the module and its optimiser, and read the checkpoint.

        Args:
            config: The run's.
            options: Where, and from where on.
            accelerator: Of the processes.
            start: What the config names.
            start_weights: What of it is not changed.

        Raises:
            InputError: The folder holds another run, or the checkpoint does not fit.
        """
        self.config, self.accelerator, self.out = config, accelerator, options.out
        self.last_step = min(config.steps, options.max_steps or config.steps)
        open_folder(options, accelerator)
        self._checkpoints = Checkpoints(self.out, accelerator, config.checkpoints.total_limit)
        saved = None if options.resume is None else self._checkpoints.find(options.resume)
        self._fixed = fixed_values(config, accelerator.num_processes, start_weights)
        if saved is not None:
            check_resumable(saved, self._fixed)
        if accelerator.is_main_process:
            with atomic_file(self.out / TOKENIZER_FILE) as temporary:
                start.save_tokenizer(temporary)
        accelerator.wait_for_everyone()
        self.tokenize = load_tokenizer(self.out / TOKENIZER_FILE)
        model = start.load(COMPONENTS, dtype=torch.float32)
        self.part = make_trained_module(model, config)
        module = share(self.part, accelerator, config)
        self.parameters = trained_parameters(self.part)
        optimiser = make_optimiser(self.parameters.values(), config.optimisation(accelerator.num_processes))
        make_state(optimiser)
        self.trained = Trained(accelerator, module, [*self.parameters.values()], optimiser)
        self.average = None if config.ema is None else WeightAverage(self.parameters, config.ema)
        self.guard = LossGuard(config.spike)
        self.step, self._hours_before = 0, 0.0
        self._rejected: list[StepResult] = []
        self._losses: list[float] = []  # since the last checkpoint
        self._validation_loss: float | None = None  # the last one
        self._validation = None if config.validation is None else Validation(config, accelerator, start, self.tokenize)
        if saved is not None:
            load_tensors(saved, self._tensors())
            self._checkpoints.set_aside_after(saved.step)
            self.step, self._hours_before = saved.step, saved.hours
            self.guard = LossGuard(**{**saved.guard, "spike": config.spike})
        self._log = RunLog(self.out, config, accelerator, self.step)
        if saved is not None:
            self._log.add_changes(adjusted(saved, self._fixed), self.step + 1)
        self.progress = RunProgress(config, self.step, self.last_step, accelerator.is_main_process)
        self._started = time.monotonic()

    def after_step(self, result: StepResult, rate: float) -> None:
        """Average the weights, write the log, and a checkpoint where it is time.

        Raises:
            InputError: Too many steps in a row were skipped, or the checkpoint cannot be written.
        """
        self.step = result.step
        self._log.add(result, rate)
        if result.skipped:
            self._reject(result)
        else:
            self._rejected.clear()
            self._losses.append(result.loss)
            if self.average is not None:
                self.average.update()
        is_saved = self.step % self.config.checkpoints.every == 0 or self.step == self.last_step
        validation = self.config.validation
        is_validated = validation is not None and (is_saved or self.step % validation.every == 0)
        if is_validated:
            self._validate()
        if is_validated or is_saved or self.step % self.config.log.every == 0:  # so that no line has steps of two runs
            self._log.write(self.step, self._hours())
        if is_saved:
            self._save()

    def _validate(self) -> None:
        """Measure the weights that a checkpoint's model would have."""
        assert self._validation is not None
        with nullcontext() if self.average is None else self.average.in_place():
            losses = self._validation.losses(self.trained.module)
            shown = self._validation.images(self.trained.module)
        self._validation_loss = best_by(losses)
        self._log.add_validation(losses, shown, self.step)

    def _save(self) -> None:
        losses = self._losses or [float("inf")]
        saved = SavedRun(
            folder=self.out / f"checkpoint-{self.step}",
            step=self.step,
            hours=self._hours(),
            loss=sum(losses) / len(losses) if self._validation_loss is None else self._validation_loss,
            guard=asdict(self.guard),
            config=self._fixed,
        )
        self._checkpoints.save(saved, self._tensors())
        self._losses.clear()

    def _hours(self) -> float:
        return self._hours_before + (time.monotonic() - self._started) / 3600

    def _tensors(self) -> dict[str, Tensor]:
        """All that training changes, by names that do not depend on how processes share it."""
        optimiser = self.trained.optimiser
        tensors = {f"module.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= {f"module.{name}": buffer for name, buffer in self.part.named_buffers()}
        if self.average is not None:
            tensors |= {f"average.{name}": weight for name, weight in self.average.weights.items()}
        for name, parameter in self.parameters.items():
            state = optimiser.state[parameter]
            tensors |= {f"optimiser.{name}.{key}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return tensors

    def _reject(self, result: StepResult) -> None:
        self._rejected.append(result)
        if self.guard.rejected < MOST_REJECTED:
            return
        steps = [
            {"step": one.step, "loss": repr(one.loss), "norm": repr(one.norm), "ids": ids}
            for one in self._rejected
            if (ids := gather_object([name for batch in one.batches for name in batch.ids]))
        ]
        path = self.out / REJECTED_FILE
        if self.accelerator.is_main_process:
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")
        raise InputError(
            f"{MOST_REJECTED} steps in a row had a loss or a gradient that was not finite or spiked, up to step "
            f"{self.step}; {path} has the ids of their samples: look at those, or lower base_rate, and go on with "
            f"--resume-from-checkpoint {LATEST}"
        )


def open_folder(options: RunOptions, accelerator: Accelerator) -> None:
    """Make the run's folder.

    Raises:
        InputError: It cannot be made, or holds a run that is not to be resumed.
    """
    try:
        options.out.mkdir(exist_ok=True)
        begun = bool(saved_runs(options.out))
    except OSError as error:
        raise InputError(
            f"{options.out} cannot be written ({error}): give a path in an existing folder of your own"
        ) from error
    if begun and options.resume is None:
        raise InputError(
            f"{options.out} holds the checkpoints of a run: go on with --resume-from-checkpoint {LATEST}, or give "
            "another folder"
        )
    if options.resume == LATEST and not begun and accelerator.is_main_process:
        report(f"{options.out} has no checkpoint yet; the run begins")


def check_sizes(expected: ModelConfig, given: ModelConfig, what: str) -> None:
    """The sizes of the config's model must be those of what it is trained from.

    Raises:
        InputError: They are not; with the fields that differ.
    """
    given = replace(given, name=expected.name, defaults=expected.defaults)
    if unlike := differing(given.to_json(), expected.to_json(), what, f"model {expected.name}"):
        raise InputError(f"{what} is not for the config's model: {'; '.join(unlike)}; change either")


def check_encoders(config: RunConfig, start: StartWeights, mixed: MixedBatches, accelerator: Accelerator) -> None:
    """The VAE and the ViT of the start, which are saved with the model, must be those that prepared the sources.

    A difference may be of rounding alone, and is only reported, where the start is the five pretrained files, from
    which no source can be prepared, and where an earlier version prepared the sources.

    Raises:
        InputError: They are not.
    """
    exact, rounded = mixed.encoders
    if start.encoders == exact or start.encoders_float16 == rounded:
        return
    message = "sources were prepared with another VAE or ViT than the start's"
    if config.start.model is not None and rounded is not None:
        raise InputError(f"{message}, {config.start.model}; prepare them with that model, or start from theirs")
    if accelerator.is_main_process:
        report(f"{message}: unless only their precision differs, prepare them with a model that has these")


def fixed_values(config: RunConfig, processes: int, start: StartWeights) -> dict[str, Any]:
    """The values that a resumed run must have as well, as JSON gives them back."""
    values = {name: value for name, value in config.to_json().items() if name not in FREE}
    return json.loads(json.dumps({**values, "processes": processes, "start_weights": asdict(start)}))


def check_resumable(saved: SavedRun, config: Mapping[str, Any]) -> None:
    """A checkpoint's config must be the run's, in all that changes what the steps compute and an earlier version wrote.

    But for ADJUSTABLE.

    Raises:
        InputError: It is not; with the fields that differ.
    """
    before = {name: value for name, value in saved.config.items() if name not in ADJUSTABLE}
    now = {name: value for name, value in config.items() if name in before}
    if unlike := differing(before, now, "the checkpoint", "the config"):
        raise InputError(
            f"{saved.folder} is of another config: {'; '.join(unlike)}; change it back, or begin another run"
        )


def adjusted(saved: SavedRun, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ADJUSTABLE that are not the checkpoint's."""
    return {name: config[name] for name in ADJUSTABLE if config[name] != saved.config.get(name, config[name])}


def differing(first: Any, second: Any, first_name: str, second_name: str) -> list[str]:
    """The fields in which plain data differs, each with both values."""
    return [
        f"{field} is {of_first!r} in {first_name} and {of_second!r} in {second_name}"
        for field, of_first, of_second in differing_fields(first, second)
    ]


def make_state(optimiser: torch.optim.Optimizer) -> None:
    """Have AdamW make its state now, for all parameters, as it would be at the first step of each.

    By a step that changes nothing: its rate and its gradients are zero.
    """
    rates = [group["lr"] for group in optimiser.param_groups]
    for group in optimiser.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    optimiser.zero_grad()
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate
        for parameter in group["params"]:
            optimiser.state[parameter]["step"].zero_()
