"""Latencies of candidates that take turns: a machine's drift over minutes is in both of each pair that is compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000

OnIteration = Callable[[str, int, int], None]  # the candidate, iterations done, iterations in all, warmup included


@dataclass(frozen=True)
class Latency:
    """Seconds: the median, the 10th and the 90th percentile, and every iteration in the order it was run."""

    median: float
    p10: float
    p90: float
    iterations: tuple[float, ...]

    @staticmethod
    def of(seconds: Sequence[float]) -> "Latency":
        """Raises ValueError when there are none."""
        if not seconds:
            raise ValueError("there are no iterations to take the median of")
        p10, median, p90 = np.quantile(seconds, (0.1, 0.5, 0.9))
        return Latency(float(median), float(p10), float(p90), tuple(seconds))


@dataclass(frozen=True)
class Speedup:
    """How many times as fast a candidate is as its baseline: the median over pairs, and its confidence interval."""

    value: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> Literal["faster", "slower", "no difference shown"]:
        """The interval decides, not the value."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference shown"


def speedup(baseline: Sequence[float], candidate: Sequence[float]) -> Speedup:
    """The median over all k of the baseline's k-th iteration over the candidate's k-th, and its interval.

    In logarithms, so that swapping the two gives the inverse. Iterations without a partner are left out. Raises
    ValueError when there are fewer than two pairs.
    """
    from scipy.stats import bootstrap  # here, since workers import this module and are to stay small

    pairs = min(len(baseline), len(candidate))
    if pairs < 2:
        raise ValueError(f"{pairs} pairs of iterations have no interval; at least 2 are needed")
    logarithms = np.log(np.asarray(baseline[:pairs]) / np.asarray(candidate[:pairs]))
    options = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "method": "percentile"}
    interval = bootstrap((logarithms,), np.median, rng=np.random.default_rng(0), **options).confidence_interval
    low, value, high = np.exp([interval.low, np.median(logarithms), interval.high]).tolist()
    return Speedup(value, low, high, pairs)


class InterleavedRuns:
    """Candidates that take turns: warmup rounds first, then rounds that count, one iteration of each in a round.

    A candidate is a function that makes one image, or one batch, and returns the seconds it took. `seconds` has whole
    iterations, also after an exception. One that raises an `expected` exception is left out, and `failed` says why.
    """

    def __init__(self, candidates: Mapping[str, Callable[[], float]], expected: tuple[type[Exception], ...]) -> None:
        self.candidates = dict(candidates)
        self.expected = expected
        self.seconds: dict[str, list[float]] = {name: [] for name in candidates}
        self.failed: dict[str, str] = {}

    def run(self, iterations: int, warmup: int, on_iteration: OnIteration = lambda name, done, total: None) -> None:
        total, done = (iterations + warmup) * len(self.candidates), 0
        for number in range(-warmup, iterations):
            for name, candidate in self.candidates.items():
                on_iteration(name, done, total)
                done += 1
                if name in self.failed:
                    continue
                try:
                    seconds = candidate()
                except self.expected as error:
                    self.failed[name] = str(error)
                    del self.seconds[name]
                    continue
                if number >= 0:
                    self.seconds[name].append(seconds)
