"""A bench of the server as files: serving.json, and from it serving.md with a plot of each mix.

`python -m benchmarks.serving.report FOLDER` writes all but serving.json anew from it.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.plots import COLOURS, MUTED, STYLE, WIDTH
from benchmarks.serving.results import ServingResults
from export.formatting import amount, json_text, markdown_table, seconds

BATCHING_COLOURS = {"continuous": COLOURS["ours"], "static": COLOURS["encode_once"], "none": MUTED}


def write_report(results: ServingResults, folder: Path) -> None:
    """Write the files into an existing folder."""
    (folder / "serving.json").write_text(json_text(results.to_json()), encoding="utf-8")
    render(folder)


def render(folder: Path) -> None:
    """Write the plots and serving.md from serving.json."""
    data = json.loads((folder / "serving.json").read_text(encoding="utf-8"))
    mixes = {mix: [rate for rate in data["rates"] if rate["mix"] == mix] for mix in data["lone"]}
    mixes = {mix: rates for mix, rates in mixes.items() if rates}
    templates = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks"), trim_blocks=True)
    templates.globals.update(amount=amount, seconds=seconds)
    tables = {mix: _table(rates) for mix, rates in mixes.items()}
    text = templates.get_template("serving.md.j2").render(data, headline=summary(data), tables=tables)
    (folder / "serving.md").write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")
    for mix, rates in mixes.items():
        _plot(folder / f"{mix}.svg", rates, data["lone"][mix]["seconds"])


def summary(data: Mapping[str, Any]) -> list[str]:
    """What the command says at its end."""
    text: list[str] = []
    for mix, figures in data["saturation"].items():
        throughput = f"{figures['images_per_minute']:.0f} images a minute at {figures['load']:g} of capacity"
        beside = f"{_times(figures['times_none'])} without batching, {_times(figures['times_static'])} with static"
        text.append(f"{mix}: {throughput}, {beside}.")
        if figures["p99_at_half_load"] is not None:
            times = f"{figures['p99_at_half_load_over_lone']:.2f} times the latency of a call alone"
            load = f"{figures['half_load']:g} of capacity"
            simulated = f"{figures['simulated_p99_over_lone']:.2f} times in a long simulation"
            text.append(f"{mix}: p99 at {load} is {seconds(figures['p99_at_half_load'])}, {times}; {simulated}.")
    return text if data["complete"] else [*text, "interrupted: the report has what was measured until then"]


def _table(rates: Sequence[Mapping[str, Any]]) -> str:
    rows: list[dict[str, str]] = []
    for rate in rates:
        for batching, result in rate["results"].items():
            latency, ratios = result["latency"] or {}, rate["ratios"].get(batching, {})
            rows.append(
                {
                    "load": f"{rate['load']:g}: {60 * rate['rate']:.0f} a minute",
                    "batching": batching,
                    **{name: seconds(latency.get(name)) for name in ("p50", "p95", "p99")},
                    "images a minute": f"{result['images_per_minute']:.0f}",
                    "in time": f"{result['goodput_per_minute']:.0f}",
                    "refused": str(result["refused"] or ""),
                    "failed": str(result["failed"] or ""),
                    "images a call": f"{result['batch_size']:.1f}",
                    "continuous: images a minute": _times(ratios.get("images_per_minute")),
                    "continuous: in time": _times(ratios.get("goodput")),
                    "continuous: p99": _times(ratios.get("p99")),
                }
            )
    return markdown_table(rows, words=["batching"])


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} times"


def _plot(path: Path, rates: Sequence[Mapping[str, Any]], lone_seconds: float) -> None:
    """Throughput and latency over the rate at which calls come."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.name}):
        figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
        throughput, latency = figure.subplots(2, 1, sharex=True)
        offered = [60 * rate["rate"] for rate in rates]
        for batching, colour in BATCHING_COLOURS.items():
            results = [rate["results"][batching] for rate in rates]
            throughput.plot(
                offered, [r["images_per_minute"] for r in results], color=colour, marker="o", label=batching
            )
            throughput.plot(offered, [r["goodput_per_minute"] for r in results], color=colour, linestyle=(0, (3, 2)))
            for name, style in {"p50": (0, (3, 2)), "p99": "-"}.items():
                values = [r["latency"][name] if r["latency"] else None for r in results]
                latency.plot(offered, values, color=colour, linestyle=style, marker="o" if name == "p99" else "")
        throughput.plot(offered, offered, color=MUTED, linewidth=0.8, linestyle=":")
        latency.axhline(lone_seconds, color=MUTED, linewidth=0.8, linestyle=":")
        _label(throughput, "images a minute\ndashed: within the deadline")
        _label(latency, "latency in seconds: p99\ndashed: p50, dotted: a call alone")
        throughput.set_ylim(0)
        latency.set(yscale="log", xlabel="calls a minute that come")
        latency.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter()
        )
        figure.legend(loc="outside lower center", ncols=3, title="batching", handlelength=1.5)
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def _label(axes: Axes, text: str) -> None:
    axes.set_ylabel(text)
    axes.grid(axis="y")


if __name__ == "__main__":
    render(Path(sys.argv[1]))
