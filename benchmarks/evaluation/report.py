"""A judgement as files: report.json, report.md, and report.html, one page with the tables and a gallery."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt

from benchmarks.evaluation.judge import Judged, Judgement, TableRow
from benchmarks.evaluation.metrics import METRICS, higher_is_better
from benchmarks.evaluation.paper import PAPER
from benchmarks.evaluation.sample import AnyImageFile, BenchmarkSample, ImageFile, image_labels
from export.formatting import json_text, markdown_table
from mige_rt.atomic import atomic_file
from mige_rt.errors import InputError
from trainer.evaluate.intervals import CONFIDENCE, RESAMPLES, Estimate

THUMBNAIL = 192  # pixels of a gallery image's longer side
LISTED = 10  # images with notes that the report names


@dataclass(frozen=True)
class Tile:
    """An image of the gallery with what it was made from; images are data URLs."""

    title: str
    prompt: str
    images: Mapping[str, str]


def write_report(judgement: Judgement, folder: Path, command: str) -> str:
    """Write the files; existing ones are replaced.

    Args:
        judgement: What was measured.
        folder: An existing one.
        command: That made the report.

    Returns:
        The Markdown, with the tables.
    """
    templates = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks"), trim_blocks=True, autoescape=False)
    text = templates.get_template("evaluation.md.j2").render(_context(judgement), command=command)
    text = re.sub(r"\n{3,}", "\n\n", text) + "\n"
    escaping = templates.overlay(autoescape=True)  # prompts come from files of others
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    title = f"{judgement.benchmark.title}: {judgement.judged.results.id.title}"
    page = escaping.get_template("evaluation.html.j2").render(title=title, body=body, gallery=_gallery(judgement))
    content = {"command": command, **to_json(judgement)}
    for name, written in (("report.json", json_text(content)), ("report.md", text), ("report.html", page + "\n")):
        with atomic_file(folder / name) as file:
            file.write_text(written, encoding="utf-8")
    return text


def to_json(judgement: Judgement) -> dict[str, Any]:
    """The content of report.json; scores by image stand in scores.jsonl."""
    benchmark, judged = judgement.benchmark, judgement.judged
    number, paper = PAPER.get(benchmark.layout, (None, {}))
    return {
        "benchmark": {
            "layout": benchmark.layout,
            "title": benchmark.title,
            "fingerprint": benchmark.fingerprint(),
            "samples": len(benchmark.samples),
            "seeds": benchmark.seeds,
            "compared_with": benchmark.compared,
            "empty_rows": benchmark.empty_rows(),
            "notes": benchmark.notes,
        },
        "results": asdict(judged.results.id),
        "images": {"expected": judged.expected, "judged": len(judged.scores), "unreadable": judged.unreadable},
        "encoders": {role: asdict(name) for role, name in judgement.encoders.items()},
        "missing": [asdict(missing) for missing in judgement.missing],
        "rows": [_row_json(row) for row in judged.rows],
        "paper": {"table": number, "rows": paper},
        "against": None if judgement.against is None else asdict(judgement.against.results.id),
        "parity": [_row_json(row) for row in judgement.parity],
        "intervals": {"confidence": CONFIDENCE, "method": "percentile bootstrap over groups", "resamples": RESAMPLES},
        "notes": {name: score.notes for name, score in judged.scores.items() if score.notes},
    }


def _row_json(row: TableRow) -> dict[str, Any]:
    metrics = {name: {**asdict(value), "images": row.counts[name]} for name, value in row.metrics.items()}
    return {"name": row.name, "metrics": metrics, "subjects": row.subjects[0], "subjects_not_found": row.subjects[1]}


def _context(judgement: Judgement) -> dict[str, Any]:
    benchmark, judged = judgement.benchmark, judgement.judged
    number, paper = PAPER.get(benchmark.layout, (None, {}))
    rows = [_cells(row.name, row.metrics, max(row.counts.values(), default=0)) for row in judged.rows]
    rows += [_paper_cells(f"MIGE, as in the paper: {name}", values) for name, values in paper.items()]
    notes = {name: score.notes for name, score in judged.scores.items() if score.notes}
    return {
        "benchmark": benchmark,
        "judged": judged,
        "against": judgement.against,
        "table_number": number,
        "table": markdown_table(rows),
        "counts": _count_table(judged.rows),
        "parity": markdown_table(
            [_cells(row.name, row.metrics, max(row.counts.values(), default=0)) for row in judgement.parity]
        ),
        "verdicts": [_verdict(row) for row in judgement.parity],
        "subjects": [row for row in judged.rows if row.subjects[0]],
        "encoders": judgement.encoders,
        "missing": judgement.missing,
        "noted": [f"{name}: {'; '.join(reasons)}" for name, reasons in list(notes.items())[:LISTED]],
        "noted_number": len(notes),
        "unreadable": list(judged.unreadable.items())[:LISTED],
        "confidence": f"{CONFIDENCE:.0%}",
        "resamples": RESAMPLES,
    }


def _cells(name: str, values: Mapping[str, Estimate], images: int) -> dict[str, str]:
    texts = {metric: value.text("{:.3f}") for metric, value in values.items()}
    return {"row": name, "images": str(images), **{_header(m): texts.get(m, "") for m in METRICS}}


def _paper_cells(name: str, values: Mapping[str, float]) -> dict[str, str]:
    numbers = {metric: f"{value:.3f}" for metric, value in values.items()}
    return {"row": name, "images": "", **{_header(metric): numbers.get(metric, "") for metric in METRICS}}


def _header(metric: str) -> str:
    return f"{metric} {'↑' if higher_is_better(metric) else '↓'}"


def _count_table(rows: Sequence[TableRow]) -> str:
    """How many images each metric is over, where that differs within a row."""
    differing = [row for row in rows if len(set(row.counts.values())) > 1]
    cells = [{"row": r.name, **{m: str(r.counts.get(m, "")) for m in METRICS}} for r in differing]
    return markdown_table(cells)


def _verdict(row: TableRow) -> str:
    """Which metrics of a parity row differ for certain."""
    different = [
        metric
        for metric, value in row.metrics.items()
        if value.low is not None and value.high is not None and (value.low > 0 or value.high < 0)
    ]
    if not different:
        return f"{row.name}: no difference shown"
    return f"{row.name}: different in {', '.join(different)}"


def _gallery(judgement: Judgement) -> list[tuple[str, list[Tile]]]:
    """The worst, the median and the best image by each metric."""
    samples = {name: sample for sample, _, name in judgement.benchmark.image_names()}
    sections = []
    for metric in METRICS:
        values = ((s.metrics[metric], name) for name, s in judgement.judged.scores.items() if metric in s.metrics)
        ranked = sorted(values, reverse=not higher_is_better(metric))
        if ranked:
            places = {"worst": 0, "median": len(ranked) // 2, "best": len(ranked) - 1}
            tiles = [
                _tile(f"{place}: {ranked[k][0]:.3f}", ranked[k][1], samples[ranked[k][1]], judgement.judged)
                for place, k in places.items()
            ]
            sections.append((_header(metric), tiles))
    return sections


def _tile(title: str, name: str, sample: BenchmarkSample, judged: Judged) -> Tile:
    shown: dict[str, AnyImageFile] = {
        label: image for image, label in image_labels(sample.images, sample.source).items()
    }
    if sample.truth is not None and sample.truth != sample.source:
        shown["ground truth"] = sample.truth
    shown["result"] = ImageFile(judged.results.image(name))
    images = {label: _data_url(image) for label, image in shown.items()}
    return Tile(f"{title} ({name})", sample.prompt, images)


def _data_url(image: AnyImageFile) -> str:
    try:
        small = image.open()
    except InputError:  # which the report says elsewhere
        return ""
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = BytesIO()
    small.save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
