"""A study's config: a folder with study.toml and a file for each arm."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, MinLen

from mige_rt.config import PRESETS, ModelConfig, PositiveInt
from mige_rt.errors import InputError
from mige_rt.instruction import Task
from mige_rt.validation import validate
from trainer.settings import LadderSettings, Seed, StageSettings, read_toml, with_queries
from trainer.synthetic.tasks import ALL_KINDS

STUDY_FILE = "study.toml"
Shares = Mapping[str, Annotated[float, Gt(0)]]


@dataclass(frozen=True)
class Arm:
    """What one arm is trained on, and how.

    Attributes:
        title: Shown in tables.
        tasks: How many samples of each task there are, in any unit; a task left out is never trained.
        fusion: The VAE's features are fused into the image tokens (paper, section 3.2); else the tokens are the
            Q-Former's alone.
        multimodal: Instructions refer to the source by an image; else by the words "the image" alone, in training and
            evaluation.
    """

    title: str
    tasks: Mapping[Task, Annotated[float, Gt(0)]]
    fusion: bool
    multimodal: bool


@dataclass(frozen=True)
class _StudyFile:
    """The keys of study.toml."""

    model: str
    seeds: Annotated[tuple[Seed, ...], MinLen(1)]
    evaluated: PositiveInt
    common_kinds: Shares
    kinds: Mapping[Task, Shares]
    data: dict[str, Any]
    common: dict[str, Any]
    arms: dict[str, Any]
    queries: PositiveInt | None = None


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        model: The sizes of the model.
        seeds: Of each arm's runs: of the order of its samples, their noise and timesteps.
        evaluated: Samples of each kind in the evaluation of a run.
        common_kinds: How often each kind is drawn before the arms part.
        kinds: How often each kind is drawn among the samples of a task, in the arms.
        data: How many samples are made, and how they are used.
        common: How the common start is optimised.
        optimisation: How each arm is, from there on; the seed is one of `seeds`.
        arms: By name.
    """

    model: ModelConfig
    seeds: tuple[int, ...]
    evaluated: int
    common_kinds: Mapping[str, float]
    kinds: Mapping[Task, Mapping[str, float]]
    data: LadderSettings
    common: StageSettings
    optimisation: StageSettings
    arms: Mapping[str, Arm]


def load_study(folder: Path) -> Study:
    """Read a study's config.

    Args:
        folder: study.toml, and NAME.toml for each arm, as in trainer/configs/study.

    Raises:
        InputError: A file is missing or cannot be read, or the message names what is unknown, missing or wrong in it.
    """
    path = folder / STUDY_FILE
    file = validate(_StudyFile, read_toml(path), str(path))
    if file.model not in PRESETS:
        raise InputError(f"{path}: model is {file.model!r}, expected one of {', '.join(PRESETS)}")
    for kinds in (file.common_kinds, *file.kinds.values()):
        if unknown := [kind for kind in kinds if kind not in ALL_KINDS]:
            raise InputError(f"{path}: there is no kind {unknown[0]!r}; expected some of {', '.join(ALL_KINDS)}")
    arms = {
        arm_path.stem: validate(Arm, read_toml(arm_path), str(arm_path))
        for arm_path in sorted(folder.glob("*.toml"))
        if arm_path.name != STUDY_FILE
    }
    if not arms:
        raise InputError(f"{folder} has no arm: write NAME.toml, as in trainer/configs/study")
    for name, arm in arms.items():
        if missing := [task for task in arm.tasks if task not in file.kinds]:
            raise InputError(f"{path} has no table [kinds.{missing[0]}], which the arm {name} needs; write one")
    return Study(
        model=with_queries(PRESETS[file.model], file.queries),
        seeds=file.seeds,
        evaluated=file.evaluated,
        common_kinds=file.common_kinds,
        kinds=file.kinds,
        data=validate(LadderSettings, file.data, f"{path} [data]"),
        common=validate(StageSettings, file.common, f"{path} [common]"),
        optimisation=validate(StageSettings, file.arms, f"{path} [arms]"),
        arms=arms,
    )
