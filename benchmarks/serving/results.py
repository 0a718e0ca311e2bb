"""What `mige-rt bench-serve` measured, as data and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from benchmarks.serving.load import Outcome
from benchmarks.serving.queueing import simulated_latencies
from mige_rt.serve.options import Batching

SCHEMA = 1


@dataclass(frozen=True)
class Percentiles:
    """Of latencies, in seconds."""

    p50: float
    p95: float
    p99: float

    @staticmethod
    def of(seconds: Sequence[float]) -> "Percentiles":
        return Percentiles(*map(float, np.percentile(seconds, (50, 95, 99))))


@dataclass(frozen=True)
class BatchingResult:
    """What a server did with the calls of one rate.

    Attributes:
        calls: That were sent.
        images: That were made.
        refused: Calls answered with 429.
        failed: Calls answered with anything else but an image.
        latency: Of the images; None where there are none.
        images_per_minute: From the first arrival until the last image, or the end of the arrivals if that is later.
        goodput_per_minute: The same of images within the deadline.
        batch_size: Images in a call of the denoiser, on the average of the last round.
    """

    calls: int
    images: int
    refused: int
    failed: int
    latency: Percentiles | None
    images_per_minute: float
    goodput_per_minute: float
    batch_size: float


@dataclass(frozen=True)
class Comparison:
    """The servers at one rate of a mix, with the same arrivals.

    Attributes:
        mix: Its name.
        load: The rate, as a share of the capacity.
        rate: Calls a second.
        results: By how the server batches.
    """

    mix: str
    load: float
    rate: float
    results: dict[Batching, BatchingResult]

    def ratios(self) -> dict[str, dict[str, float | None]]:
        """Continuous batching over each of the others; None where there is nothing to divide by."""
        continuous = self.results["continuous"]
        ratios: dict[str, dict[str, float | None]] = {}
        for batching, other in self.results.items():
            if batching != "continuous":
                latency = (continuous.latency and continuous.latency.p99, other.latency and other.latency.p99)
                ratios[batching] = {
                    "images_per_minute": _ratio(continuous.images_per_minute, other.images_per_minute),
                    "goodput": _ratio(continuous.goodput_per_minute, other.goodput_per_minute),
                    "p99": _ratio(*latency),
                }
        return ratios


@dataclass(frozen=True)
class Lone:
    """A mix when nothing else is running.

    Attributes:
        seconds: Median latency of a call, of the server with continuous batching.
        by_batching: The same of every server.
        capacity: Images a second that the server with continuous batching makes of many calls at once.
        batch_seconds: What that server takes for one call, for two that come together, and so on up to its `max_batch`.
    """

    seconds: float
    by_batching: dict[Batching, float]
    capacity: float
    batch_seconds: tuple[float, ...]


@dataclass
class ServingResults:
    """A whole bench.

    Attributes:
        command: That was typed.
        date: When, ISO.
        environment: Of the machine.
        max_batch: Of the servers that batch.
        seconds_per_rate: That calls came for, in all rounds.
        deadline: In times the latency of a call alone.
        lone: By mix.
        comparisons: By mix and load.
        complete: Whether every rate had every round.
    """

    command: str
    date: str
    environment: dict[str, Any]
    max_batch: int
    seconds_per_rate: float
    deadline: float
    lone: dict[str, Lone] = field(default_factory=dict[str, Lone])
    comparisons: dict[tuple[str, float], Comparison] = field(default_factory=dict[tuple[str, float], Comparison])
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        about = {name: value for name, value in asdict(self).items() if name != "comparisons"}
        rates = [{**asdict(rate), "ratios": rate.ratios()} for rate in self.comparisons.values()]
        return {"schema": SCHEMA, **about, "saturation": self._saturation(), "rates": rates}

    def _saturation(self) -> dict[str, dict[str, float | None]]:
        """What matters most of each mix: throughput at the highest rate, and the tail at half of capacity."""
        figures: dict[str, dict[str, float | None]] = {}
        for mix, lone in self.lone.items():
            rates = {load: rate for (of, load), rate in self.comparisons.items() if of == mix}
            if not rates:
                continue
            highest, half = rates[max(rates)], rates[min(rates, key=lambda load: abs(load - 0.5))]
            ratios, latency = highest.ratios(), half.results["continuous"].latency
            simulated = simulated_latencies(lone.batch_seconds, half.rate)
            figures[mix] = {
                "load": highest.load,
                "images_per_minute": highest.results["continuous"].images_per_minute,
                **{f"times_{batching}": ratio["images_per_minute"] for batching, ratio in ratios.items()},
                "half_load": half.load,
                "p99_at_half_load": latency and latency.p99,
                "p99_at_half_load_over_lone": latency and latency.p99 / lone.seconds,
                "simulated_p99_over_lone": Percentiles.of(simulated).p99 / lone.batch_seconds[0],
            }
        return figures


def summarise(
    rounds: Sequence[Sequence[Outcome]], seconds: float, deadline: float, batch_size: float
) -> BatchingResult:
    """What a server did in all rounds of a rate.

    Args:
        rounds: What became of the calls of each.
        seconds: That calls came for, in a round.
        deadline: By when an image is of use, in seconds.
        batch_size: Images in a call of the denoiser.
    """
    outcomes = list(chain.from_iterable(rounds))
    latencies = [outcome.latency for outcome in outcomes if outcome.status == 200]
    refused = sum(outcome.status == 429 for outcome in outcomes)
    minutes = sum(max([seconds, *(o.ended for o in outcomes if o.status == 200)]) for outcomes in rounds) / 60
    return BatchingResult(
        calls=len(outcomes),
        images=len(latencies),
        refused=refused,
        failed=len(outcomes) - len(latencies) - refused,
        latency=Percentiles.of(latencies) if latencies else None,
        images_per_minute=len(latencies) / minutes,
        goodput_per_minute=sum(latency <= deadline for latency in latencies) / minutes,
        batch_size=batch_size,
    )


def _ratio(value: float | None, baseline: float | None) -> float | None:
    return value / baseline if value is not None and baseline else None
