"""What each stage of a pipeline leaves, as a table and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mige_rt.atomic import atomic_file
from trainer.pipelines.built import BuiltShard
from trainer.plotting import make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR = 0.38  # the height of a bar, of two for each stage


def funnel_table(total: BuiltShard) -> list[dict[str, str]]:
    """A row for each stage: what is left after it, and which part that is of what came to it, or that it brought up."""
    rows: list[dict[str, str]] = []
    records, entities = total.records, 0
    for name, count in total.funnel.items():
        rows.append(
            {
                "stage": name,
                "records": f"{count.records}",
                "left": _part(count.records, records),
                "entities": f"{count.entities}" if count.new_entities or entities else "",
                "of them left": _part(count.entities, entities + count.new_entities),
            }
        )
        records, entities = count.records, count.entities
    rows.append({"stage": "samples", "records": f"{len(total.lines)}", "left": "", "entities": "", "of them left": ""})
    return rows


def plot_funnel(total: BuiltShard, path: Path) -> None:
    """Draw the funnel as a PNG: a bar of records and one of entities for each stage."""
    stages = ["input", *total.funnel]
    counts = list(total.funnel.values())
    records = [total.records, *(count.records for count in counts)]
    entities = [0, *(count.entities for count in counts)]
    figure = make_figure(7, 0.45 * len(stages) + 1.2)
    axes = figure.subplots()
    places = range(len(stages))
    _bars(axes, [place - BAR / 2 for place in places], records, "records")
    if any(entities):
        _bars(axes, [place + BAR / 2 for place in places], entities, "entities in their images")
    axes.set_yticks(list(places), stages)
    axes.invert_yaxis()
    axes.set_xlabel("left after the stage")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def _bars(axes: "Axes", places: Sequence[float], values: Sequence[int], label: str) -> None:
    bars = axes.barh(places, values, BAR, label=label)
    axes.bar_label(bars, [str(value) if value else "" for value in values], padding=3, fontsize=8)


def _part(count: int, before: int) -> str:
    return f"{count / before:.0%}" if before else ""
