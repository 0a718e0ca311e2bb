"""What a report says, part by part."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image, ImageChops
from PIL.Image import Image as Picture

from benchmarks import formatting as words
from benchmarks import plots as figures
from benchmarks.candidates import SHORT, requests
from benchmarks.findings import Comparison, Findings, Row
from benchmarks.measure import Latency
from benchmarks.plots import Bar
from benchmarks.table import TITLES

AMPLIFIED = 8  # times, of the differences that are shown


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]
    words: tuple[int, ...] = ()  # columns that are no figures


@dataclass(frozen=True)
class Plot:
    title: str
    text: str
    svg: str


@dataclass(frozen=True)
class Section:
    """A part of the report. Plots and pictures are the page's alone; Markdown has the rest."""

    title: str
    text: list[str]
    figures: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    code: str = ""


def report_sections(found: Findings) -> list[Section]:
    made = [_speed(found, number) for number in range(len(found.cases)) if any(r.latency for r in found.of(number))]
    made += [part for part in (_over(found), _work(found), _parity(found), _grid(found), _skipped(found)) if part]
    made.append(Section("How it was measured", _method(found), facts=words.environment(found)))
    made.append(Section("Repeat it", [], code=found.command))
    return made


def _method(found: Findings) -> list[str]:
    return [
        "Each candidate is in a process of its own, and they take turns, one picture each: "
        f"{found.warmups} warm-ups that do not count, then {found.runs} rounds. Latency is the median of those, in "
        "brackets the 10th and 90th percentile, from words and pictures to the finished picture; all is encoded anew "
        "each time, except where it says that the prompt is cached.",
        "A comparison divides runs that stood next to each other, pair by pair: the median, and a bootstrap interval "
        "of 95 %. Where the interval spans 1, no difference was shown.",
        "The floor is the least that the program's arithmetic and memory traffic can take on this machine: per graph, "
        "its operations over the speed of a large matrix product in the same precision, or its bytes over that of a "
        "large copy, whichever is longer. A row counts if its pictures are those of PyTorch in float32, within the "
        "precision's tolerance.",
        f"Seconds a step come from the difference to a run of {SHORT} steps. Cold start is that of the command "
        "mige-rt run, from its start to its end. Memory is the process's own peak, the model's opening included; on "
        "a GPU, what the process holds beyond the CUDA context.",
    ]


def latency_bars(rows: list[Row], standalone: bool = False) -> str:
    items = [
        Bar(
            row.name + ("" if row.counts else " (fails parity)"),
            row.latency.median,
            words.seconds(row.latency.median),
            figures.SCALE[_kind(row)],
            (row.latency.p10, row.latency.p90),
            row.floor_seconds,
        )
        for row in rows
        if row.latency is not None
    ]
    return figures.bars(items, "seconds", standalone)


def _kind(row: Row) -> str:
    if not row.candidate.exact or row.candidate.cached:
        return "saving"
    return {"published": "program", "encode_once": "baseline"}.get(row.candidate.home.program, "ours")


def _speed(found: Findings, number: int) -> Section:
    rows, comparisons = found.of(number), [c for c in found.comparisons if c.case == number]
    timed = [row for row in rows if row.latency is not None]
    plots = [
        Plot(
            "Latency beside the floor",
            "Median; the line spans the 10th to 90th percentile, the diamond is the floor.",
            latency_bars(timed),
        )
    ]
    if comparisons:
        plots.append(
            Plot(
                "What each change is worth",
                "Times as fast as without it, with the 95 % interval; grey and hollow where no difference was shown.",
                figures.gains([(_change(comparison), comparison.ratio) for comparison in comparisons]),
            )
        )
    if number == 0:  # the others differ little in these
        plots += _inside(rows)
    return Section(f"Speed: {found.cases[number]}", [], plots, [_table(rows), *_gains(comparisons)])


def _change(comparison: Comparison) -> str:
    """A comparison in one line."""
    return comparison.after if comparison.what in comparison.after else f"{comparison.what}: {comparison.after}"


