"""What a run says of itself: metrics.jsonl, TensorBoard, progress."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mige_rt.terminal import console, report
from trainer.loop import StepResult, TrainingLog
from trainer.run.config import RunConfig
from trainer.run.loss import means_of_processes
from trainer.run.validation import IMAGES_FOLDER, PREFIX, Shown, best_by, save_images

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class RunLog:
    """Means of metrics over all processes and some steps. Every process makes every call."""

    def __init__(self, out: Path, config: RunConfig, accelerator: Accelerator, first_step: int) -> None:
        """Open the files, without what a resumed run writes again."""
        self._accelerator, self._config, self._out = accelerator, config, out
        self._own: dict[str, list[float]] = defaultdict(list)  # of this process's batches
        self._lines = self._board = None
        if accelerator.is_main_process:
            self._lines = TrainingLog(out / METRICS_FILE, first_step, digits=None)
            if config.log.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(out / TENSORBOARD_FOLDER, purge_step=first_step + 1)

    def add(self, result: StepResult, rate: float) -> None:
        """Count a step; one that was skipped gets a line of its own."""
        if result.skipped:
            if self._lines is not None:
                values = {"loss": repr(result.loss), "norm": repr(result.norm)}  # JSON has no NaN
                self._lines.write_line({"step": result.step, "skipped": True, **values})
                report(
                    f"step {result.step} is skipped: its loss is {result.loss:g}, its gradient's norm {result.norm:g}"
                )
            return
        for metrics in result.metrics:
            for name, value in metrics.items():
                self._own[name].append(value)
        if self._lines is not None:
            self._lines.add({"loss": result.loss, "norm": result.norm, "rate": rate})

    def add_changes(self, changed: Mapping[str, Any], step: int) -> None:
        """Write the config's values that are others from a step on, if there are any, in a line of their own."""
        if self._lines is not None and changed:
            self._lines.write_line({"step": step, "changed": dict(changed)})
            values = ", ".join(f"{name} is {value}" for name, value in changed.items())
            report(f"from step {step} on, {values}")

    def add_validation(self, losses: Mapping[str, float], shown: Sequence[Shown], step: int) -> None:
        """Count what a validation gave, and write its images."""
        if self._lines is None:
            return
        self._lines.add(losses)
        report(f"step {step}: the validation's loss is {best_by(losses):.4f}")
        if not shown:
            return
        save_images(shown, self._out / IMAGES_FOLDER / f"step-{step:08d}.png")
        if self._board is not None:
            for k, sample in enumerate(shown):
                self._board.add_image(f"{PREFIX}{k}", sample.result, step, dataformats="HWC")

    def write(self, step: int, hours: float) -> None:
        """Write the means since the last time."""
        own_means = means_of_processes(self._own)
        self._own.clear()
        if self._lines is None:
            return
        self._lines.add(own_means)
        means = self._lines.write(step, step * self._config.batch, hours)
        if self._board is not None:
            for name, mean in means.items():
                self._board.add_scalar(name, mean, step)
            self._board.flush()


class RunProgress:
    """Samples a second and the time that is left, of the main process: a bar, or lines where there is no terminal."""

    def __init__(self, config: RunConfig, first_step: int, last_step: int, shown: bool) -> None:
        """Begin to count time."""
        terminal = console(stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, console=terminal, disable=not (shown and terminal.is_terminal))
        self._task = self._bar.add_task("train", total=last_step, completed=first_step)
        self._lines = shown and not terminal.is_terminal
        self._config, self._first, self._last = config, first_step, last_step
        self._started = time.monotonic()

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, result: StepResult) -> None:
        """Show a step."""
        seconds = (time.monotonic() - self._started) / (result.step - self._first)  # a step
        left = timedelta(seconds=round(seconds * (self._last - result.step)))
        text = f"loss {result.loss:.4f}, {self._config.batch / seconds:.1f} samples/s, {left} left"
        self._bar.update(self._task, description=text, completed=result.step)
        if self._lines and (result.step % self._config.log.every == 0 or result.step == self._last):
            report(f"step {result.step} of {self._last}: {text}")
