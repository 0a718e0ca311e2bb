"""The training loop that every stage shares: optimiser, schedule, moving average, log, and a state to resume from."""

import io
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode

from mige_rt.atomic import atomic_file
from trainer.settings import StageSettings

LOG_EVERY = 50  # steps
SAVE_EVERY = 300.0  # seconds
STATE_FILE = "state.pt"


def rate_at(step: int, settings: StageSettings) -> float:
    """The share of the full learning rate at a step: warm-up, constant, a linear fall to a tenth."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    left = (settings.steps - step) / max(1, settings.decay)
    return warm * (0.1 + 0.9 * min(1.0, max(0.0, left)))


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
    """The lines of a stage's log.jsonl: means of metrics over LOG_EVERY steps."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Opens the log, without the lines after `first_step`, which a resumed run writes again."""
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]  # a full disk may have cut the last one
        with atomic_file(path) as temporary:
            earlier = "".join(line for line in whole if json.loads(line)["step"] <= first_step)
            temporary.write_text(earlier, encoding="utf-8")
        self.path = path
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
        means = {name: round(sum(values) / len(values), 5) for name, values in self._values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "samples": samples, "hours": round(hours, 4), **means}) + "\n")
        self._values.clear()
        return means


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


def save_trained(module: nn.Module, folder: Path) -> Path:
    """Write what a stage has trained as trained.safetensors, whole or not at all; returns the file."""
    path = folder / "trained.safetensors"
    with atomic_file(path) as temporary:
        save_model(module, str(temporary))
    return path


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
    optimiser = torch.optim.AdamW(
        parameters, lr=settings.rate, eps=settings.epsilon, weight_decay=settings.weight_decay, fused=True
    )
    module.to(accelerator.device)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    state = TrainingState(folder / STATE_FILE, module, average, optimiser)
    state.load(accelerator.device)
    first_step, hours_before = state.step, state.hours
    prepared, optimiser = accelerator.prepare(module, optimiser)
    rank, ranks, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    log = TrainingLog(folder / "log.jsonl", first_step) if is_main else None
    stream = task.batches(first_step, rank, ranks)
    started = saved = time.monotonic()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Float32Attention(), Progress(*columns, disable=not is_main) as progress:
        bar = progress.add_task(task.name, total=settings.steps, completed=first_step)
        for step in range(first_step, settings.steps):
            torch.manual_seed(settings.seed * 10**9 + step * ranks + rank)  # resumed runs draw the same
            for group in optimiser.param_groups:
                group["lr"] = settings.rate * rate_at(step, settings)
            loss, metrics = task.loss(prepared, send_to_device(next(stream), accelerator.device))
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(parameters, settings.clip)
            optimiser.step()
            optimiser.zero_grad()
            average.update_parameters(module)
            if log is None:
                continue
            state.step, state.hours = step + 1, hours_before + (time.monotonic() - started) / 3600
            log.add({"loss": loss.item(), "norm": float(norm or 0), **metrics})
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
