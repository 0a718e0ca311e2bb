"""A bench as files: report.json; report.md with its plots; report.html, the same as one page on its own.

`python -m benchmarks.report FOLDER` writes all but report.json anew from it.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt

from benchmarks import plots
from benchmarks.bench_results import BenchResults
from benchmarks.case import VARIANT_TITLES
from export.formatting import amount, interval, json_text, seconds

VERDICTS = {True: "ok", False: "FAILED", None: "meant to differ"}


def write_report(results: BenchResults, folder: Path) -> None:
    """Write the files into an existing folder."""
    (folder / "report.json").write_text(json_text(results.to_json()), encoding="utf-8")
    render(folder)


def render(folder: Path) -> None:
    """Write the plots, report.md and report.html from report.json."""
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    templates = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks"), trim_blocks=True)
    templates.globals.update(amount=amount, interval=interval, seconds=seconds, verdicts=VERDICTS)
    context = {"headline": _headline(data), "plots": _plots(data, folder)}
    text = templates.get_template("report.md.j2").render(data, **context)
    text = re.sub(r"\n{3,}", "\n\n", text) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    page = templates.get_template("report.html.j2").render(title=data["model"]["name"], body=_html(text, folder))
    (folder / "report.html").write_text(page + "\n", encoding="utf-8")


def _html(text: str, folder: Path) -> str:
    """The Markdown as HTML that needs no other file."""

    def inline(image: re.Match[str]) -> str:
        svg = re.sub(r"^.*?(?=<svg)", "", (folder / image["path"]).read_text(encoding="utf-8"), flags=re.DOTALL)
        return f'<figure aria-label="{image["alt"]}"><figcaption>{image["alt"]}</figcaption>{svg}</figure>'

    html = MarkdownIt("commonmark").enable("table").render(text)
    return re.sub(r'<img src="(?P<path>[^"]+)" alt="(?P<alt>[^"]*)" />', inline, html)


def summary(data: Mapping[str, Any]) -> list[str]:
    """What the command says at its end."""
    text = _headline(data) if data["results"] else []
    text += [f"skipped: {s['name']}: {s['reason']}" for s in data["skipped"] if not s["invalid_output"]]
    text += [f"parity fails, so it does not count: {failure}" for failure in data["failed"]]
    return text if data["complete"] else [*text, "interrupted: the report has what was measured until then"]


def _headline(data: Mapping[str, Any]) -> list[str]:
    """What matters most, of the first case."""
    plain = [r for r in data["results"] if r["case"] == 0 and r["counts"] and r["candidate"]["plain"]]
    if not plain:
        return ["No candidate was measured whose images are right."]
    best = min(plain, key=lambda result: result["latency"]["median"])
    roofline = f", {best['times_roofline']:.1f} times its roofline" if best["times_roofline"] else ""
    time = f"{seconds(best['latency']['median'])} from prompt and images to the finished image{roofline}"
    text = [f"{data['cases'][0]['title']}: {best['name']} takes {time}."]
    for c in data["speedups"]:
        if (c["case"], c["change"], c["candidate"]) == (0, "all together", best["name"]):
            text.append(f"Beside {c['baseline']}, in the same run: {interval(c['speedup'])} times as fast.")
    return text


def _plots(data: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write the plots of the first case; their titles by their files' names."""
    latencies, graphs, works = [], [], {}
    for result in (result for result in data["results"] if result["case"] == 0):
        name, candidate, latency, work = (result[key] for key in ("name", "candidate", "latency", "work"))
        colour = plots.COLOURS[candidate["variant"] if candidate["exact"] else "optional"]
        if latency:
            shown = name if result["counts"] else f"{name} (fails parity)"
            ends, text = (latency["p10"], latency["p90"]), seconds(latency["median"])
            latencies.append(plots.Bar(shown, {colour: latency["median"]}, text, ends, result["roofline_seconds"]))
        parts = {plots.GRAPH_COLOURS[graph]: of["seconds"] for graph, of in result["graphs"].items()}
        graphs.append(plots.Bar(name, parts, seconds(sum(parts.values()))))
        if work:
            parts = {plots.GRAPH_COLOURS[graph]: of["flops"] / 1e9 for graph, of in work["graphs"].items()}
            title = VARIANT_TITLES[candidate["variant"]]
            works[title] = plots.Bar(title, parts, amount(work["flops"], "FLOP"))
    speedups = []
    for change in (change for change in data["speedups"] if change["case"] == 0):
        name, candidate, speedup = change["change"], change["candidate"], change["speedup"]
        colour = plots.MUTED if change["verdict"] == "no difference shown" else plots.COLOURS["ours"]
        bar = {colour: speedup["value"]}, f"{speedup['value']:.2f}x", (speedup["low"], speedup["high"])
        speedups.append(plots.Bar(candidate if name in candidate else f"{name}: {candidate}", *bar))
    colours, compared = plots.GRAPH_COLOURS, list(works.values()) if len(works) > 1 else []
    files = {
        "latency": ("Latency beside the roofline", latencies, "seconds; line: p10 to p90, diamond: roofline", None),
        "speedups": ("What each change is worth", speedups, "times as fast; line: 95 % interval", None),
        "graphs": ("Time per graph", graphs, "seconds of one traced run", colours),
        "work": ("Floating-point operations by graph", compared, "GFLOP", colours),
    }
    for name, (_, items, unit, legend) in files.items():
        if items:
            plots.bars(folder / f"{name}.svg", items, unit, legend)
    return {f"{name}.svg": title for name, (title, items, *_) in files.items() if items}


if __name__ == "__main__":
    render(Path(sys.argv[1]))
