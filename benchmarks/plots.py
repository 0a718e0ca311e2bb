"""The report's plots, as SVG for the inside of a page: narrow, so that a phone shows them as large as they are, and in
the page's own colours for text and lines."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import Latency, Ratio

WIDTH = 4.7  # inches
INK, RULE = "#010203", "#040506"  # stand for the page's colours of text and of lines
SCALE = {"program": "#8b94a3", "baseline": "#b79a6b", "ours": "#2f7fd1", "saving": "#58a55c"}
GRAPH_COLOURS = {
    "vae_encoder": "#9aa5b1",
    "image_encoder": "#e3a234",
    "text_encoder": "#d1633c",
    "conditioner": "#8a63b8",
    "denoiser": "#2f7fd1",
    "vae_decoder": "#4fa58a",
}
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "svg.fonttype": "path",  # text looks the same wherever it is read
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Bar:
    """name above it; value beside it, in words; spread: 10th and 90th percentile; floor: the least it could be."""

    name: str
    value: float
    text: str
    colour: str
    spread: tuple[float, float] | None = None
    floor: float | None = None


def bars(items: Sequence[Bar], unit: str, standalone: bool = False) -> str:
    """Horizontal bars; the spread as a thin line, cut far beyond the longest bar; the floor as a diamond."""
    longest = max(max(item.value, item.floor or 0) for item in items)
    top = min(max(max(item.value, (item.spread or (0, 0))[1]) for item in items), 1.35 * longest)

    def draw(axes: Axes) -> None:
        for y, item in enumerate(items):
            axes.barh(y, item.value, height=0.42, color=item.colour)
            end = item.value
            if item.spread is not None:
                end = max(end, min(item.spread[1], top))
                axes.plot((item.spread[0], end), (y, y), color=INK, linewidth=1.1)
            if item.floor is not None:
                axes.plot(item.floor, y, marker="D", color=INK, markersize=4.5, markeredgewidth=0)
            axes.text(end + 0.015 * top, y, item.text, va="center", fontsize=8.5)
            axes.text(0, y - 0.3, item.name, va="bottom", fontsize=9, in_layout=False)
        axes.set_xlim(0, 1.22 * top)
        axes.set_ylim(len(items) - 0.6, -0.85)
        axes.set_yticks([])
        axes.set_xlabel(unit)
        axes.grid(axis="x")

    return _svg(f"bars {unit} {standalone}", 0.62 + 0.47 * len(items), draw, standalone)


def stacks(items: Mapping[str, Mapping[str, float]], totals: Mapping[str, str], unit: str) -> str:
    """One horizontal bar an item, made of its graphs' shares; totals: what to write beside each."""

    def draw(axes: Axes) -> None:
        top = max(sum(parts.values()) for parts in items.values())
        for y, (name, parts) in enumerate(items.items()):
            left = 0.0
            for graph, colour in GRAPH_COLOURS.items():
                part = parts.get(graph, 0.0)
                axes.barh(y, part, left=left, height=0.42, color=colour, label=graph if y == 0 else None)
                left += part
            axes.text(left + 0.015 * top, y, totals[name], va="center", fontsize=8.5)
            axes.text(0, y - 0.3, name, va="bottom", fontsize=9, in_layout=False)
        axes.set_xlim(0, 1.24 * top)
        axes.set_ylim(len(items) - 0.6, -0.85)
        axes.set_yticks([])
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.52 / (0.47 * len(items))), ncols=3, handlelength=1)

    return _svg(f"stacks {unit}", 1.25 + 0.47 * len(items), draw)


def gains(items: Sequence[tuple[str, Ratio]]) -> str:
    """Each ratio with its interval, on a logarithmic axis; a hollow one shows no difference."""
    low = min(1.0, *(found.low for _, found in items)) / 1.12
    high = max(1.0, *(found.high for _, found in items)) * 1.12
    span = math.log(high / low)

    def draw(axes: Axes) -> None:
        for y, (name, found) in enumerate(items):
            shown = found.verdict != "no difference shown"
            colour = SCALE["ours"] if shown else SCALE["program"]
            axes.plot((found.low, found.high), (y, y), color=colour, linewidth=2.4, solid_capstyle="round")
            axes.plot(
                found.value, y, marker="o", markersize=6.5, color=colour, markerfacecolor=colour if shown else "none"
            )
            # Neither text is to make room for itself by moving the axis.
            near = {"textcoords": "offset points", "in_layout": False, "annotation_clip": False}
            axes.annotate(f"{found.value:.2f}x", (found.high, y), xytext=(7, 0), va="center", fontsize=8.5, **near)
            axes.annotate(name, (0, y), xycoords=("axes fraction", "data"), xytext=(0, 8), fontsize=9, **near)
        axes.axvline(1, color=RULE, linewidth=1.6, zorder=0.5)
        axes.set_xscale("log")
        axes.set_xlim(low, high * math.exp(0.13 * span))
        marks: list[float] = []
        for mark in (1, 2, 0.5, 3, 5, 10, 20, 0.25, 0.1, 1.5, 1.25, 0.75, 1.1, 0.9):  # in order of interest
            if low <= mark <= high and all(abs(math.log(mark / other)) > 0.12 * span for other in marks):
                marks.append(mark)
        axes.set_xticks(marks, [f"{mark:g}x" for mark in marks])
        axes.minorticks_off()
        axes.set_ylim(len(items) - 0.55, -0.75)
        axes.set_yticks([])
        axes.set_xlabel("times as fast")
        axes.grid(axis="x")

    return _svg("gains", 0.62 + 0.47 * len(items), draw)


def lines(items: Mapping[str, Mapping[int, Latency]], axis: str) -> str:
    """Median latency over a whole number, one line a candidate, its tenth to ninetieth percentile as a bar."""

    def draw(axes: Axes) -> None:
        palette = ["#8b94a3", "#b79a6b", "#d1633c", "#8a63b8", "#2f7fd1", "#4fa58a", "#58a55c", "#e3a234"]
        for k, (name, points) in enumerate(items.items()):
            xs = sorted(points)
            ys = [points[x].median for x in xs]
            spread = [[points[x].median - points[x].p10 for x in xs], [points[x].p90 - points[x].median for x in xs]]
            colour = palette[k % len(palette)]
            axes.errorbar(xs, ys, yerr=spread, color=colour, marker="o", markersize=4, linewidth=1.6, label=name)
        every = sorted({x for points in items.values() for x in points})
        axes.set_xticks(every, [str(x) for x in every])
        axes.set_ylim(0, 1.3 * max(latency.median for points in items.values() for latency in points.values()))
        axes.set_xlim(0 if axis == "steps" else None)
        axes.set_xlabel(axis)
        axes.set_ylabel("seconds")
        axes.grid(axis="y")
        axes.legend(loc="upper center", bbox_to_anchor=(0.46, -0.17), ncols=1, handlelength=1.4)

    return _svg(f"lines {axis}", 2.9 + 0.185 * len(items), draw)


def _svg(name: str, height: float, draw: Callable[[Axes], None], standalone: bool = False) -> str:
    """What draw makes, as an SVG element; name: what tells it from the page's others. standalone: with colours and a
    ground of its own, for a file."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=not standalone, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    if standalone:
        return svg.replace(INK, "#1c2530").replace(RULE, "#d5dae1")
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(RULE, "var(--rule)")
    return svg.replace("<svg", '<svg role="img" preserveAspectRatio="xMinYMin meet"', 1)
