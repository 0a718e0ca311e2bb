"""A study's report: study.json, study.md with tables in the shape of the paper's tables 1 to 3, and study.png."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from mige_rt.atomic import atomic_file
from mige_rt.instruction import Task
from trainer.evaluate.metrics import rounded
from trainer.plotting import make_figure
from trainer.study.config import Arm, Study

Result = Mapping[str, Any]  # as `measure_run` returns it
KINDS_OF_TASK: Mapping[Task, tuple[str, ...]] = {
    "subject": ("generate", "another_ground"),
    "edit": ("recolour", "remove", "recolour_subject", "move", "resize", "restyle", "light", "weather"),
    "compose": ("add", "replace"),
}


@dataclass(frozen=True)
class Column:
    """A metric of a table.

    Attributes:
        name: Its title.
        format: Of a value.
        value: Of one run: the metric's mean over kinds.
    """

    name: str
    format: str
    value: Callable[[Result, Sequence[str]], float]


def _loss(result: Result, kinds: Sequence[str]) -> float:
    return float(np.mean([result["losses"][kind] for kind in kinds]))


def _metric(*path: str) -> Callable[[Result, Sequence[str]], float]:
    """A metric of evaluation.json by its keys, as the mean over the kinds that have it."""

    def value(result: Result, kinds: Sequence[str]) -> float:
        values = []
        for kind in kinds:
            at: Any = result["metrics"][kind]
            for key in path:
                at = None if at is None else at.get(key)
            if at is not None:
                values.append(at["value"])
        return float(np.mean(values)) if values else float("nan")

    return value


LOSS = Column("held-out loss", "{:.3f}", _loss)
FOUND = Column("found first", "{:.0%}", _metric("found", "result"))
BEYOND = Column("PSNR beyond its mean colour, dB", "{:+.1f}", _metric("beyond_flat"))
COVERED = Column("way covered", "{:.0%}", _metric("covered"))
KEPT = Column("untouched pixels kept", "{:.0%}", _metric("kept", "result"))
# One for each of the paper's tables: the task, its title, and the metrics.
TABLES: tuple[tuple[Task, str, tuple[Column, ...]], ...] = (
    ("subject", "Subject-driven generation (as the paper's table 1)", (LOSS, FOUND, BEYOND)),
    ("edit", "Instruction-based editing (as the paper's table 2)", (LOSS, COVERED, KEPT)),
    ("compose", "Adding and replacing (as the paper's table 3)", (LOSS, COVERED, FOUND, KEPT)),
)


@dataclass(frozen=True)
class Report:
    """All results of a study: by arm, then by seed."""

    study: Study
    results: Mapping[str, Mapping[int, Result]]

    def to_json(self) -> dict[str, Any]:
        """The content of study.json."""
        study = self.study
        return {
            "seeds": study.seeds,
            "samples_per_kind": study.evaluated,
            "common": {"optimisation": asdict(study.common), "kinds": study.common_kinds},
            "arms": {
                name: {
                    **asdict(arm),
                    "runs": {str(seed): result for seed, result in self.results[name].items()},
                    "tables": {task: self._values(name, task, columns) for task, _, columns in TABLES},
                }
                for name, arm in study.arms.items()
            },
            "optimisation": asdict(study.optimisation),
            "versions": {"python": platform.python_version(), "torch": version("torch")},
        }

    def _values(self, name: str, task: Task, columns: Sequence[Column]) -> dict[str, list[float]]:
        """Each metric's values, one for each seed."""
        runs = self.results[name].values()
        return {column.name: [column.value(result, KINDS_OF_TASK[task]) for result in runs] for column in columns}

    def markdown(self) -> str:
        """The content of study.md."""
        study = self.study
        samples = study.optimisation.steps * study.optimisation.batch
        number = len(study.seeds)
        cells = (
            "of one seed" if number == 1 else f"the mean of {number} seeds, with the lowest and the highest in brackets"
        )
        text = (
            "# Tasks trained together\n\n"
            f"Every arm goes on from one common start ({study.common.steps:,} steps) by "
            f"{study.optimisation.steps:,} steps of {study.optimisation.batch} samples, {samples:,} in all, whatever "
            f"it is trained on. Each cell is {cells}; on held-out concepts, {study.evaluated} samples a kind. A "
            "dagger: the arm has not been trained on the task.\n"
        )
        for task, title, columns in TABLES:
            rows = [
                [
                    arm.title + ("" if task in arm.tasks else " †"),
                    *(
                        _cell(values, column.format)
                        for column, values in zip(columns, self._values(name, task, columns).values(), strict=True)
                    ),
                ]
                for name, arm in study.arms.items()
            ]
            table = tabulate(
                rows, ["arm", *(column.name for column in columns)], tablefmt="github", disable_numparse=True
            )
            text += f"\n## {title}\n\n{table}\n"
        return text

    def write(self, folder: Path) -> None:
        """Write study.json, study.md, and study.png."""
        with atomic_file(folder / "study.json") as temporary:
            temporary.write_text(json.dumps(rounded(self.to_json()), indent=1) + "\n", encoding="utf-8")
        with atomic_file(folder / "study.md") as temporary:
            temporary.write_text(self.markdown(), encoding="utf-8")
        self._plot(folder / "study.png")

    def _plot(self, path: Path) -> None:
        """The held-out loss of each arm by task: a bar for the mean, a dot for each seed."""
        arms: Sequence[tuple[str, Arm]] = [*self.study.arms.items()]
        figure = make_figure(11, 0.45 * len(arms) + 1.2)
        axes = figure.subplots(1, len(TABLES), sharey=True)
        for axis, (task, title, _) in zip(axes, TABLES, strict=True):
            for place, (name, arm) in enumerate(arms):
                values = self._values(name, task, [LOSS])[LOSS.name]
                color = "tab:blue" if task in arm.tasks else "lightgrey"
                axis.barh(place, np.mean(values), color=color, height=0.6)
                axis.plot(values, [place] * len(values), "k.", markersize=4)
            axis.set_title(title.partition(" (")[0], fontsize=10)
            axis.set_xlabel("held-out loss")
            axis.set_yticks(range(len(arms)), [arm.title for _, arm in arms])
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].invert_yaxis()
        figure.suptitle("grey: not trained on the task", x=0.99, ha="right", fontsize=8, color="grey")
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def _cell(values: Sequence[float], form: str) -> str:
    if any(np.isnan(value) for value in values):
        return "-"
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(np.mean(values))} [{form.format(min(values))}, {form.format(max(values))}]"
