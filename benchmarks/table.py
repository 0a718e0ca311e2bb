"""The counted work as tables: rows for the terminal, and Markdown."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mige_rt.graphs import GRAPHS
from mige_rt.instruction import Task

if TYPE_CHECKING:
    from benchmarks.variants import Program
    from benchmarks.work import GraphWork, Work

TITLES: "dict[Program, str]" = {"published": "as published", "encode_once": "encode once", "ours": "ours"}


def table_rows(works: "Mapping[Program, Work]") -> list[list[str]]:
    """The heads, a row a graph, and one of totals: what each program costs, how many times the operations of ours the
    published one needs, and which share of the operations saved lies there."""
    published, once, ours = works["published"], works["encode_once"], works["ours"]
    saved = published.flops - ours.flops
    large = published.flops > 1e12
    flop, byte = (1e12, 1e9) if large else (1e9, 1e6)
    flops_unit, bytes_unit = ("TFLOP", "GB") if large else ("GFLOP", "MB")

    def numbers(work: "Work | GraphWork") -> list[str]:
        return [f"{work.flops / flop:.4g}", f"{work.bytes / byte:.4g}"]

    def compared(old: int, new: int) -> list[str]:
        return [f"{old / new:.2f}" if new else "", f"{(old - new) / saved:.1%}" if saved else ""]

    heads = ["graph", "as published: calls", flops_unit, bytes_unit, f"encode once: {flops_unit}"]
    rows = [[*heads, "ours: calls", flops_unit, bytes_unit, "ratio", "of the saving"]]
    for graph in GRAPHS:
        old, all_rows, new = published.of(graph), once.of(graph), ours.of(graph)
        cells = [graph, str(old.calls), *numbers(old), numbers(all_rows)[0], str(new.calls), *numbers(new)]
        rows.append([*cells, *compared(old.flops, new.flops)])
    cells = ["total", "", *numbers(published), numbers(once)[0], "", *numbers(ours)]
    return [*rows, [*cells, *compared(published.flops, ours.flops)]]


def markdown(introduction: str, works: "Mapping[Task, Mapping[Program, Work]]", described: Mapping[Task, str]) -> str:
    """The table of editing per graph, and the totals of every task; described: what each task's picture is."""
    lines = ["# The work of a picture at full size", "", introduction, "", f"## Editing: {described['edit']}", ""]
    lines += _table(table_rows(works["edit"]))
    lines += ["", "## The three tasks, TFLOP in all", ""]
    totals = [
        [
            f"{task}: {described[task]}",
            *(f"{programs[program].flops / 1e12:.4g}" for program in TITLES),
            f"{programs['published'].flops / programs['ours'].flops:.2f}",
        ]
        for task, programs in works.items()
    ]
    return "\n".join([*lines, *_table([["task", *TITLES.values(), "ratio"], *totals])]) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    heads, *others = rows
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *others)]
