"""The training loop that every stage and every run shares, and what the stages do at each of its steps.

`optimisation_steps` is the loop: data, learning rate, gradients, clipping, the optimiser. `train` runs a stage of the
default model: moving average, log, and a state to resume from. `trainer.run` does the same for runs at scale, and
`trainer.train_lora` fine-tunes with it.
"""

import io
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode

from mige_rt.atomic import atomic_file
from mige_rt.errors import InputError
from mige_rt.terminal import report
from trainer.settings import StageSettings

LOG_EVERY = 50  # steps
SAVE_EVERY = 300.0  # seconds
STATE_FILE = "state.pt"


def rate_at(step: int, settings: StageSettings) -> float:
    """The share of the full learning rate at a step: warm-up, constant, a linear fall to a tenth."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    left = (settings.steps - step) / max(1, settings.decay)
    return warm * (0.1 + 0.9 * min(1.0, max(0.0, left)))


RateSchedule = Callable[[int, StageSettings], float]


class Float32Attention(TorchFunctionMode):
    """A context in which scaled dot-product attention on the CPU is computed in float32.

    In bfloat16 its backward pass takes several times as long.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention or args[0].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*(tensor.float() for tensor in args[:3]), *args[3:], **(kwargs or {}))


@dataclass(frozen=True)
class Task:
    """What a stage trains on.

    Attributes:
        name: Shown in the progress bar.
        loss: Called with the module and a batch; returns the loss, and metrics for the log.
        batches: Called with a step, a process's rank, and the number of processes; yields this process's batches from
            that step on, the same ones whenever it is called.
        watch: Called with the module that holds the moving average, and the step; returns metrics for the log.
        watch_every: Steps between two calls of `watch`.
    """

    name: str
    loss: Callable[[nn.Module, Any], tuple[Tensor, dict[str, float]]]
    batches: Callable[[int, int, int], Iterator[Any]]
    watch: Callable[[nn.Module, int], dict[str, float]] | None = None
    watch_every: int = 1000


