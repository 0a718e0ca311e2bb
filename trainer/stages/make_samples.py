"""The samples of the stage `mige`, made before it in several processes.

On a GPU, training uses them faster than one process makes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import track

from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from trainer.data.workers import make_in_processes
from trainer.loop import steps_done
from trainer.settings import LadderSettings, StageSettings
from trainer.stages.ladder import LADDER
from trainer.stages.practice import Practice, open_practice
from trainer.stages.state_plan import begin_state
from trainer.synthetic.concepts import Concept


def make_samples(
    config: ModelConfig,
    settings: StageSettings,
    ladder: LadderSettings,
    concepts: Sequence[Concept],
    state: Path,
    start: Path | None,
    processes: int,
) -> int:
    """Make what the stage will draw from until its last step, those that it needs first before the others.

    It may run beside the stage, which makes itself what is missing. The stage removes what it has done with.

    Args:
        config: The model's sizes.
        settings: Of the stage.
        ladder: What it learns from.
        concepts: All of them.
        state: The state folder, where the samples are kept.
        start: The model folder or bundle that the stage goes on from, if there is one.
        processes: That make them, with one thread each.

    Returns:
        The number of shards.

    Raises:
        InputError: As `open_practice` and `begin_state`, not all rungs have begun, or a process ended by itself.
    """
    load = partial(_Maker.load, config, ladder, concepts, state, start)
    practice = load("cpu").practice
    if practice.climb.newest(settings.steps) < len(LADDER) - 1:
        raise InputError(
            "the stage mige finds out on its way when a rung of the ladder begins: before all have begun, its samples "
            "cannot be made before it; run it first, or go on from a model that has been up the ladder (climbed)"
        )
    begin_state(state / "mige", config, settings, start, ladder)
    steps = range(steps_done(state / "mige"), settings.steps)
    work = practice.shards_of(steps, settings.batch) if steps else []
    made = make_in_processes(_Maker.make, work, load, ["cpu"] * processes)
    return sum(1 for _ in track(made, "samples", len(work)))


@dataclass(frozen=True)
class _Maker:
    """What a process makes shards with."""

    practice: Practice
    device: torch.device

    @staticmethod
    def load(
        config: ModelConfig,
        ladder: LadderSettings,
        concepts: Sequence[Concept],
        state: Path,
        start: Path | None,
        device: str,
    ) -> "_Maker":
        _, practice = open_practice(config, ladder, concepts, state, start)
        return _Maker(practice, torch.device(device))

    def make(self, shard: tuple[str, int]) -> None:
        name, number = shard
        self.practice.shards[name].make(number)
