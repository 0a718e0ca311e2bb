"""The order in which tasks are learnt: each rung begins when the one before can read what it is shown.

All at once they teach the diffusion transformer to ignore the image tokens: as long as it reads them at the wrong
place, they only hurt.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mige_rt.atomic import atomic_file
from trainer.synthetic.tasks import SHARES

NEWEST_SHARE = 0.6  # of a batch, of the newest rung


@dataclass(frozen=True)
class Rung:
    """One step of the ladder.

    shares: how often each of its kinds is drawn. share: what it counts for once a later one is the newest. holds: the
    largest one-shot error, over that of the mean color, at which the next rung begins.
    """

    name: str
    shares: Mapping[str, float]
    share: float
    holds: float


# Edits that leave everything at its place never teach to ignore what is read there: a model that has learnt them before
# keeps them by a few samples from the first rung on.
_IN_PLACE = {kind: SHARES[kind] for kind in ("recolour", "recolour_subject", "light", "weather")}
_COMPOSED = {kind: SHARES[kind] for kind in ("add", "replace")}
LADDER: tuple[Rung, ...] = (
    Rung("again", {"again": 1.0}, 0.05, 0.5),
    Rung("another_ground", {"another_ground": 1.0}, 0.15, 0.4),
    Rung("generate_one", {"generate_one": 1.0}, 0.1, 0.7),
    Rung("generate_several", {"generate_several": 1.0}, 0.1, 0.95),
    Rung("compose", _COMPOSED, 0.25, 0.9),
    Rung("edit", {kind: s for kind, s in SHARES.items() if kind not in ("generate", *_COMPOSED)}, 0.35, 0.0),
)
KEPT_EDITS = Rung("edit_in_place", _IN_PLACE, 0.1, 0.0)  # beside every rung but the last, which holds them


def counts(newest: int, batch: int, ladder: Sequence[Rung] = LADDER) -> dict[str, int]:
    """How many samples of each rung a batch holds while number `newest` is the newest; they sum to `batch`."""
    if newest == len(ladder) - 1:
        weights = {rung.name: rung.share for rung in ladder}
    else:
        older = {rung.name: rung.share for rung in ladder[:newest]}
        weights = {KEPT_EDITS.name: KEPT_EDITS.share}
        room = 1 - KEPT_EDITS.share - (NEWEST_SHARE if older else 0)
        weights |= {name: share / sum(older.values()) * room for name, share in older.items()}
        weights[ladder[newest].name] = NEWEST_SHARE if older else room
    return apportion(weights, batch)


def apportion(weights: Mapping[str, float], number: int) -> dict[str, int]:
    """Whole numbers in proportion to weights, that sum to `number`."""
    total = sum(weights.values())
    exact = {name: number * weight / total for name, weight in weights.items()}
    whole = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: exact[name] - whole[name], reverse=True)
    for name in by_remainder[: number - sum(whole.values())]:
        whole[name] += 1
    return whole


@dataclass
class Climb:
    """When each rung began, kept in a file; so a run that is resumed draws what it would have drawn."""

    path: Path
    began: list[int] = field(default_factory=lambda: [0])  # the step at which rung k began

    @classmethod
    def resumed(cls, path: Path, step: int) -> "Climb":
        """As the file says, without what came after `step`; from the first rung where there is no file."""
        began = json.loads(path.read_text()) if path.is_file() else [0]
        return cls(path, [b for b in began if b <= step] or [0])

    @classmethod
    def done(cls, path: Path) -> "Climb":
        """Of a model that has been up the ladder before its first step."""
        return cls(path, [0] * len(LADDER))

    def newest(self, step: int) -> int:
        """The newest rung's number at a step."""
        return sum(began <= step for began in self.began) - 1

    def begin_next(self, step: int) -> None:
        """The next rung begins at `step`."""
        self.began.append(step)
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(self.began) + "\n")

    def drawn(self, name: str, step: int, batch: int, ladder: Sequence[Rung] = LADDER) -> int:
        """How many samples of a rung the steps before `step` took."""
        ends = [*self.began[1:], step]
        return sum(
            max(0, min(end, step) - begin) * counts(newest, batch, ladder).get(name, 0)
            for newest, (begin, end) in enumerate(zip(self.began, ends, strict=True))
        )