def _gains(comparisons: list[Comparison]) -> Iterator[Table]:
    if not comparisons:
        return
    yield Table(
        ["change", "from", "to", "times as fast", "95 % interval", ""],
        [
            [
                comparison.what,
                comparison.before,
                comparison.after,
                f"{comparison.ratio.value:.2f}",
                f"{comparison.ratio.low:.2f} to {comparison.ratio.high:.2f}",
                comparison.ratio.verdict,
            ]
            for comparison in comparisons
        ],
        (1, 2),
    )


def _inside(rows: list[Row]) -> Iterator[Plot]:
    """Where a candidate's time goes, and its memory."""
    parts = {row.name: {graph: took for graph, (_, took) in row.graphs.items()} for row in rows}
    totals = {name: words.seconds(sum(took.values())) for name, took in parts.items()}
    yield Plot(
        "Time per graph",
        "One run that was looked into, the device waited for at every graph.",
        figures.stacks(parts, totals, "seconds"),
    )
    if on_host := [row for row in rows if row.memory is not None and row.memory.host]:
        text = "Of the process, the opening of the model included."
        yield Plot("Peak memory of the host", text, _memory(on_host, "host"))
    if on_gpu := [row for row in rows if row.memory is not None and row.memory.gpu]:
        text = "Held by the process after its first picture, beyond the CUDA context."
        yield Plot("Memory on the GPU", text, _memory(on_gpu, "gpu"))


def _memory(rows: list[Row], which: Literal["host", "gpu"]) -> str:
    items = []
    for row in rows:
        value = getattr(row.memory, which)
        items.append(Bar(row.name, value / 1e6, words.amount(value), figures.SCALE[_kind(row)]))
    return figures.bars(items, f"MB on the {'host' if which == 'host' else 'GPU'}")


def _table(rows: list[Row]) -> Table:
    head = [
        "candidate",
        "latency",
        "floor",
        "times floor",
        "a step",
        "pictures a minute",
        "cold start",
        "host memory",
        "GPU memory",
        "parity",
    ]
    cells = [
        [
            row.name,
            words.latency(row.latency) or "not timed",
            words.seconds(row.floor_seconds),
            words.times(row.times_floor),
            words.seconds(row.seconds_a_step),
            words.times(row.pictures_a_minute),
            words.seconds(row.cold_start.median if row.cold_start else None),
            words.amount(row.memory.host if row.memory else None),
            words.amount(row.memory.gpu if row.memory else None),
            words.judged(row.fidelity) if row.fidelity.ok is not None else words.decibels(row.fidelity),
        ]
        for row in rows
    ]
    kept = [k for k in range(len(head)) if k == 0 or any(row[k] for row in cells)]
    return Table([head[k] for k in kept], [[row[k] for k in kept] for row in cells])


def _over(found: Findings) -> Section | None:
    """Latency over steps and over references, of the cases that are the first one but for that."""
    plots = []
    by_steps = _series(found, "steps")
    for row in found.of(0):
        if row.short is not None and row.latency is not None:
            by_steps.setdefault(row.name, {})[SHORT] = row.short
    for axis, series in (("steps", by_steps), ("references", _series(found, "references"))):
        series = {name: points for name, points in series.items() if len(points) > 1}
        if series:
            plots.append(
                Plot(
                    f"Latency over {axis}",
                    "Median; bars span the 10th to 90th percentile.",
                    figures.lines(series, axis),
                )
            )
    return Section("Over steps and references", ["All else as in the first case."], plots) if plots else None


def _series(found: Findings, axis: str) -> dict[str, dict[int, Latency]]:
    series: dict[str, dict[int, Latency]] = {}
    if not found.cases:
        return series
    first = {**vars(found.cases[0]), axis: None}
    for row in found.rows:
        if {**vars(found.cases[row.case]), axis: None} == first and row.latency is not None and row.counts:
            series.setdefault(row.name, {})[getattr(found.cases[row.case], axis)] = row.latency
    return series


