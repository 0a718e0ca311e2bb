"""The report's plots as SVG files: narrow, so that a phone shows them as large as they are; their text stays text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

WIDTH, ROW = 4.7, 0.47  # inches: of a plot, and the height of one of its rows
INK, RULE, MUTED = "#1c2530", "#d5dae1", "#8b94a3"
COLOURS = {"published": MUTED, "encode_once": "#b79a6b", "ours": "#2f7fd1", "optional": "#58a55c"}
GRAPH_COLOURS = {"vae_encoder": "#9aa5b1", "image_encoder": "#e3a234", "text_encoder": "#d1633c"}
GRAPH_COLOURS |= {"conditioner": "#8a63b8", "denoiser": "#2f7fd1", "vae_decoder": "#4fa58a"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "legend.frameon": False,
    "axes.axisbelow": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), RULE),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
}


@dataclass(frozen=True)
class Bar:
    """parts: values by their colours; text: beside it; interval: its two ends; roofline: the least it could be."""

    name: str
    parts: Mapping[str, float]
    text: str
    interval: tuple[float, float] | None = None
    roofline: float | None = None


def bars(path: Path, items: Sequence[Bar], unit: str, legend: Mapping[str, str] | None = None) -> None:
    """Write horizontal bars; the interval is a thin line, cut far beyond the longest bar, the roofline a diamond."""
    ends = [max(sum(item.parts.values()), item.roofline or 0) for item in items]
    top = min(max([*ends, *(item.interval[1] for item in items if item.interval)]), 1.35 * max(ends))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.name}):
        height = 0.62 + ROW * len(items) + (0.63 if legend else 0)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlim=(0, 1.24 * top), ylim=(len(items) - 0.6, -0.85), yticks=[], xlabel=unit)
        axes.grid(axis="x")
        for y, item in enumerate(items):
            place: Any = {"xycoords": ("axes fraction", "data"), "annotation_clip": False, "in_layout": False}
            axes.annotate(item.name, (0, y - 0.3), va="bottom", **place)
            end = 0.0
            for colour, value in item.parts.items():
                axes.barh(y, value, left=end, height=0.42, color=colour)
                end += value
            if item.interval is not None:
                end = max(end, min(item.interval[1], top))
                axes.plot((item.interval[0], end), (y, y), color=INK, linewidth=1.1)
            if item.roofline is not None:
                axes.plot(item.roofline, y, marker="D", color=INK, markersize=4.5, markeredgewidth=0)
            axes.text(end + 0.015 * top, y, item.text, va="center", fontsize=8.5)
        if legend:
            handles = [Patch(color=colour, label=label) for label, colour in legend.items()]
            below = (0.5, -0.52 / (ROW * len(items)))
            axes.legend(handles=handles, loc="upper center", bbox_to_anchor=below, ncols=3, handlelength=1)
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
