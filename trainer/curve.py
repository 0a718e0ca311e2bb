"""Plots a training's loss by task, over the samples trained on, from the log of the stage `mige`."""

import json
from collections.abc import Sequence
from pathlib import Path

from mige_rt.atomic import atomic_file
from mige_rt.errors import InputError
from trainer.plotting import make_figure
from trainer.synthetic.tasks import KINDS

SMOOTHING = 5  # lines of the log in a running mean; each line is itself a mean over trainer.loop.LOG_EVERY steps


def plot_curve(log: Path, out: Path) -> Path:
    """Plot a log of the stage `mige`.

    Args:
        log: Its log.jsonl.
        out: The PNG to write.

    Returns:
        `out`.

    Raises:
        InputError: The log cannot be read, or matplotlib is not installed.
    """
    figure = make_figure(8, 4.5)
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{log} cannot be read ({error}); run the stage mige first") from error
    axes = figure.add_subplot()
    for key in (*KINDS, "loss"):
        logged = [line for line in lines if key in line]
        all_tasks = key == "loss"
        axes.plot(
            [line["samples"] for line in logged],
            _running_mean([line[key] for line in logged]),
            label="all, with conditions dropped" if all_tasks else key,
            color="black" if all_tasks else None,
            linewidth=2 if all_tasks else 1,
        )
    axes.set(xlabel="samples", ylabel="mean squared error of v", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, ncols=2)
    with atomic_file(out) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    return out


def _running_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and the SMOOTHING - 1 values before it, of fewer at the beginning."""
    windows = [values[max(0, i + 1 - SMOOTHING) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
