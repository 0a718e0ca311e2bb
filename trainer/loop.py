"""The training loop that every stage shares: optimiser, schedule, moving average, log, and a state to resume from."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode

from mige_rt.atomic import atomic_file
from trainer.settings import StageSettings

LOG_EVERY = 50  # steps
SAVE_EVERY = 300.0  # seconds


def rate_at(step: int, settings: StageSettings) -> float:
    """The share of the full learning rate at a step: warm-up, constant, a linear fall to a tenth."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    left = (settings.steps - step) / max(1, settings.decay)
    return warm * (0.1 + 0.9 * min(1.0, max(0.0, left)))


class Float32Attention(TorchFunctionMode):
    """Inside, scaled dot-product attention on the CPU is computed in float32: in bfloat16 its backward pass takes
    several times as long."""

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

    name: in the progress bar. loss(module, batch): the loss and metrics for the log. batches(step, rank, ranks): the
    batches from a step on, this process's share of them, the same ones whenever it is asked. watch(averaged module,
    step): looks at the moving average each `watch_every` steps, and returns metrics for the log.
    """

    name: str
    loss: Callable[[nn.Module, Any], tuple[Tensor, dict[str, float]]]
    batches: Callable[[int, int, int], Iterator[Any]]
    watch: Callable[[nn.Module, int], dict[str, float]] | None = None
    watch_every: int = 1000


def train(module: nn.Module, task: Task, settings: StageSettings, folder: Path) -> nn.Module:
    """Train module's parameters that require gradients; returns the moving average of its weights, on the CPU.

    The state (weights, average, optimiser, step, hours) is kept in folder/state.pt and resumed from there;
    folder/log.jsonl has one line each LOG_EVERY steps. The device is the one that `accelerate` finds.
    """
    accelerator = Accelerator()
    folder.mkdir(parents=True, exist_ok=True)
    state_path = folder / "state.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=settings.rate, eps=settings.epsilon, weight_decay=settings.weight_decay, fused=True
    )
    module.to(accelerator.device)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    first, hours = 0, 0.0
    if state_path.is_file():
        state = torch.load(state_path, map_location=accelerator.device, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        first, hours = state["step"], state["hours"]
        kept = [
            line for line in (folder / "log.jsonl").read_text().splitlines(True) if json.loads(line)["step"] <= first
        ]
        (folder / "log.jsonl").write_text("".join(kept))  # steps after the last save are done, and logged, again
    prepared, optimiser = accelerator.prepare(module, optimiser)

    def save(step: int) -> None:
        if accelerator.is_main_process:
            content = {
                "module": module.state_dict(),
                "average": average.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
                "hours": hours + (time.monotonic() - started) / 3600,
            }
            with atomic_file(state_path) as temporary:
                torch.save(content, temporary)

    started = saved = time.monotonic()
    sums: dict[str, float] = defaultdict(float)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    rank, ranks = accelerator.process_index, accelerator.num_processes
    stream = task.batches(first, rank, ranks)
    with (
        Float32Attention(),
        Progress(*columns, disable=not accelerator.is_main_process) as progress,
        (folder / "log.jsonl").open("a") as log,
    ):
        bar = progress.add_task(task.name, total=settings.steps, completed=first)
        for step in range(first, settings.steps):
            torch.manual_seed(settings.seed * 10**9 + step * ranks + rank)  # resumed runs draw the same
            for group in optimiser.param_groups:
                group["lr"] = settings.rate * rate_at(step, settings)
            value, metrics = task.loss(prepared, send_to_device(next(stream), accelerator.device))
            accelerator.backward(value)
            norm = accelerator.clip_grad_norm_(parameters, settings.clip)
            optimiser.step()
            optimiser.zero_grad()
            average.update_parameters(module)
            metrics = {"loss": value.item(), "norm": float(norm or 0), **metrics}
            if task.watch is not None and (step + 1) % task.watch_every == 0 and accelerator.is_main_process:
                metrics |= task.watch(average.module, step + 1)
            for key, metric in metrics.items():
                sums[key] += metric
                sums[f"{key} n"] += 1
            if (step + 1) % LOG_EVERY == 0 and accelerator.is_main_process:
                means = {k: round(v / sums[f"{k} n"], 5) for k, v in sums.items() if not k.endswith(" n")}
                spent = hours + (time.monotonic() - started) / 3600
                samples = (step + 1) * settings.batch * ranks
                log.write(json.dumps({"step": step + 1, "samples": samples, "hours": round(spent, 4), **means}) + "\n")
                log.flush()
                progress.update(bar, completed=step + 1, description=f"{task.name} loss {means['loss']:.4f}")
                sums.clear()
            if time.monotonic() - saved > SAVE_EVERY:
                save(step + 1)
                saved = time.monotonic()
    save(settings.steps)
    return average.module.cpu()
