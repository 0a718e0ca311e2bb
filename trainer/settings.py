"""A training config file: TOML with a preset's name and one table for each stage, validated by pydantic."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)
from pydantic.dataclasses import dataclass

from mige_rt.config import PRESETS
from mige_rt.errors import InputError
from mige_rt.validation import validation_message

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)  # strict: "3" is not 3


@dataclass(frozen=True, config=_STRICT)
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
    rate: PositiveFloat
    warmup: NonNegativeInt
    decay: NonNegativeInt
    weight_decay: NonNegativeFloat
    epsilon: PositiveFloat
    clip: PositiveFloat
    ema: Annotated[float, Field(ge=0, le=1)]
    seed: NonNegativeInt


@dataclass(frozen=True, config=_STRICT)
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


class _ConfigFile(BaseModel):
    """A config file's keys. Tables are validated one by one afterwards, so that a message names the table."""

    model_config = _STRICT

    model: str
    vae: dict[str, Any] | None = None
    vit: dict[str, Any] | None = None
    features: dict[str, Any] | None = None
    qformer: dict[str, Any] | None = None
    mige: dict[str, Any] | None = None

    @field_validator("model", mode="before")
    @classmethod
    def _is_preset(cls, value: object) -> object:
        if not isinstance(value, str) or value not in PRESETS:
            raise ValueError(f"expected one of {', '.join(PRESETS)}")
        return value


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


_Table = TypeVar("_Table", StageSettings, FeatureSettings)


def _table(kind: type[_Table], values: dict[str, Any], where: str) -> _Table:
    try:
        return kind(**values)
    except ValidationError as error:
        raise InputError(validation_message(error, where, kind)) from error


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
    try:
        file = _ConfigFile.model_validate({"model": None, **content})  # so that a missing model is answered with names
    except ValidationError as error:
        raise InputError(validation_message(error, str(path), _ConfigFile)) from error
    stages = {
        name: _table(StageSettings, values, f"{path} [{name}]")
        for name, values in (("vae", file.vae), ("vit", file.vit), ("qformer", file.qformer), ("mige", file.mige))
        if values is not None
    }
    features = None if file.features is None else _table(FeatureSettings, file.features, f"{path} [features]")
    return TrainingSettings(path, file.model, stages, features)
