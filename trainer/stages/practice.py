"""The samples of the ladder's rungs: those to train on, mixed as the rung that was reached says, and those held out."""

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mige_rt.config import ModelConfig
from mige_rt.tokenizer import load_tokenizer
from trainer.data.plan import write_plan
from trainer.loop import steps_done
from trainer.model.mige import Mige
from trainer.settings import LadderSettings, StageSettings
from trainer.stages.features import Batch, FeatureMaker, RollingShards, collate
from trainer.stages.ladder import KEPT_EDITS, LADDER, Climb, counts
from trainer.stages.one_shot import OneShot, one_shot
from trainer.stages.starting_model import climbed_model, with_trained_encoder
from trainer.stages.state_tokenizer import state_tokenizer
from trainer.stages.trained_part import TrainedPart
from trainer.synthetic.concepts import Concept
from trainer.synthetic.sample import Sample
from trainer.synthetic.tasks import make_sample

HELD_OUT_SEED = 10**6 + 4
HELD_OUT = 48  # samples of each rung


@dataclass(frozen=True)
class Practice:
    """The samples of each rung, and where on the ladder training is."""

    maker: FeatureMaker
    shards: dict[str, RollingShards]
    climb: Climb
    ladder: LadderSettings

    def batches(self, settings: StageSettings, step: int, rank: int, ranks: int) -> Iterator[Batch]:
        """The batches from a step on.

        They are the same whenever it is called, as long as the rungs begin at the same steps.

        Args:
            settings: The size of a batch, and the seed.
            step: The first step.
            rank: The process's.
            ranks: Number of processes.

        Yields:
            A batch.
        """
        assert (rank, ranks) == (0, 1)  # `train_mige` has seen to it
        while True:
            rng = np.random.default_rng([settings.seed, step])
            chosen = []
            for name, number in counts(self.climb.newest(step), settings.batch).items():
                drawn = self.climb.drawn(name, step, settings.batch)
                chosen += self.shards[name].draw(rng, number, drawn, self.ladder.uses)
            yield collate(chosen, self.maker.config)
            step += 1

    def shards_of(self, steps: range, batch: int) -> list[tuple[str, int]]:
        """The shards that steps draw from, by rung and number, in the order of their first use.

        Args:
            steps: Of a batch each; all rungs have begun before.
            batch: Samples of a step.
        """
        used: list[tuple[float, str, int]] = []
        for name in counts(len(LADDER) - 1, batch):
            series = self.shards[name]
            first, last = (
                series.newest(self.climb.drawn(name, step, batch), self.ladder.uses) for step in (steps[0], steps[-1])
            )
            for number in range(max(0, first + 1 - series.kept), last + 1):
                used.append(((number - first) / max(1, last - first), name, number))
        return [(name, number) for _, name, number in sorted(used)]


def practice(
    maker: FeatureMaker, concepts: Sequence[Concept], climb: Climb, ladder: LadderSettings, folder: Path
) -> Practice:
    """The rungs' samples.

    Args:
        maker: Makes their features.
        concepts: What they show; those held out are left out.
        climb: Where on the ladder training is.
        ladder: How many samples are kept, and how often they are used.
        folder: Where they are kept.

    Raises:
        InputError: The folder holds samples that were made with others of these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made_with = ("seed", "shard_samples", "varied", "edits")
    write_plan(folder, maker.plan() | {f"ladder.{name}": getattr(ladder, name) for name in made_with}, allowed=None)
    known = [concept for concept in concepts if not concept.held_out]
    shards = {
        rung.name: RollingShards(
            folder / rung.name,
            maker,
            known,
            ladder.edits if rung is LADDER[-1] and ladder.edits else rung.shares,
            ladder.seed,
            ladder.shard_samples,
            ladder.shards,
            ladder.varied,
        )
        for rung in (*LADDER, KEPT_EDITS)
    }
    return Practice(maker, shards, climb, ladder)


def open_practice(
    config: ModelConfig, ladder: LadderSettings, concepts: Sequence[Concept], state: Path, start: Path | None
) -> tuple[Mige, Practice]:
    """The model that the stage `mige` begins with, and the samples of the rungs from where the stage was stopped.

    Args:
        config: The model's sizes.
        ladder: What to learn from.
        concepts: All of them.
        state: The state folder, where the samples are kept.
        start: The model folder or bundle to go on from, if there is one.

    Raises:
        InputError: As `climbed_model` or `with_trained_encoder`, `state_tokenizer`, and `practice`.
    """
    model = climbed_model(config, start) if ladder.climbed else with_trained_encoder(config, state, start).train()
    folder = state / "mige"
    folder.mkdir(parents=True, exist_ok=True)
    vae = model.vae_encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    tokenize = load_tokenizer(state_tokenizer(config, concepts, state, start))
    maker = FeatureMaker(config, vae, deepcopy(model.image_encoder), tokenize)
    path = folder / "climb.json"
    climb = Climb.done(path) if ladder.climbed else Climb.resumed(path, steps_done(folder))
    return model, practice(maker, concepts, climb, ladder, state / "features")


class HeldOutRungs:
    """Samples of each rung with concepts that are held out, on which its one-shot error is measured."""

    def __init__(self, maker: FeatureMaker, concepts: Sequence[Concept]) -> None:
        """Makes the samples of those of `concepts` that are held out."""
        held_out = [concept for concept in concepts if concept.held_out]
        size = maker.config.size
        self.samples: dict[str, list[Sample]] = {
            rung.name: [make_sample(HELD_OUT_SEED, index, held_out, size, rung.shares) for index in range(HELD_OUT)]
            for rung in (*LADDER, KEPT_EDITS)
        }
        self._batches = {name: all_of(maker, samples) for name, samples in self.samples.items()}

    def errors(self, module: TrainedPart, names: Collection[str] | None = None) -> dict[str, OneShot]:
        """The errors on all rungs, or on those of some names."""
        return {
            name: one_shot(module, batch.to(next(module.parameters()).device), seed=0)
            for name, batch in self._batches.items()
            if names is None or name in names
        }


def all_of(maker: FeatureMaker, samples: Sequence[Sample]) -> Batch:
    """Some samples as one batch."""
    shard = maker.shard(samples)
    return collate([(shard, index) for index in range(len(samples))], maker.config)
