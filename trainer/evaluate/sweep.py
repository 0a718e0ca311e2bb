"""What the two guidance scales do, from which a model's defaults are chosen: guidance.json and guidance.png.

It is measured on things that the model knows, in new scenes, so that the evaluation on things held out stays one of
defaults that were not chosen on them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mige_rt.errors import InputError
from mige_rt.instruction import Task
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams
from trainer.evaluate.identity import Gallery
from trainer.evaluate.measure import figures, measure, through_vae
from trainer.evaluate.metrics import Estimate
from trainer.evaluate.report import circumstances, write_json
from trainer.preview import answer, first_of_each_kind
from trainer.synthetic.concepts import Concept

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
SOURCE_SCALES = (1.0, 1.5, 2.5)
TASKS: tuple[Task, ...] = ("edit", "compose", "subject")
SHOWN = {"right": "edited pixels right", "found": "subjects found", "kept": "untouched pixels kept"}


@dataclass(frozen=True)
class Point:
    """The shares of all samples of a task at one pair of scales; as in Figures, of the result."""

    task: Task
    guidance_scale: float
    image_guidance_scale: float | None
    right: Estimate
    found: Estimate | None
    kept: Estimate | None

    @property
    def balance(self) -> float:
        """The mean of what there is: obedience and faithfulness count alike."""
        present = [share.value for share in (self.right, self.found, self.kept) if share is not None]
        return sum(present) / len(present)


def known_concepts(concepts: Sequence[Concept]) -> list[Concept]:
    """About as many of those trained on as are held out, evenly spread."""
    known = [concept for concept in concepts if not concept.held_out]
    return known[:: max(1, len(known) // max(1, len(concepts) - len(known)))]


def sweep(
    pipe: MigePipeline,
    concepts: Sequence[Concept],
    seed: int,
    each: int,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Point]:
    """A point for each task and pair of scales; the same samples and seeds at all of them."""
    samples = first_of_each_kind(concepts, pipe.config.size, seed, each)
    gallery = Gallery(concepts, pipe.config.size)
    gallery.network  # noqa: B018 - fails here rather than after the first pictures
    points = []
    for task in TASKS:
        of_task = [sample for sample in samples if sample.task == task]
        truths = through_vae(pipe, [sample.target for sample in of_task])
        sources: Sequence[float | None] = (None,) if task == "subject" else SOURCE_SCALES
        pairs = [(text, source) for source in sources for text in TEXT_SCALES]
        for done, (text, source) in enumerate(pairs):
            if on_progress is not None:
                on_progress(f"scales of {task}", done, len(pairs))
            results = answer(pipe, of_task, SamplingParams(guidance_scale=text, image_guidance_scale=source), seed)
            found = figures(
                [
                    measure(sample, np.asarray(result), truth, None, gallery, baselines=False)
                    for sample, result, truth in zip(of_task, results, truths, strict=True)
                ]
            )
            shares = (of.get("result") for of in (found.right, found.found, found.kept))
            right, subjects, kept = shares
            assert right is not None
            points.append(Point(task, text, source, right, subjects, kept))
    return points


def choose(points: Sequence[Point]) -> dict[str, Point]:
    """The best balanced point of each task; of equal ones the smallest scales."""
    return {
        task: max(
            (p for p in points if p.task == task),
            key=lambda p: (p.balance, -p.guidance_scale, -(p.image_guidance_scale or 0)),
        )
        for task in TASKS
    }


def write_sweep(pipe: MigePipeline, points: Sequence[Point], seed: int, each: int, folder: Path) -> None:
    """guidance.json and guidance.png into a folder."""
    chosen = {
        task: {
            "guidance_scale": point.guidance_scale,
            "image_guidance_scale": point.image_guidance_scale,
            "balance": point.balance,
        }
        for task, point in choose(points).items()
    }
    data: dict[str, Any] = circumstances(pipe, seed, each)
    data |= {"points": [{**asdict(point), "balance": point.balance} for point in points], "best_balanced": chosen}
    write_json(folder / "guidance.json", data)
    plot(points, folder / "guidance.png")


def check_matplotlib() -> None:
    """Raises InputError if it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("the plot needs matplotlib; install it with: pip install 'mige-rt[eval]'") from error


def plot(points: Sequence[Point], path: Path) -> None:
    """A PNG: a column for each task, a row for each share, over the text scale, a line for each source scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(SHOWN), len(TASKS), sharex=True, sharey="row", squeeze=False)
    for axes_row, (name, title) in zip(grid, SHOWN.items(), strict=True):
        for axes, task in zip(axes_row, TASKS, strict=True):
            _lines(axes, [point for point in points if point.task == task], name)
            if name == next(iter(SHOWN)):
                axes.set_title(task)
        axes_row[0].set_ylabel(title)
    for column in grid.T:
        lowest = [axes for axes in column if axes.axison][-1]
        lowest.set_xlabel("text scale")
        lowest.tick_params(labelbottom=True)
    grid[0, 0].legend(*grid[0, 0].get_legend_handles_labels(), fontsize="small")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _lines(axes: "Axes", points: Sequence[Point], name: str) -> None:
    for source in dict.fromkeys(point.image_guidance_scale for point in points):
        shown = [(p.guidance_scale, getattr(p, name)) for p in points if p.image_guidance_scale == source]
        scales = [scale for scale, share in shown if share is not None]
        shares = [share for _, share in shown if share is not None]
        if not shares:
            axes.set_axis_off()
            continue
        label = None if source is None else f"source scale {source:g}"
        (line,) = axes.plot(scales, [100 * share.value for share in shares], marker="o", label=label)
        low, high = [100 * share.low for share in shares], [100 * share.high for share in shares]
        axes.fill_between(scales, low, high, alpha=0.12, color=line.get_color())
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
