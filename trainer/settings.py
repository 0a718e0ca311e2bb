"""A training config file: TOML, one table a stage, read into frozen dataclasses."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mige_rt.errors import InputError

TRAINED = ("vae", "vit", "qformer", "mige")  # the stages that train


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
class FeatureSettings:
    """The scenes whose latents and ViT features are computed once for training."""

    shards: int
    shard_samples: int
    seed: int


@dataclass(frozen=True)
class TrainingSettings:
    """A config file: a preset's name, and the tables of the stages that it is for."""

    path: Path
    model: str
    stages: Mapping[str, StageSettings]
    scenes: FeatureSettings | None

    def stage(self, name: str) -> StageSettings:
        """The table of a stage that trains. Raises InputError when the file has none."""
        if name not in self.stages:
            raise InputError(f"{self.path} has no table [{name}]")
        return self.stages[name]

    def features(self) -> FeatureSettings:
        """The table of the stage features. Raises InputError when the file has none."""
        if self.scenes is None:
            raise InputError(f"{self.path} has no table [features]")
        return self.scenes


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
    model = data.pop("model", None)
    unknown = [name for name, table in data.items() if name not in (*TRAINED, "features") or type(table) is not dict]
    if type(model) is not str or unknown:
        what = f"unknown {', '.join(unknown)}" if unknown else f"model is {model!r}, expected a preset's name"
        raise InputError(f"{path}: {what}; it has a model and tables [{'], ['.join((*TRAINED, 'features'))}]")
    tables = {
        name: _table(FeatureSettings if name == "features" else StageSettings, table, f"{path} [{name}]")
        for name, table in data.items()
    }
    return TrainingSettings(path, model, {n: t for n, t in tables.items() if n != "features"}, tables.get("features"))
