"""A bench as files: report.json; report.md with its plots and images; report.html, the same as one page on its own.

`python -m benchmarks.report FOLDER` writes the last two and the plots anew from report.json.
"""

import base64
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from PIL import ImageChops
from PIL.Image import fromarray

from benchmarks import plots
from benchmarks.bench_results import BenchResults
from benchmarks.case import SHORT_STEPS, VARIANT_TITLES, requests
from benchmarks.formatting import amount, interval, json_text, markdown_table, seconds

AMPLIFICATION = 8  # times, of the differences that are shown
MAX_SIDE = 256  # pixels of the images that are shown
VERDICTS = {True: "ok", False: "FAILED", None: "meant to differ"}

Data = Mapping[str, Any]


def write_report(results: BenchResults, folder: Path) -> None:
    """Write the files into an existing folder."""
    (folder / "report.json").write_text(json_text(results.to_json()), encoding="utf-8")
    if results.references:
        (folder / "images").mkdir()
        truth, source = fromarray(results.references[0].images[0]), requests(results.cases[0])[0].source
        assert source is not None
        shown = {"source": source, "reference": truth}
        for number, result in enumerate(result for result in results.results if result.case == results.cases[0]):
            shown[f"{number}"] = image = fromarray(result.run.images[0])
            difference = ImageChops.difference(image, truth)
            shown[f"{number}-difference"] = difference.point(lambda level: AMPLIFICATION * level)
        for name, image in shown.items():
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            image.save(folder / "images" / f"{name}.png", optimize=True)
    render(folder)


def render(folder: Path) -> None:
    """Write the plots, report.md and report.html from report.json and the images."""
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    templates = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks"), trim_blocks=True)
    text = templates.get_template("report.md.j2").render(data, **_parts(data, folder))
    text = re.sub(r"\n{3,}", "\n\n", text) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    page = templates.get_template("report.html.j2").render(title=data["model"]["name"], body=_html(text, folder))
    (folder / "report.html").write_text(page + "\n", encoding="utf-8")


def _parts(data: Data, folder: Path) -> dict[str, Any]:
    """What the template shows besides the data; plots are written."""
    gpus = [f"{gpu['name']} ({gpu['memory']}, driver {gpu['driver']})" for gpu in data["environment"]["gpus"]]
    judged = [result for result in data["results"] if result["fidelity"]["ok"] is not None]
    verdict, failed = f"**all {len(judged)} judged results pass parity**" if judged else "", len(data["failed"])
    if failed:
        verdict = f"**{failed} result{'s fail' if failed > 1 else ' fails'} parity, not counted**"
    first, skipped = _of(data, 0), [[skipped["name"], skipped["reason"]] for skipped in data["skipped"]]
    sections = [(f"Speed: {case['title']}", _speed(data, number, folder)) for number, case in enumerate(data["cases"])]
    sections.append(("Over steps and references", "\n".join(_axis_plots(data, folder))))
    sections += [("Where the work goes", _work(first, folder)), ("Parity", _parity(data))]
    sections.append(("Images", _images(first) if (folder / "images").is_dir() else ""))
    sections.append(("Skipped", markdown_table(["name", "reason"], skipped, (1,)) if skipped else ""))
    return {
        "headline": _headline(data),
        "verdict": verdict,
        "gpus": ", ".join(gpus) or "no GPU",
        "sections": [(title, text) for title, text in sections if text],
        "machine_table": _machine(data),
        "amount": amount,
        "short_steps": SHORT_STEPS,
    }


def _of(data: Data, case: int) -> list[dict[str, Any]]:
    return [result for result in data["results"] if result["case"] == case]


