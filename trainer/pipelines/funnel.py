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
    """A row for each stage: what is left after it, and which part of the stage before that is."""
    rows: list[dict[str, str]] = []
    records, things = total.records, 0
    for name, count in total.funnel.items():
        rows.append(
            {
                "stage": name,
                "records": f"{count.records}",
                "left": _part(count.records, records),
                "things": f"{count.things}" if count.things or things else "",
                "of them left": _part(count.things, things) if things else "",
            }
        )
        records, things = count.records, count.things
    rows.append({"stage": "samples", "records": f"{len(total.lines)}", "left": "", "things": "", "of them left": ""})
    return rows


def plot_funnel(total: BuiltShard, path: Path) -> None:
    """Draw the funnel as a PNG: a bar of records and one of things for each stage."""
    stages = ["input", *total.funnel]
    records = [total.records, *(count.records for count in total.funnel.values())]
    things = [0, *(count.things for count in total.funnel.values())]
    figure = make_figure(7, 0.5 * len(stages) + 1)
    axes = figure.subplots()
    places = range(len(stages))
    _bars(axes, [place - BAR / 2 for place in places], records, "records")
    if any(things):
        _bars(axes, [place + BAR / 2 for place in places], things, "things in their images")
    axes.set_yticks(list(places), stages)
    axes.invert_yaxis()
    axes.set_xlabel("left after the stage")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def _bars(axes: "Axes", places: Sequence[float], values: Sequence[int], label: str) -> None:
    bars = axes.barh(places, values, BAR, label=label)
    axes.bar_label(bars, padding=3, fontsize=8)


def _part(count: int, before: int) -> str:
    return f"{count / before:.0%}" if before else ""
