"""Scores of systems from pairwise votes: Bradley and Terry's model (1952), fitted by scipy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from benchmarks.appended_lines import read_appended
from mige_rt.errors import InputError
from trainer.evaluate.intervals import CONFIDENCE, Estimate

Choice = Literal["left", "right", "tie"]

WHAT = "votes of mige-rt eval user-study"

RESAMPLES = 500
PRIOR = 0.5  # of a win each way is added to every pair that was compared, so that no score is infinite


@dataclass(frozen=True)
class Vote:
    """One vote.

    Attributes:
        pair: The name of the request's image.
        voter: Who.
        left: The system whose image was on the left.
        right: The other.
        choice: Which was better.
        time: Of the vote, ISO 8601, UTC.
    """

    pair: str
    voter: str
    left: str
    right: str
    choice: Choice
    time: str


@dataclass(frozen=True)
class Preference:
    """A system's place.

    Attributes:
        system: Its name.
        score: In log-odds, of mean zero over the systems: a difference of 1 is a win in 73 % of cases.
        votes: In which it took part.
        wins: Of those; a tie is half of one.
    """

    system: str
    score: Estimate
    votes: int
    wins: float


def read_votes(files: Sequence[Path]) -> list[Vote]:
    """Votes in their order; of a voter's votes on one pair of images the last one counts.

    A system whose path was typed in several ways has the first of these names.

    Raises:
        InputError: Names the first line that is no vote. The last line of a file may be cut, as a killed server leaves
            it.
    """
    votes: dict[tuple[str, str, frozenset[str]], Vote] = {}
    names: dict[Path, str] = {}
    for path in files:
        for typed in read_appended(path, Vote, WHAT):
            left, right = (names.setdefault(Path(name).resolve(), name) for name in (typed.left, typed.right))
            vote = replace(typed, left=left, right=right)
            votes[vote.voter, vote.pair, frozenset((vote.left, vote.right))] = vote
    return list(votes.values())


def preferences(votes: Sequence[Vote]) -> list[Preference]:
    """The systems with their scores, the best first.

    Intervals are percentile bootstraps over pairs, whose votes are alike; the generator's seed is fixed. Of one pair
    alone there is none.

    Raises:
        InputError: There are no votes, or a system was compared with itself.
    """
    systems = sorted({system for vote in votes for system in (vote.left, vote.right)})
    if not votes or len(systems) < 2:
        raise InputError("there are no votes on two systems; collect them by: mige-rt eval user-study")
    pairs = sorted({vote.pair for vote in votes})
    wins = np.zeros((len(pairs), len(systems), len(systems)))
    for vote in votes:
        left, right = systems.index(vote.left), systems.index(vote.right)
        if left == right:
            raise InputError(f"a vote on {vote.pair!r} compares {vote.left!r} with itself; remove it")
        share = {"left": 1.0, "tie": 0.5, "right": 0.0}[vote.choice]
        wins[pairs.index(vote.pair), left, right] += share
        wins[pairs.index(vote.pair), right, left] += 1 - share
    totals = wins.sum(axis=0)
    scores = fit(totals)
    rng = np.random.default_rng(0)
    resampled = np.stack([fit(wins[rng.integers(len(pairs), size=len(pairs))].sum(axis=0)) for _ in range(RESAMPLES)])
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    results = [
        Preference(
            system,
            Estimate(float(scores[k]), *((float(low[k]), float(high[k])) if len(pairs) > 1 else (None, None))),
            round(float(totals[k].sum() + totals[:, k].sum())),
            float(totals[k].sum()),
        )
        for k, system in enumerate(systems)
    ]
    return sorted(results, key=lambda preference: -preference.score.value)


def fit(wins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of most likelihood.

    Args:
        wins: [S,S], how often the system of a row has beaten that of a column.

    Returns:
        Log-odds [S], of mean zero.
    """
    compared = (wins + wins.T) > 0
    smoothed = wins + PRIOR * compared

    def loss(scores: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        differences = scores[:, None] - scores[None, :]
        # The likelihood depends on differences alone; the last term fixes their mean.
        value = float((smoothed * np.logaddexp(0, -differences)).sum()) + 0.5 * scores.sum() ** 2
        lost = smoothed / (1 + np.exp(differences))
        return value, lost.sum(axis=0) - lost.sum(axis=1) + scores.sum()

    scores = minimize(loss, np.zeros(len(wins)), jac=True, method="BFGS").x
    return scores - scores.mean()
