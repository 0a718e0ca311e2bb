"""The curve of a training: what each task's loss was over the samples seen, from the log that the stage mige keeps."""

import json
from pathlib import Path

from mige_rt.errors import InputError
from trainer.synthetic.tasks import KINDS

SMOOTHED = 5  # lines of the log, each a mean over LOG_EVERY steps


def plot_curve(log: Path, out: Path) -> Path:
    """Draw a log.jsonl of the stage mige as the picture `out`; returns it. Raises InputError when there is no log, or
    matplotlib is not here."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"the curve needs matplotlib ({error}); install it with: pip install 'mige-rt[eval]'"
        ) from error
    try:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    except OSError as error:
        raise InputError(f"{log} cannot be read ({error}); run the stage mige first") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind in (*KINDS, "loss"):
        seen = [(line["samples"], line[kind]) for line in lines if kind in line]
        means = [
            sum(loss for _, loss in seen[max(0, i + 1 - SMOOTHED) : i + 1]) / min(i + 1, SMOOTHED)
            for i in range(len(seen))
        ]
        every = kind == "loss"
        axes.plot(
            [samples for samples, _ in seen],
            means,
            label="all, with conditions dropped" if every else kind,
            color="black" if every else None,
            linewidth=2 if every else 1,
        )
    axes.set(xlabel="samples", ylabel="mean squared error of v", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(out, dpi=100)
    return out
