"""What the two guidance scales and the number of steps do, from which a model's defaults are chosen.

Writes guidance.json and guidance.png.

Measured in new scenes of concepts that the model was trained on, so that the evaluation on held-out concepts stays one
of defaults that were not chosen on them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mige_rt.instruction import Task
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams
from trainer.evaluate.identity import Gallery
from trainer.evaluate.intervals import Estimate
from trainer.evaluate.measure import measure, reconstruct, summarize
from trainer.evaluate.report import write_json
from trainer.plotting import make_figure
from trainer.preview import answer, first_of_each_kind
from trainer.synthetic.concepts import Concept

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_INFERENCE_STEPS = (4, 8, 20)
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0)
IMAGE_GUIDANCE_SCALES = (1.0, 1.5, 2.5)
LINE_STYLES = ("dotted", "dashed", "solid")  # of the numbers of steps
TASKS: tuple[Task, ...] = ("edit", "compose", "subject")
Metric = Literal["right", "found", "kept", "covered"]
METRICS: Mapping[Metric, str] = {
    "right": "edited pixels right",
    "found": "subjects found",
    "kept": "untouched pixels kept",
    "covered": "distance covered",
}


@dataclass(frozen=True)
class SweepPoint:
    """A task's metrics at one pair of guidance scales and one number of steps.

    Attributes:
        task: All kinds of samples of it together.
        num_inference_steps: Of the scheduler.
        guidance_scale: For the text.
        image_guidance_scale: For the source; None for tasks without one.
        right: Share of edited pixels, of the result, as in KindMetrics; the same for the others.
        found: Share of subjects; None where none is asked for.
        kept: Share of untouched pixels; None where there are none.
        covered: Share of the distance from the source to the ground truth; None for tasks without a source.
    """

    task: Task
    num_inference_steps: int
    guidance_scale: float
    image_guidance_scale: float | None
    right: Estimate
    found: Estimate | None
    kept: Estimate | None
    covered: Estimate | None

    @property
    def balance(self) -> float:
        """The mean of the metrics that there are: following the instruction and keeping the rest count alike."""
        shares = (self.right, self.found, self.kept, self.covered)
        present = [share.value for share in shares if share is not None]
        return sum(present) / len(present)


def known_concepts(concepts: Sequence[Concept]) -> list[Concept]:
    """Concepts that the model was trained on, evenly spread, about as many as are held out."""
    known = [concept for concept in concepts if not concept.held_out]
    return known[:: max(1, len(known) // max(1, len(concepts) - len(known)))]


def sweep(
    pipe: MigePipeline,
    concepts: Sequence[Concept],
    seed: int,
    samples_per_kind: int,
    on_progress: Callable[[str, int, int], None] = lambda description, done, total: None,
) -> list[SweepPoint]:
    """Measure each task at every pair of scales and number of steps, on the same samples and with the same noise.

    Args:
        pipe: The model.
        concepts: What the samples show; subjects are told apart among them.
        seed: Of the series of samples; sample k's noise has `seed` + k.
        samples_per_kind: The first so many of the series.
        on_progress: Called before each point with what is measured, how many points are done, and of how many.

    Raises:
        InputError: The weights of the network that recognizes subjects are not installed.
    """
    samples = first_of_each_kind(concepts, pipe.config.size, seed, samples_per_kind)
    gallery = Gallery(concepts, pipe.config.size)
    points = []
    for task in TASKS:
        of_task = [sample for sample in samples if sample.task == task]
        truths = reconstruct(pipe, [sample.target for sample in of_task])
        image_scales: Sequence[float | None] = (None,) if task == "subject" else IMAGE_GUIDANCE_SCALES
        settings = list(product(NUM_INFERENCE_STEPS, image_scales, GUIDANCE_SCALES))
        for done, (steps, image, text) in enumerate(settings):
            on_progress(f"scales and steps of {task}", done, len(settings))
            params = SamplingParams(num_inference_steps=steps, guidance_scale=text, image_guidance_scale=image)
            results = answer(pipe, of_task, params, seed)
            metrics = summarize(
                [
                    measure(sample, np.asarray(result), truth, None, gallery, baselines=False)
                    for sample, result, truth in zip(of_task, results, truths, strict=True)
                ]
            )
            found, kept = metrics.found.get("result"), metrics.kept.get("result")
            points.append(SweepPoint(task, steps, text, image, metrics.right["result"], found, kept, metrics.covered))
    return points


def choose(points: Sequence[SweepPoint]) -> dict[str, SweepPoint]:
    """The best balanced point of each task; of equal ones the one with the fewest steps and the smallest scales."""
    return {
        task: max(
            (point for point in points if point.task == task),
            key=lambda p: (p.balance, -p.num_inference_steps, -p.guidance_scale, -(p.image_guidance_scale or 0)),
        )
        for task in TASKS
    }


def write_sweep(points: Sequence[SweepPoint], run: Mapping[str, Any], folder: Path) -> None:
    """Write guidance.json and guidance.png.

    Args:
        points: Of all tasks.
        run: What they depend on, from `report.describe_run`.
        folder: An existing folder for the files.
    """
    best = {
        task: {
            "num_inference_steps": point.num_inference_steps,
            "guidance_scale": point.guidance_scale,
            "image_guidance_scale": point.image_guidance_scale,
            "balance": point.balance,
        }
        for task, point in choose(points).items()
    }
    all_points = [{**asdict(point), "balance": point.balance} for point in points]
    write_json(folder / "guidance.json", {**run, "points": all_points, "best_balanced": best})
    plot(points, folder / "guidance.png")


def plot(points: Sequence[SweepPoint], path: Path) -> None:
    """Plot a column of axes for each task and a row for each metric, over the guidance scale, as a PNG.

    Args:
        points: Of all tasks; those of one image guidance scale and one number of steps are joined by a line.
        path: Where the PNG is written.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = make_figure(11, 8)
    grid = figure.subplots(len(METRICS), len(TASKS), sharex=True, sharey="row", squeeze=False)
    for axes_row, (metric, title) in zip(grid, METRICS.items(), strict=True):
        for axes, task in zip(axes_row, TASKS, strict=True):
            _plot_lines(axes, [point for point in points if point.task == task], metric)
        axes_row[0].set_ylabel(title)
    for axes, task in zip(grid[0], TASKS, strict=True):
        axes.set_title(task)
    for column in grid.T:
        lowest = [axes for axes in column if axes.axison][-1]
        lowest.set_xlabel("guidance scale")
        lowest.tick_params(labelbottom=True)
    # In the corner that tasks without a source leave empty.
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="lower right", fontsize="small", handlelength=3)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _plot_lines(axes: "Axes", points: Sequence[SweepPoint], metric: Metric) -> None:
    """Draw a line for each image guidance scale, by color, and number of steps, by style; hide axes without any."""
    image_scales = list(dict.fromkeys(point.image_guidance_scale for point in points))
    all_steps = list(dict.fromkeys(point.num_inference_steps for point in points))
    drawn = False
    for (color, image_scale), (index, steps) in product(enumerate(image_scales), enumerate(all_steps)):
        of_line = [p for p in points if (p.image_guidance_scale, p.num_inference_steps) == (image_scale, steps)]
        shares = [(p.guidance_scale, share.value) for p in of_line if (share := getattr(p, metric)) is not None]
        if not shares:
            continue
        drawn = True
        of_source = "" if image_scale is None else f", image guidance scale {image_scale:g}"
        axes.plot(
            [scale for scale, _ in shares],
            [100 * share for _, share in shares],
            marker="o",
            markersize=3,
            color=f"C{color}",
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            label=f"{steps} steps{of_source}",
        )
    if not drawn:
        axes.set_axis_off()
        return
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
