"""A training config file: TOML with a preset's name and one table for each stage, checked against these types."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from mige_rt.config import PRESETS, ModelConfig, PositiveInt
from mige_rt.errors import InputError
from mige_rt.validation import validate
from trainer.stages.ladder import LADDER

TRAINED = ("vae", "vit", "looks", "qformer", "mige")  # the stages that train
LARGEST_SEED = 2**32 - 1  # torch's generators take 64 bits, of which each step of a run has a number of its own
NonNegativeInt = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Le(LARGEST_SEED)]


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
    seed: Seed


@dataclass(frozen=True)
class LadderSettings:
    """What the stage `mige` learns from. Samples are made as they are needed, and used a few times.

    Attributes:
        shards: Files of samples that are kept for each rung of the ladder.
        shard_samples: Samples in each file.
        uses: How often a sample is drawn, on average, before newer ones take its place.
        varied: Share of the concepts whose images are varied, 0 to 1.
        noisy: Share of the timesteps that are drawn from the noisiest, 0 to 1; the others are drawn from all.
        looking: Weight of the loss of where attention looks (trainer/stages/looking.py).
        asked: Weight of the loss where an image shows what the instruction asks for; it is 1 elsewhere.
        draws: Draws of noise and timestep for each encoded prompt.
        seed: Seed of the synthetic samples.
        climbed: Whether the model that training goes on from (--start) has been up the ladder: nothing of it starts
            anew, and all rungs are mixed from the first step on.
        edits: How often each kind of edit is drawn in the last rung, in any unit; None: as in SHARES of
            trainer/synthetic/tasks.py. What is measured on the way stays the same.
    """

    shards: PositiveInt
    shard_samples: PositiveInt
    uses: PositiveInt
    varied: Annotated[float, Ge(0), Le(1)]
    noisy: Annotated[float, Ge(0), Le(1)]
    asked: Annotated[float, Gt(0)]
    looking: Annotated[float, Ge(0)]
    draws: PositiveInt
    seed: Seed
    climbed: bool = False
    edits: dict[str, Annotated[float, Gt(0)]] | None = None


@dataclass(frozen=True)
class _ConfigFile:
    """A config file's keys. Tables are validated one by one afterwards, so that a message names the table."""

    model: str | None = None
    queries: PositiveInt | None = None
    vae: dict[str, Any] | None = None
    vit: dict[str, Any] | None = None
    looks: dict[str, Any] | None = None
    qformer: dict[str, Any] | None = None
    ladder: dict[str, Any] | None = None
    mige: dict[str, Any] | None = None


@dataclass(frozen=True)
class TrainingSettings:
    """A config file's content: the name of a preset, and the tables that the file has.

    Attributes:
        path: The file.
        model: A key of mige_rt.config.PRESETS.
        queries: Image tokens of the model, where they are not the preset's.
        stages: The tables of the stages that train, by name.
        ladder_table: The table of what the stage `mige` learns from; None where the file has none.
    """

    path: Path
    model: str
    queries: int | None
    stages: Mapping[str, StageSettings]
    ladder_table: LadderSettings | None

    def stage(self, name: str) -> StageSettings:
        """The table of a stage that trains, one of TRAINED.

        Raises:
            InputError: The file has no such table.
        """
        if name not in self.stages:
            raise InputError(f"{self.path} has no table [{name}]; write one, as in trainer/configs/tiny.toml")
        return self.stages[name]

    def ladder(self) -> LadderSettings:
        """The table of what the stage `mige` learns from.

        Raises:
            InputError: The file has no such table.
        """
        if self.ladder_table is None:
            raise InputError(f"{self.path} has no table [ladder]; write one, as in trainer/configs/tiny.toml")
        return self.ladder_table

    def config(self) -> ModelConfig:
        """The sizes of the model to train."""
        return with_queries(PRESETS[self.model], self.queries)


def with_queries(config: ModelConfig, queries: int | None) -> ModelConfig:
    """The same sizes with another number of image tokens, if one is given."""
    return config if queries is None else replace(config, qformer=replace(config.qformer, queries=queries))


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        InputError: It cannot be read, or is none.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} cannot be read as a TOML file: {error}") from error


def load_settings(path: Path) -> TrainingSettings:
    """Read a config file.

    Args:
        path: A TOML file as in trainer/configs.

    Raises:
        InputError: The file cannot be read, or the message names what is unknown, missing or wrong in it.
    """
    file = validate(_ConfigFile, read_toml(path), str(path))
    if file.model is None or file.model not in PRESETS:
        raise InputError(f"{path}: model is {file.model!r}, expected one of {', '.join(PRESETS)}")
    stages = {
        name: validate(StageSettings, table, f"{path} [{name}]")
        for name in TRAINED
        if (table := getattr(file, name)) is not None
    }
    ladder = None if file.ladder is None else validate(LadderSettings, file.ladder, f"{path} [ladder]")
    if ladder is not None and ladder.edits and (unknown := sorted(ladder.edits.keys() - LADDER[-1].shares.keys())):
        expected = ", ".join(LADDER[-1].shares)
        raise InputError(f"{path} [ladder.edits]: there is no edit {', '.join(unknown)}; expected are {expected}")
    return TrainingSettings(path, file.model, file.queries, stages, ladder)
