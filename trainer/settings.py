"""A training config file: TOML with a preset's name and one table for each stage, checked against these types."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from mige_rt.config import PRESETS, PositiveInt
from mige_rt.errors import InputError
from mige_rt.validation import validate

NonNegativeInt = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class StageSettings:
    """How one stage is optimised by AdamW.

    The learning rate warms up linearly, stays constant, and falls linearly to a tenth at the end.

    Attributes:
        steps: Number of optimiser steps.
        batch: Samples in a step, in each process.
        rate: Peak learning rate.
        warmup: Steps over which the rate rises.
        decay: Steps at the end over which it falls.
        weight_decay: AdamW's weight decay.
        epsilon: AdamW's epsilon.
        clip: Largest norm of the gradient.
        ema: Decay per step of the weights' exponential moving average, 0 to 1.
        seed: Seed of the synthetic samples and of every random draw in training.
    """

    steps: PositiveInt
    batch: PositiveInt
    rate: Annotated[float, Gt(0)]
    warmup: NonNegativeInt
    decay: NonNegativeInt
    weight_decay: Annotated[float, Ge(0)]
    epsilon: Annotated[float, Gt(0)]
    clip: Annotated[float, Gt(0)]
    ema: Annotated[float, Ge(0), Le(1)]
    seed: NonNegativeInt


@dataclass(frozen=True)
class FeatureSettings:
    """The samples whose latents and ViT features are computed once, before training.

    Attributes:
        shards: Number of files.
        shard_samples: Samples in each file.
        seed: Seed of the synthetic samples.
    """

    shards: PositiveInt
    shard_samples: PositiveInt
    seed: NonNegativeInt


@dataclass(frozen=True)
class _ConfigFile:
    """A config file's keys. Tables are validated one by one afterwards, so that a message names the table."""

    model: str | None = None
    vae: dict[str, Any] | None = None
    vit: dict[str, Any] | None = None
    features: dict[str, Any] | None = None
    qformer: dict[str, Any] | None = None
    mige: dict[str, Any] | None = None


@dataclass(frozen=True)
class TrainingSettings:
    """A config file's content: the name of a preset, and the tables that the file has.

    Attributes:
        path: The file.
        model: A key of mige_rt.config.PRESETS.
        stages: The tables of the stages that train, by name.
        feature_table: The table of the stage `features`; None where the file has none.
    """

    path: Path
    model: str
    stages: Mapping[str, StageSettings]
    feature_table: FeatureSettings | None

    def stage(self, name: str) -> StageSettings:
        """The table of a stage that trains: vae, vit, qformer or mige.

        Raises:
            InputError: The file has no such table.
        """
        if name not in self.stages:
            raise InputError(f"{self.path} has no table [{name}]; write one, as in trainer/configs/tiny.toml")
        return self.stages[name]

    def features(self) -> FeatureSettings:
        """The table of the stage `features`.

        Raises:
            InputError: The file has no such table.
        """
        if self.feature_table is None:
            raise InputError(f"{self.path} has no table [features]; write one, as in trainer/configs/tiny.toml")
        return self.feature_table


def load_settings(path: Path) -> TrainingSettings:
    """Read a config file.

    Args:
        path: A TOML file as in trainer/configs.

    Raises:
        InputError: The file cannot be read, or the message names what is unknown, missing or wrong in it.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} cannot be read as a TOML file: {error}") from error
    file = validate(_ConfigFile, content, str(path))
    if file.model is None or file.model not in PRESETS:
        raise InputError(f"{path}: model is {file.model!r}, expected one of {', '.join(PRESETS)}")
    stages = {
        name: validate(StageSettings, table, f"{path} [{name}]")
        for name, table in (("vae", file.vae), ("vit", file.vit), ("qformer", file.qformer), ("mige", file.mige))
        if table is not None
    }
    features = None if file.features is None else validate(FeatureSettings, file.features, f"{path} [features]")
    return TrainingSettings(path, file.model, stages, features)
