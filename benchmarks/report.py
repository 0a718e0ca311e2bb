"""A bench as files: report.html, one page that needs nothing else; report.md, for a pull request; report.json; and
latency.svg, the page's main plot."""

import json
from pathlib import Path

import jinja2

from benchmarks import formatting as words
from benchmarks.findings import Findings
from benchmarks.sections import Section, latency_bars, report_sections

SHARPEST = 256  # side in pixels of pictures that are shown enlarged without smoothing


def write_report(found: Findings, folder: Path) -> None:
    """Write the four files into an existing folder."""
    sections = report_sections(found)
    side = max((max(picture.size) for pictures in found.references for picture in pictures), default=0)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("benchmarks"), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("report.html.j2")
    page = template.render(
        title=_title(found),
        where=words.where(found),
        states=_states(found),
        headline=words.headline(found),
        cards=_cards(found),
        sections=sections,
        rendering="pixelated" if side <= SHARPEST else "auto",
    )
    (folder / "report.html").write_text(page + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(found, sections), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    if timed := [row for row in found.of(0) if row.latency is not None]:
        (folder / "latency.svg").write_text(latency_bars(timed, standalone=True), encoding="utf-8")


def _title(found: Findings) -> str:
    return f"mige-rt bench: {found.model['name']}"


def _states(found: Findings) -> list[dict[str, str]]:
    states = []
    if not found.complete:
        states.append({"kind": "warn", "text": "incomplete: interrupted, what was measured until then"})
    judged = [row for row in found.rows if row.fidelity.ok is not None]
    if found.failed:
        number = len(found.failed)
        states.append(
            {"kind": "bad", "text": f"{number} row{'s fail' if number > 1 else ' fails'} parity, not counted"}
        )
    elif judged:
        states.append({"kind": "good", "text": f"all {len(judged)} judged rows pass parity"})
    return states


def _cards(found: Findings) -> list[dict[str, str]]:
    rows = [row for row in found.of(0) if row.counts and row.candidate.plain and row.latency is not None]
    if not rows:
        return []
    best = min(rows, key=lambda row: row.latency.median if row.latency else 0)
    gains = [c for c in found.comparisons if c.case == 0 and c.after == best.name and c.what == "all together"]
    made = "a picture" if best.batch == 1 else f"a batch of {best.batch}"
    cards = [(f"{best.name}, {made}", words.seconds(best.latency.median if best.latency else None))]
    cards += [("times as fast as published", f"{gain.ratio.value:.1f}") for gain in gains]
    cards.append(("times its floor", words.times(best.times_floor)))
    cards.append(("a step", words.seconds(best.seconds_a_step)))
    cards.append(("pictures a minute", words.times(best.pictures_a_minute)))
    cards.append(("cold start to picture", words.seconds(best.cold_start.median if best.cold_start else None)))
    cards.append(("peak memory of the host", words.amount(best.memory.host if best.memory else None)))
    cards.append(("memory held on the GPU", words.amount(best.memory.gpu if best.memory else None)))
    return [{"name": name, "value": value} for name, value in cards if value]


def _markdown(found: Findings, sections: list[Section]) -> str:
    lines = [f"# {_title(found)}", "", words.where(found), ""]
    lines += [f"**{state['text']}**\n" for state in _states(found)]
    lines += [f"{sentence}\n" for sentence in words.headline(found)]
    if any(row.latency for row in found.of(0)):
        lines += ["![Latency of each candidate beside its floor](latency.svg)", ""]
    for section in sections:
        if not (section.tables or section.facts or section.code):
            continue
        lines += [f"## {section.title}", "", *(f"{sentence}\n" for sentence in section.text)]
        for table in section.tables:
            marks = [":---" if k == 0 or k in table.words else "---:" for k in range(len(table.head))]
            rows = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
            lines += [f"| {' | '.join(row)} |" for row in (table.head, marks, *rows)] + [""]
        lines += [f"- {name}: {value}" for name, value in section.facts] + [""] * bool(section.facts)
        lines += ["```bash", section.code, "```", ""] if section.code else []
    return "\n".join(lines).rstrip() + "\n"
