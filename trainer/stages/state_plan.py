"""What the state of a stage was begun with, written beside it, so that only the same training goes on from it."""

from dataclasses import asdict
from pathlib import Path

from mige_rt.config import ModelConfig
from trainer.checkpoints.model_folder import load_model
from trainer.data.encode import fingerprint
from trainer.data.plan import write_plan
from trainer.settings import LadderSettings, StageSettings

# What may change on the way: how training goes on, and what counts how much in the loss.
FREE = (
    *("steps", "decay", "warmup", "rate", "clip", "batch"),
    *(f"ladder.{name}" for name in ("noisy", "asked", "looking", "uses", "shards")),
)


def begin_state(
    folder: Path,
    config: ModelConfig,
    settings: StageSettings,
    start: Path | None = None,
    ladder: LadderSettings | None = None,
) -> None:
    """Begin the state of a stage, or see that it was begun with the same.

    Args:
        folder: The stage's, in the state folder.
        config: The model's sizes.
        settings: How the stage is optimised.
        start: The model folder or bundle that it goes on from, if there is one; known by its weights, wherever it is.
        ladder: What it learns from, if it is the stage `mige`.

    Raises:
        InputError: It was begun with others, or `start` is no such folder.
    """
    plan = {
        "model": config.name,
        "queries": config.qformer.queries,
        "start": None if start is None else fingerprint(load_model(start)),
        **asdict(settings),
        **({} if ladder is None else {f"ladder.{name}": value for name, value in asdict(ladder).items()}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(folder, {name: value for name, value in plan.items() if name not in FREE}, allowed=None)
