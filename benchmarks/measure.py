"""Seconds that can be compared: candidates run in turn, medians with their spread, ratios with their interval.

A shared or hot machine drifts over minutes. Candidates that take turns (A B C, A B C, ...) drift together, so a
comparison is made pair by pair, of runs that stood next to each other in time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000

OnRun = Callable[[str, int, int], None]  # the candidate, runs done, runs in all, warm-ups included


@dataclass(frozen=True)
class Latency:
    """Seconds of some runs: the median, and between which values eight in ten lie."""

    median: float
    p10: float
    p90: float
    runs: tuple[float, ...]  # in the order they were run

    @staticmethod
    def of(seconds: Sequence[float]) -> "Latency":
        """Raises ValueError when there are none."""
        if not seconds:
            raise ValueError("there are no runs to take the median of")
        p10, median, p90 = np.quantile(seconds, (0.1, 0.5, 0.9))
        return Latency(float(median), float(p10), float(p90), tuple(seconds))


@dataclass(frozen=True)
class Ratio:
    """How many times as long the slower takes: the median over pairs, and its confidence interval."""

    value: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> Literal["faster", "slower", "no difference shown"]:
        """Of what is in the denominator; the interval decides, not the value."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference shown"

    def __str__(self) -> str:
        said = f"{self.value:.2f} times ({CONFIDENCE:.0%} interval {self.low:.2f} to {self.high:.2f})"
        return said if self.verdict == "faster" else f"{said}: {self.verdict}"


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Ratio:
    """The k-th run of one over the k-th of the other: the median over all k, in logarithms, so that swapping the two
    gives the inverse.

    The interval is the percentile bootstrap's over pairs (Efron & Tibshirani 1993, section 13.3), by a generator of
    fixed seed. Where one of the two has fewer runs, the other's last ones have no partner and are left out. Raises
    ValueError when there are fewer than two pairs.
    """
    pairs = min(len(slower), len(faster))
    if pairs < 2:
        raise ValueError(f"{pairs} pairs of runs have no interval; at least 2 are needed")
    logarithms = np.log(np.asarray(slower[:pairs]) / np.asarray(faster[:pairs]))
    drawn = np.random.default_rng(0).integers(pairs, size=(RESAMPLES, pairs))
    medians = np.median(logarithms[drawn], axis=1)
    low, high = np.exp(np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    return Ratio(float(np.exp(np.median(logarithms))), float(low), float(high), pairs)


class Turns:
    """Candidates taking turns: warm-ups first, then `runs` rounds of one run each.

    A candidate is a function that makes one picture, or one batch, and returns the seconds it took. `seconds` has what
    was measured so far, of whole runs only, also when `run` was left by an exception. A candidate that raises an
    exception of the types `expected` is left out from then on, and `failed` says why.
    """

    def __init__(self, candidates: Mapping[str, Callable[[], float]], expected: tuple[type[Exception], ...]) -> None:
        self.candidates = dict(candidates)
        self.expected = expected
        self.seconds: dict[str, list[float]] = {name: [] for name in candidates}
        self.failed: dict[str, str] = {}

    def run(self, runs: int, warmups: int, on_run: OnRun = lambda name, done, total: None) -> None:
        total, done = (runs + warmups) * len(self.candidates), 0
        for turn in range(-warmups, runs):
            for name, make in self.candidates.items():
                on_run(name, done, total)
                done += 1
                if name in self.failed:
                    continue
                try:
                    took = make()
                except self.expected as error:
                    self.failed[name] = str(error)
                    del self.seconds[name]
                    continue
                if turn >= 0:
                    self.seconds[name].append(took)