def _work(found: Findings) -> Section | None:
    """Where the operations go, in the programs of the first case."""
    counted = {row.candidate.home.program: row.work for row in found.of(0) if row.work is not None}
    works = {title: counted[program] for program, title in TITLES.items() if program in counted}
    if len(works) < 2:
        return None

    def cells(graph: str) -> Iterator[str]:
        for work in works.values():
            yield str(work.of(graph).calls)
            yield words.amount(work.of(graph).flops, "FLOP")

    parts = {title: {w.graph: w.flops / 1e9 for w in work.graphs} for title, work in works.items()}
    totals = {title: words.amount(work.flops, "FLOP") for title, work in works.items()}
    table = Table(
        ["graph", *(f"{title}, {what}" for title in works for what in ("calls", "FLOP"))],
        [[graph, *cells(graph)] for graph in figures.GRAPH_COLOURS],
    )
    most, least = max(work.flops for work in works.values()), min(work.flops for work in works.values())
    said = [
        f"Counted, not measured, for {found.cases[0]}: the first program has {most / least:.2f} times as many as ours."
    ]
    plot = Plot("Floating-point operations by graph", "A multiply-add is two.", figures.stacks(parts, totals, "GFLOP"))
    return Section("Where the work goes", said, [plot], [table])


def _parity(found: Findings) -> Section | None:
    if not found.rows:
        return None
    head = ["case", "candidate", "compared with", "latents", "PSNR", "SSIM", "max", "verdict"]
    cells = [
        [
            str(found.cases[row.case]),
            row.name,
            row.fidelity.reference,
            f"{row.fidelity.latents:.1e}" if row.fidelity.latents else "0",
            words.decibels(row.fidelity),
            f"{row.fidelity.similarity:.4f}",
            f"{row.fidelity.max}",
            words.judged(row.fidelity),
        ]
        for row in found.rows
    ]
    start = 0 if len(found.cases) > 1 else 1
    said = [
        "The same noise through both. Latents: relative RMS error of the final ones; PSNR and SSIM of the pictures, "
        "and the largest difference of a pixel's channel, of 255. Opt-in savings are meant to differ, and are compared "
        "with the same engine's exact picture."
    ]
    return Section(
        "Parity", said, tables=[Table(head[start:], [row[start:] for row in cells], (1, 2) if start == 0 else (1,))]
    )


def _grid(found: Findings) -> Section | None:
    """The first case's first picture by every candidate, with its difference."""
    if not found.references:
        return None
    truth = found.references[0][0]
    source = requests(found.cases[0])[0].source
    assert source is not None
    shown = [_picture(source, "source", ""), _picture(truth, "reference, PyTorch fp32", "")]
    for row in found.of(0):
        picture = row.pictures[0]
        shown.append(_picture(picture, row.name, f"{words.decibels(row.fidelity)}, {words.judged(row.fidelity)}"))
        difference = ImageChops.difference(picture, truth).point(lambda value: AMPLIFIED * value)
        if row.fidelity.max > 1:
            shown.append(
                _picture(difference, f"difference of {row.name}", f"to the reference, {AMPLIFIED} times as large")
            )
    prompt = requests(found.cases[0])[0].prompt
    return Section(
        "Pictures", [f"{found.cases[0]}, “{prompt}”, seed {requests(found.cases[0])[0].seed}."], pictures=shown
    )


def _picture(picture: Picture, name: str, text: str) -> dict[str, Any]:
    if max(picture.size) > 512:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG", optimize=True)
    data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"data": data, "name": name, "text": text, "width": picture.width, "height": picture.height}


def _skipped(found: Findings) -> Section | None:
    if not found.skipped:
        return None
    rows = [[skipped["what"], skipped["why"]] for skipped in found.skipped]
    return Section(
        "Skipped",
        ["These are not here, or cannot do it; the others went on."],
        tables=[Table(["what", "why"], rows, (1,))],
    )
