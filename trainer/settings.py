"""A training config file: TOML, one table a stage, read into frozen dataclasses."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mige_rt.config import PRESETS, ModelConfig
from mige_rt.errors import InputError

TRAINED = ("vae", "vit", "looks", "qformer", "mige")  # the stages that train


@dataclass(frozen=True)
class StageSettings:
    """How one stage is optimised. Rates warm up linearly, stay constant, and fall linearly to a tenth at the end."""

    steps: int
    batch: int
    rate: float  # AdamW's learning rate
    warmup: int  # steps
    decay: int  # steps at the end over which the rate falls
    weight_decay: float
    epsilon: float  # AdamW's
    clip: float  # the gradient's norm
    ema: float  # decay of the weights' moving average, per step
    seed: int  # of the world's samples, and of every draw in training


@dataclass(frozen=True)
class LadderSettings:
    """What the stage mige learns from. Samples are made as they are needed, in shards that are used a few times."""

    shards: int  # kept of each rung
    shard_samples: int
    uses: int  # draws of a sample, on average
    varied: float  # share of the things that are varied
    noisy: float  # share of the timesteps that are drawn from the noisiest
    asked: float  # what a pixel of what is asked for counts for, against 1 for any other
    draws: int  # of noise and timestep for each encoded prompt
    seed: int


@dataclass(frozen=True)
class TrainingSettings:
    """A config file: a preset's name, and the tables of the stages that it is for."""

    path: Path
    model: str
    queries: int | None  # image tokens, where they are not the preset's
    stages: Mapping[str, StageSettings]
    climb: LadderSettings | None

    def config(self) -> ModelConfig:
        """The sizes of the model to train. Raises InputError when there is no such preset."""
        if self.model not in PRESETS:
            raise InputError(f"{self.path}: model is {self.model!r}, expected one of {', '.join(PRESETS)}")
        preset = PRESETS[self.model]
        if self.queries is None:
            return preset
        return replace(preset, qformer=replace(preset.qformer, queries=self.queries))

    def stage(self, name: str) -> StageSettings:
        """The table of a stage that trains. Raises InputError when the file has none."""
        if name not in self.stages:
            raise InputError(f"{self.path} has no table [{name}]")
        return self.stages[name]

    def ladder(self) -> LadderSettings:
        """The table of what the stage mige learns from. Raises InputError when the file has none."""
        if self.climb is None:
            raise InputError(f"{self.path} has no table [ladder]")
        return self.climb


def _table(kind: type[Any], data: dict[str, Any], where: str) -> Any:
    names = {field.name: field.type for field in fields(kind)}
    wrong = [f"unknown {name}" for name in data if name not in names] + [f"missing {n}" for n in names if n not in data]
    for name, expected in names.items():
        value = data.get(name)
        if value is not None and type(value) is not expected and not (expected is float and type(value) is int):
            wrong.append(f"{name} is {value!r}, expected {getattr(expected, '__name__', expected)}")
    if wrong:
        raise InputError(f"{where}: {'; '.join(wrong)}")
    return kind(**data)


def load_settings(path: Path) -> TrainingSettings:
    """Read a config file. Raises InputError that names what is missing, unknown or of a wrong type in a table."""
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} cannot be read as a TOML file: {error}") from error
    model, queries = data.pop("model", None), data.pop("queries", None)
    unknown = [name for name, table in data.items() if name not in (*TRAINED, "ladder") or type(table) is not dict]
    if queries is not None and (type(queries) is not int or queries < 1):
        raise InputError(f"{path}: queries is {queries!r}, expected a number of image tokens")
    if type(model) is not str or unknown:
        what = f"unknown {', '.join(unknown)}" if unknown else f"model is {model!r}, expected a preset's name"
        raise InputError(f"{path}: {what}; it has a model and tables [{'], ['.join((*TRAINED, 'ladder'))}]")
    tables = {
        name: _table(LadderSettings if name == "ladder" else StageSettings, table, f"{path} [{name}]")
        for name, table in data.items()
    }
    return TrainingSettings(
        path, model, queries, {n: t for n, t in tables.items() if n != "ladder"}, tables.get("ladder")
    )
