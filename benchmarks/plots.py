"""The report's plots as SVG files: narrow, so that a phone shows them as large as they are; their text stays text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

WIDTH, ROW = 4.7, 0.47  # inches: of a plot, and the height of one of its rows
INK, RULE, MUTED = "#1c2530", "#d5dae1", "#8b94a3"
COLOURS = {"published": MUTED, "encode_once": "#b79a6b", "ours": "#2f7fd1", "optional": "#58a55c"}
GRAPH_COLOURS = {"vae_encoder": "#9aa5b1", "image_encoder": "#e3a234", "text_encoder": "#d1633c"}
GRAPH_COLOURS |= {"conditioner": "#8a63b8", "denoiser": "#2f7fd1", "vae_decoder": "#4fa58a"}
LINE_COLOURS = (MUTED, "#b79a6b", "#d1633c", "#8a63b8", "#2f7fd1", "#4fa58a", "#58a55c", "#e3a234")
TICKS = (1, 2, 0.5, 3, 5, 10, 20, 0.25, 0.1, 1.5, 1.25, 0.75, 1.1, 0.9)  # of speedups, in order of interest
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9,
    "legend.frameon": False,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), RULE),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
}


@dataclass(frozen=True)
class Bar:
    """parts: values by their colours; text: beside it; spread: two percentiles; roofline: the least it could be."""

    name: str
    parts: Mapping[str, float]
    text: str
    spread: tuple[float, float] | None = None
    roofline: float | None = None


def bars(path: Path, items: Sequence[Bar], unit: str, legend: Mapping[str, str] | None = None) -> None:
    """Horizontal bars; the spread as a thin line, cut far beyond the longest bar; the roofline as a diamond."""
    ends = [max(sum(item.parts.values()), item.roofline or 0) for item in items]
    top = min(max([*ends, *(item.spread[1] for item in items if item.spread)]), 1.35 * max(ends))
    with _rows(path, [item.name for item in items], unit, (0, 1.24 * top), 0.63 if legend else 0) as axes:
        for y, item in enumerate(items):
            end = 0.0
            for colour, value in item.parts.items():
                axes.barh(y, value, left=end, height=0.42, color=colour)
                end += value
            if item.spread is not None:
                end = max(end, min(item.spread[1], top))
                axes.plot((item.spread[0], end), (y, y), color=INK, linewidth=1.1)
            if item.roofline is not None:
                axes.plot(item.roofline, y, marker="D", color=INK, markersize=4.5, markeredgewidth=0)
            axes.text(end + 0.015 * top, y, item.text, va="center", fontsize=8.5)
        if legend:
            handles = [Patch(color=colour, label=label) for label, colour in legend.items()]
            below = (0.5, -0.52 / (ROW * len(items)))
            axes.legend(handles=handles, loc="upper center", bbox_to_anchor=below, ncols=3, handlelength=1)


def speedups(path: Path, items: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    """Each speedup with its interval, on a logarithmic axis; grey and hollow where no difference was shown."""
    low = min([1.0, *(speedup["low"] for _, speedup in items)]) / 1.12
    high = max([1.0, *(speedup["high"] for _, speedup in items)]) * 1.12
    span = math.log(high / low)
    limits = (low, high * math.exp(0.13 * span))
    with _rows(path, [name for name, _ in items], "times as fast; line: 95 % interval", limits) as axes:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1, color=MUTED, linewidth=1.2, zorder=0.5)
        for y, (_, speedup) in enumerate(items):
            shown = not speedup["low"] <= 1 <= speedup["high"]
            colour, face = (COLOURS["ours"], COLOURS["ours"]) if shown else (MUTED, "white")
            axes.plot((speedup["low"], speedup["high"]), (y, y), color=colour, linewidth=2.4)
            axes.plot(speedup["value"], y, marker="o", markersize=6.5, color=colour, markerfacecolor=face)
            place: Any = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "in_layout": False}
            axes.annotate(f"{speedup['value']:.2f}x", (speedup["high"], y), fontsize=8.5, **place)
        ticks: list[float] = []
        for tick in TICKS:
            if low <= tick <= high and all(abs(math.log(tick / other)) > 0.12 * span for other in ticks):
                ticks.append(tick)
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])


def lines(path: Path, items: Mapping[str, Mapping[int, Mapping[str, float]]], axis: str) -> None:
    """Median latency over a whole number, one line a candidate, its 10th to 90th percentile as a bar."""
    with _figure(path, 2.9 + 0.2 * len(items)) as axes:
        for (name, points), colour in zip(items.items(), LINE_COLOURS * len(items), strict=False):
            xs = sorted(points)
            median, p10, p90 = ([points[x][key] for x in xs] for key in ("median", "p10", "p90"))
            spread = [[m - low for m, low in zip(median, p10)], [high - m for m, high in zip(median, p90)]]  # noqa: B905
            axes.errorbar(xs, median, yerr=spread, color=colour, marker="o", markersize=4, label=name)
        axes.set_xticks(sorted({x for points in items.values() for x in points}))
        axes.set_ylim(0)
        axes.set(xlabel=axis, ylabel="seconds")
        axes.grid(axis="y")
        axes.legend(loc="upper center", bbox_to_anchor=(0.46, -0.17), handlelength=1.4)


@contextmanager
def _rows(path: Path, names: Sequence[str], unit: str, limits: tuple[float, float], below: float = 0) -> Iterator[Axes]:
    """Axes with a row for each name, the name above it; below: inches to leave there."""
    with _figure(path, 0.62 + ROW * len(names) + below) as axes:
        yield axes
        axes.set(xlim=limits, ylim=(len(names) - 0.6, -0.85), yticks=[], xlabel=unit)
        axes.grid(axis="x")
        for y, name in enumerate(names):
            place: Any = {"xycoords": ("axes fraction", "data"), "annotation_clip": False, "in_layout": False}
            axes.annotate(name, (0, y - 0.3), va="bottom", **place)


@contextmanager
def _figure(path: Path, height: float) -> Iterator[Axes]:
    """Axes that are written to the file at the end, the same file every time."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure.add_subplot()
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