def _html(text: str, folder: Path) -> str:
    """The Markdown as HTML that needs no other file; a cell knows its header, which a phone shows beside it."""
    markdown = MarkdownIt("commonmark").enable("table")
    tokens = markdown.parse(text)
    headers: list[str] = []
    column = 0
    for token, content in pairwise(tokens):
        if token.type == "thead_open":
            headers = []
        elif token.type == "th_open":
            headers.append(content.content)
        elif token.type == "td_open":
            token.attrSet("data-label", headers[column % len(headers)])
            column = column + 1 if column + 1 < len(headers) else 0
    html = markdown.renderer.render(tokens, markdown.options, {})

    def inline(image: re.Match[str]) -> str:
        path, alt = folder / image["path"], image["alt"]
        if path.suffix != ".svg":
            return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        svg = re.sub(r"^.*?(?=<svg)", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        return f'<figure aria-label="{alt}"><figcaption>{alt}</figcaption>{svg}</figure>'

    return re.sub(r'<img src="(?P<path>[^"]+)" alt="(?P<alt>[^"]*)" />', inline, html)


def summary(data: Data) -> list[str]:
    """What the command says at its end."""
    text = _headline(data) if data["results"] else []
    text += [f"skipped: {s['name']}: {s['reason']}" for s in data["skipped"] if not s["invalid_output"]]
    text += [f"parity fails, so it does not count: {failure}" for failure in data["failed"]]
    return text if data["complete"] else [*text, "interrupted: the report has what was measured until then"]


def _headline(data: Data) -> list[str]:
    """What matters most, of the first case."""
    plain = [r for r in data["results"] if r["case"] == 0 and r["counts"] and r["candidate"]["plain"]]
    if not plain:
        return ["No candidate was measured whose images are right."]
    best, case = min(plain, key=lambda result: result["latency"]["median"]), data["cases"][0]
    images = "an image" if case["batch"] == 1 else f"a batch of {case['batch']}"
    roofline = f", {best['times_roofline']:.1f} times its roofline" if best["times_roofline"] else ""
    time = f"{seconds(best['latency']['median'])} for {images}, from prompt and images to the finished image{roofline}"
    text = [f"{case['title']}: {best['name']} takes {time}."]
    for c in data["speedups"]:
        if (c["case"], c["change"], c["candidate"]) == (0, "all together", best["name"]):
            text.append(f"Beside {c['baseline']}, in the same run: {interval(c['speedup'])} times as fast.")
    return text


def _speed(data: Data, number: int, folder: Path) -> str:
    results, changes = _of(data, number), [change for change in data["speedups"] if change["case"] == number]
    if not any(result["latency"] for result in results):
        return ""
    parts = [] if number else [_speed_plots(results, changes, folder)]  # the other cases differ little in these
    rows = []
    for result in results:
        latency, memory, fidelity = result["latency"] or {}, result["memory"] or {}, result["fidelity"]
        median, p10, p90 = (seconds(latency.get(key)) for key in ("median", "p10", "p90"))
        row = [result["name"], f"{median} ({p10} to {p90})" if latency else "not timed"]
        row += [seconds(result["roofline_seconds"]), _factor(result["times_roofline"])]
        row += [seconds(result["seconds_per_step"]), _factor(result["images_per_minute"])]
        row += [seconds((result["cold_start"] or {}).get("median")), amount(memory.get("host"))]
        rows.append([*row, amount(memory.get("gpu")), VERDICTS[fidelity["ok"]]])
    headers = ["candidate", "latency", "roofline", "times roofline", "a step", "images a minute", "cold start"]
    parts.append(markdown_table([*headers, "host memory", "GPU memory", "parity"], rows))
    if changes:
        rows = [[c["change"], c["baseline"], c["candidate"], interval(c["speedup"]), c["verdict"]] for c in changes]
        parts.append(markdown_table(["change", "from", "to", "times as fast", "verdict"], rows, (1, 2, 4)))
    return "\n\n".join(parts)


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _speed_plots(results: list[dict[str, Any]], changes: list[dict[str, Any]], folder: Path) -> str:
    latencies, graphs, memory = [], [], []
    for result in results:
        name, candidate, latency = result["name"], result["candidate"], result["latency"]
        optional = candidate["prompt_cached"] or not candidate["exact"]
        colour = plots.COLOURS["optional" if optional else candidate["variant"]]
        if result["memory"] and (host := result["memory"]["host"]):
            memory.append(plots.Bar(name, {colour: host / 1e6}, amount(host)))
        parts = {plots.GRAPH_COLOURS[graph]: of["seconds"] for graph, of in result["graphs"].items()}
        graphs.append(plots.Bar(name, parts, seconds(sum(parts.values()))))
        if latency:
            name += "" if result["counts"] else " (fails parity)"
            bar = plots.Bar(name, {colour: latency["median"]}, seconds(latency["median"]))
            latencies.append(replace(bar, spread=(latency["p10"], latency["p90"]), roofline=result["roofline_seconds"]))
    items = []
    for change in changes:
        name, candidate = change["change"], change["candidate"]
        items.append((candidate if name in candidate else f"{name}: {candidate}", change["speedup"]))
    plots.bars(folder / "latency.svg", latencies, "seconds; line: 10th to 90th percentile, diamond: roofline")
    plots.speedups(folder / "speedups.svg", items)
    plots.bars(folder / "graphs.svg", graphs, "seconds of one traced run", plots.GRAPH_COLOURS)
    names = {"latency": "Latency beside the roofline", "speedups": "What each change is worth"}
    names |= {"graphs": "Time per graph"}
    if memory:
        plots.bars(folder / "memory.svg", memory, "MB")
        names |= {"memory": "Peak memory of the host"}
    return "\n".join(f"![{title}]({name}.svg)" for name, title in names.items())


def _axis_plots(data: Data, folder: Path) -> Iterator[str]:
    """Latency over steps and over references, of the cases that are the first one but for that."""
    for axis, key in (("steps", "num_inference_steps"), ("references", "references")):
        series: dict[str, dict[int, Any]] = {}
        for result in data["results"]:
            case = data["cases"][result["case"]]
            others = [name for name in case if name not in (key, "title", "task", "tokens")]
            if result["counts"] and all(case[name] == data["cases"][0][name] for name in others):
                series.setdefault(result["name"], {})[case[key]] = result["latency"]
                if axis == "steps" and result["short"]:
                    series[result["name"]].setdefault(SHORT_STEPS, result["short"])
        if series := {name: points for name, points in series.items() if len(points) > 1}:
            plots.lines(folder / f"{axis}.svg", series, axis)
            yield f"![Latency over {axis}]({axis}.svg)"


def _work(results: list[dict[str, Any]], folder: Path) -> str:
    """Where the operations go, in the variants of the first case."""
    counted = {result["candidate"]["variant"]: result["work"] for result in results if result["work"]}
    works = {title: counted[variant] for variant, title in VARIANT_TITLES.items() if variant in counted}
    if len(works) < 2:
        return ""
    bars, headers, rows = [], ["graph"], [[graph] for graph in plots.GRAPH_COLOURS]
    for title, work in works.items():
        parts = {plots.GRAPH_COLOURS[graph]: of["flops"] / 1e9 for graph, of in work["graphs"].items()}
        bars.append(plots.Bar(title, parts, amount(work["flops"], "FLOP")))
        headers += [f"{title}, calls", f"{title}, FLOP"]
        for row in rows:
            of = work["graphs"][row[0]]
            row += [str(of["calls"]), amount(of["flops"], "FLOP")]
    plots.bars(folder / "work.svg", bars, "GFLOP", plots.GRAPH_COLOURS)
    counted_for = "Counted, not measured, for the first case; a multiply-add is two operations."
    plot = "![Floating-point operations by graph](work.svg)"
    return "\n\n".join((counted_for, plot, markdown_table(headers, rows)))


def _parity(data: Data) -> str:
    rows = []
    for result in data["results"]:
        fidelity, errors = result["fidelity"], result["fidelity"]["errors"]
        latents = "not finite" if errors["latents"] is None else f"{errors['latents']:.1e}"
        values = [latents, _decibels(fidelity), f"{errors['ssim']:.4f}", str(errors["max_difference"])]
        case = data["cases"][result["case"]]["title"]
        rows.append([result["name"], case, fidelity["reference"], *values, VERDICTS[fidelity["ok"]]])
    headers = ["candidate", "case", "compared with", "latents", "PSNR", "SSIM", "max", "verdict"]
    return markdown_table(headers, rows, (1, 2, 7)) if rows else ""


def _decibels(fidelity: Data) -> str:
    return f"{fidelity['errors']['psnr']:.1f} dB" if fidelity["errors"]["max_difference"] else "identical"


def _images(results: list[dict[str, Any]]) -> str:
    """The first case's first image by every candidate, with its difference."""
    rows = [[name, f"![{name}](images/{name}.png)", "", ""] for name in ("source", "reference")]
    for number, result in enumerate(results):
        name, fidelity = result["name"], result["fidelity"]
        difference = f"![difference of {name}](images/{number}-difference.png)"
        verdict = f"{_decibels(fidelity)}, {VERDICTS[fidelity['ok']]}"
        rows.append([name, f"![{name}](images/{number}.png)", difference, verdict])
    return markdown_table(["by", "image", f"difference x {AMPLIFICATION}", "fidelity"], rows, (1, 2, 3))


def _machine(data: Data) -> str:
    env, peaks = data["environment"], data["peaks"] or {"flops": {}, "bytes": 0}
    threads = [f"{name}={value}" for name, value in env["threads"].items() if value]
    threads += sorted({f"PyTorch {n}" for result in data["results"] if (n := result["opened"]["torch_threads"])})
    rates = [f"{amount(rate, 'FLOP/s')} in {precision}" for precision, rate in peaks["flops"].items()]
    rates += [f"{amount(peaks['bytes'], 'B/s')} of a large copy"] if rates else []
    rows = [["model", f"{data['model']['name']}, trained for {data['model']['size']} pixels"]]
    rows += [["system", env["system"]], ["threads", ", ".join(threads)], ["peaks", ", ".join(rates)]]
    rows += [["versions", ", ".join(f"{name} {number}" for name, number in env["versions"].items())]]
    rows += [["commit", (env["commit"] or "not in a git checkout").replace("+", ", with changes")]]
    return markdown_table(["machine", "measured on"], rows, (1,))


if __name__ == "__main__":
    render(Path(sys.argv[1]))
