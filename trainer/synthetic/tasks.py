"""Samples of the paper's tasks, each with its instruction, its images and its ground truth.

The paper (section 3.1) states every task in one multimodal form: words with `<imagehere>` where an image stands.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from trainer.synthetic import compositions, edits
from trainer.synthetic.concepts import Concept
from trainer.synthetic.sample import Draft, Mark, Sample, Stock
from trainer.synthetic.variation import VariedConcepts

__all__ = ["ALL_KINDS", "KINDS", "PRACTICE", "SHARES", "Mark", "Sample", "make_sample"]


class Kind(Protocol):
    def __call__(
        self, rng: np.random.Generator, concepts: Sequence[Concept], side: int, photos: Sequence[Path] = ()
    ) -> Sample: ...


def _until_fair(
    draft: Draft, rng: np.random.Generator, concepts: Sequence[Concept], side: int, photos: Sequence[Path] = ()
) -> Sample:
    while True:
        if (sample := draft(rng, Stock(concepts, side, photos))) is not None:
            return sample


KINDS: dict[str, Kind] = {
    "recolour": partial(_until_fair, edits.recolour),
    "remove": partial(_until_fair, edits.remove),
    "add": partial(_until_fair, compositions.add),
    "replace": partial(_until_fair, compositions.replace_subject),
    "generate": partial(_until_fair, compositions.generate),
    "recolour_subject": partial(_until_fair, edits.recolour_subject),
    "move": partial(_until_fair, edits.move),
    "resize": partial(_until_fair, edits.resize),
    "restyle": partial(_until_fair, edits.restyle),
    "light": partial(_until_fair, edits.light),
    "weather": partial(_until_fair, edits.weather),
}
# What is learnt before, on the way to those: one thing at a time (trainer/stages/ladder.py).
PRACTICE: dict[str, Kind] = {
    "again": partial(_until_fair, compositions.again),
    "another_ground": partial(_until_fair, compositions.another_ground),
    "generate_one": partial(_until_fair, compositions.generate_one),
    "generate_several": partial(_until_fair, compositions.generate_several),
}
ALL_KINDS = {**KINDS, **PRACTICE}
# How often each kind is drawn: what brings in a thing from an image needs the most practice.
SHARES: Mapping[str, float] = {
    "recolour": 0.08,
    "remove": 0.10,
    "add": 0.17,
    "replace": 0.17,
    "generate": 0.20,
    "recolour_subject": 0.05,
    "move": 0.05,
    "resize": 0.05,
    "restyle": 0.05,
    "light": 0.04,
    "weather": 0.04,
}


def make_sample(
    seed: int,
    index: int,
    concepts: Sequence[Concept],
    side: int,
    shares: Mapping[str, float] | None = None,
    photos: Sequence[Path] = (),
    varied: float = 0.0,
) -> Sample:
    """Sample number `index` of the unlimited series `seed`: the same arguments give the same sample everywhere.

    concepts: two or more. shares: how often each kind is drawn, in any unit, SHARES by default; a kind left out is
    never drawn. photos: images that some backgrounds are cut from. varied: the share of the things that are varied
    (`trainer.synthetic.variation`), which leaves held-out concepts as they are.
    """
    rng = np.random.default_rng([seed, index])
    shares = SHARES if shares is None else shares
    kinds, weights = list(shares), np.array(list(shares.values()))
    kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
    if varied:
        concepts = VariedConcepts(concepts, varied, rng)
    return ALL_KINDS[kind](rng, concepts, side, photos)