class TrainingLog:
    """The lines of a log such as a stage's log.jsonl: means of metrics over some steps."""

    def __init__(self, path: Path, first_step: int, digits: int | None = 5) -> None:
        """Opens the log, without the lines after `first_step`, which a resumed run writes again.

        Args:
            path: The log.
            first_step: Steps that were done.
            digits: Behind the point, of each mean; None: all.
        """
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]  # a killed run may leave a part of one
        with atomic_file(path) as temporary:
            text = "".join(line for line in whole if json.loads(line)["step"] <= first_step)
            temporary.write_text(text, encoding="utf-8")
        self.path, self._digits = path, digits
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Count one step's metrics into the next line."""
        for name, value in metrics.items():
            self._values[name].append(value)

    def write(self, step: int, samples: int, hours: float) -> dict[str, float]:
        """Append a line, and begin the next one.

        Returns:
            The means that were written.
        """
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        if self._digits is not None:
            means = {name: round(mean, self._digits) for name, mean in means.items()}
        self.write_line({"step": step, "samples": samples, "hours": round(hours, 4), **means})
        self._values.clear()
        return means

    def write_line(self, values: Mapping[str, Any]) -> None:
        """Append a line of its own, with the step that it is about."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


@dataclass
class TrainingState:
    """All that a resumed run needs, in one file."""

    path: Path
    module: nn.Module
    average: AveragedModel
    optimiser: torch.optim.Optimizer
    step: int = 0
    hours: float = 0.0

    def load(self, device: torch.device) -> None:
        """Read the file, if there is one."""
        if self.path.is_file():
            content = torch.load(self.path, map_location=device, weights_only=True)
            self.module.load_state_dict(content["module"])
            self.average.load_state_dict(content["average"])
            self.optimiser.load_state_dict(content["optimiser"])
            self.step, self.hours = content["step"], content["hours"]

    def save(self) -> None:
        """Write the file, whole or not at all."""
        content = {
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "hours": self.hours,
        }
        buffer = io.BytesIO()  # since torch.save hides what the system says when it cannot write
        torch.save(content, buffer)
        with atomic_file(self.path) as temporary, temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())


def steps_done(folder: Path) -> int:
    """The steps of a stage that are in its state; 0 where there is none."""
    path = folder / STATE_FILE
    return torch.load(path, map_location="cpu", weights_only=True)["step"] if path.is_file() else 0


def save_trained(module: nn.Module, folder: Path) -> Path:
    """Write what a stage has trained as trained.safetensors, whole or not at all; returns the file."""
    path = folder / "trained.safetensors"
    with atomic_file(path) as temporary:
        save_model(module, str(temporary))
    return path


@dataclass(frozen=True)
class Trained:
    """What the loop trains, as `accelerate` has prepared it.

    Attributes:
        accelerator: Of the processes.
        module: Called by the task's loss.
        parameters: Those that are trained.
        optimiser: Of these.
    """

    accelerator: Accelerator
    module: nn.Module
    parameters: Sequence[nn.Parameter]
    optimiser: torch.optim.Optimizer


@dataclass
class LossGuard:
    """Decides whether a step's gradient is applied: not where the loss or the gradient is not finite, or spikes.

    Attributes:
        spike: How many times the mean loss of the steps before counts as a spike; None: only what is not finite.
        mean: Moving average of the losses of the steps that were applied.
        applied: How many those are; spikes are looked for after WARM of them.
        rejected: Steps in a row that were not applied.
    """

    spike: float | None
    mean: float = 0.0
    applied: int = 0
    rejected: int = 0

    WARM = 100
    DECAY = 0.99

    def accepts(self, loss: float, norm: float) -> bool:
        """Judge a step by its loss and the norm of its gradient, both of all processes, and count it."""
        spikes = self.spike is not None and self.applied >= self.WARM and loss > self.spike * self.mean
        if spikes or not (math.isfinite(loss) and math.isfinite(norm)):
            self.rejected += 1
            return False
        self.rejected = 0
        decay = min(self.DECAY, self.applied / (self.applied + 1))  # the mean of all, at first
        self.mean = decay * self.mean + (1 - decay) * loss
        self.applied += 1
        return True


@dataclass(frozen=True, eq=False)
class StepResult:
    """What came of one step.

    Attributes:
        step: Number of steps so far, this one included.
        loss: The mean loss; of all processes where there is a guard, otherwise of this one.
        norm: Of the gradient before clipping, of all processes.
        metrics: Of each of this process's batches.
        batches: This process's.
        skipped: The guard rejected the step.
    """

    step: int
    loss: float
    norm: float
    metrics: Sequence[Mapping[str, float]]
    batches: Sequence[Any]
    skipped: bool


def check_one_process(what: str) -> None:
    """Raises InputError where several processes were started; `what` they would have run in."""
    if (number := Accelerator().num_processes) > 1:
        raise InputError(f"{what} runs in one process, and {number} were started; start it without accelerate launch")


def make_optimiser(parameters: Iterable[nn.Parameter], settings: StageSettings) -> torch.optim.AdamW:
    """AdamW as the settings say."""
    return torch.optim.AdamW(
        parameters, lr=settings.rate, eps=settings.epsilon, weight_decay=settings.weight_decay, fused=True
    )


def optimisation_steps(
    trained: Trained,
    task: Task,
    settings: StageSettings,
    first_step: int,
    *,
    accumulation: int = 1,
    guard: LossGuard | None = None,
    schedule: RateSchedule = rate_at,
) -> Iterator[StepResult]:
    """Train from `first_step` to the settings' last one.

    Args:
        trained: What is trained.
        task: The loss and the batches; a step takes `accumulation` of them.
        settings: How to optimise.
        first_step: Number of steps that were done before.
        accumulation: Batches of each process whose gradients are averaged.
        guard: Decides which steps are applied; None: all.
        schedule: The share of the full learning rate at each step.

    Yields:
        What came of each step, after the parameters have changed.
    """
    accelerator, optimiser = trained.accelerator, trained.optimiser
    rank, ranks = accelerator.process_index, accelerator.num_processes
    stream = task.batches(first_step * accumulation, rank, ranks)
    for step in range(first_step, settings.steps):
        torch.manual_seed(settings.seed * 10**9 + step * ranks + rank)  # resumed runs draw the same
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * schedule(step, settings)
        batches = list(islice(stream, accumulation))
        losses, metrics = _gradients(trained, task, batches)
        norm = float(_whole(accelerator.clip_grad_norm_(trained.parameters, settings.clip)))
        loss = sum(losses) / accumulation
        if guard is not None:
            loss = float(accelerator.reduce(torch.tensor(loss, device=accelerator.device), "mean"))  # pyright: ignore[reportArgumentType]
        skipped = guard is not None and not guard.accepts(loss, norm)
        if not skipped:
            optimiser.step()
        optimiser.zero_grad()
        yield StepResult(step + 1, loss, norm, metrics, batches, skipped)


def _gradients(trained: Trained, task: Task, batches: Sequence[Any]) -> tuple[list[float], list[Mapping[str, float]]]:
    """Add up the gradients of the mean loss; processes exchange them at the last batch alone."""
    accelerator = trained.accelerator
    losses, metrics = [], []
    for number, batch in enumerate(batches, 1):
        with _no_exchange(trained) if number < len(batches) else nullcontext():
            loss, measured = task.loss(trained.module, send_to_device(batch, trained.parameters[0].device))
            accelerator.backward(loss / len(batches) if len(batches) > 1 else loss)
        losses.append(loss.item())
        metrics.append(measured)
    return losses, metrics


@contextmanager
def _no_exchange(trained: Trained) -> Generator[None, None, None]:
    """Gradients of backward passes in this block stay with their process."""
    module = trained.module
    if not isinstance(module, FSDPModule):
        with trained.accelerator.no_sync(module):
            yield
        return
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def _whole(norm: Tensor | None) -> Tensor | float:
    """A norm of which each process has a part, where parameters are sharded, as all have it."""
    if norm is None:
        return 0.0
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def train(module: nn.Module, task: Task, settings: StageSettings, folder: Path) -> nn.Module:
    """Train the parameters of a module that require gradients, on the device that `accelerate` finds.

    Args:
        module: Trained in place.
        task: The loss, the batches, and what to watch.
        settings: How to optimise.
        folder: Holds state.pt, from which a run is resumed, and log.jsonl, with a line each LOG_EVERY steps.

    Returns:
        The moving average of the weights, on the CPU.
    """
    accelerator = Accelerator()
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = make_optimiser(parameters, settings)
    module.to(accelerator.device)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    state = TrainingState(folder / STATE_FILE, module, average, optimiser)
    state.load(accelerator.device)
    first_step, hours_before = state.step, state.hours
    if first_step >= settings.steps and accelerator.is_main_process:
        report(f"{state.path} has {first_step} steps, and the config's are {settings.steps}: nothing is left to train")
    prepared, optimiser = accelerator.prepare(module, optimiser)
    ranks, is_main = accelerator.num_processes, accelerator.is_main_process
    log = TrainingLog(folder / "log.jsonl", first_step) if is_main else None
    trained = Trained(accelerator, prepared, parameters, optimiser)
    started = saved = time.monotonic()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    attention = Float32Attention() if accelerator.device.type == "cpu" else nullcontext()
    with attention, Progress(*columns, disable=not is_main) as progress:
        bar = progress.add_task(task.name, total=settings.steps, completed=first_step)
        for result in optimisation_steps(trained, task, settings, first_step):
            average.update_parameters(module)
            if log is None:
                continue
            state.step, state.hours = result.step, hours_before + (time.monotonic() - started) / 3600
            log.add({"loss": result.loss, "norm": result.norm, **result.metrics[0]})
            if task.watch is not None and state.step % task.watch_every == 0:
                log.add(task.watch(average.module, state.step))
            if state.step % LOG_EVERY == 0:
                means = log.write(state.step, state.step * settings.batch * ranks, state.hours)
                progress.update(bar, completed=state.step, description=f"{task.name} loss {means['loss']:.4f}")
            if time.monotonic() - saved > SAVE_EVERY:
                state.save()
                saved = time.monotonic()
    if is_main:
        state.save()
    return average.module.cpu()
