"""`mige-rt bench-serve`: the server with continuous batching beside itself with static and with none, in one run."""

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import date
from statistics import median
from typing import Any, get_args

from benchmarks.serving.load import (
    MIXES,
    Call,
    Kind,
    Outcome,
    image_call,
    poisson_arrivals,
    send_in_turn,
    send_when_due,
)
from benchmarks.serving.results import BatchingResult, Comparison, Lone, ServingResults, summarise
from benchmarks.serving.server_process import ServerProcess
from export.environment import environment
from mige_rt.errors import InputError
from mige_rt.serve.options import Batching

OnProgress = Callable[[str, int, int], None]

BATCHINGS: tuple[Batching, ...] = get_args(Batching)
_LONE_CALLS = 10  # of each mix and server
_BURST = 4  # times --max-batch: the calls that a mix's capacity is measured with
_TOGETHER = 3  # times that a batch of each size is measured


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """What to measure.

    Attributes:
        server: Options of `mige-rt serve` that all servers get.
        mixes: Names in `MIXES`.
        loads: Rates, as shares of the images a second that the server with continuous batching makes at most.
        seconds: That calls come for, at each rate.
        rounds: How often each rate has its turn.
        max_batch: Of the servers that batch.
        deadline: By when an image is of use, in times the latency of a call alone.
        num_inference_steps: None: the model's for the task.
        seed: Of the arrivals.
        command: That was typed.
    """

    server: tuple[str, ...] = ()
    mixes: tuple[str, ...] = tuple(MIXES)
    loads: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)
    seconds: float = 6.0
    rounds: int = 2
    max_batch: int = 8
    deadline: float = 5.0
    num_inference_steps: int | None = None
    seed: int = 0
    command: str = "mige-rt bench-serve"

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of every call."""
        steps = self.num_inference_steps
        return {} if steps is None else {"num_inference_steps": steps}


def bench_serving(options: ServingOptions, on_progress: OnProgress = lambda what, done, total: None) -> ServingResults:
    """Measure. Ctrl-C ends it with the rates that were measured, `complete` false.

    Raises:
        InputError: A server does not start, or does not make an image.
    """
    results = ServingResults(
        command=options.command,
        date=date.today().isoformat(),
        environment=environment(),
        max_batch=options.max_batch,
        seconds_per_rate=options.seconds * options.rounds,
        deadline=options.deadline,
    )
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        servers: dict[Batching, ServerProcess] = {}
        for batching in BATCHINGS:
            on_progress(f"start the server, batching {batching}", len(servers), len(BATCHINGS))
            limits = ("--max-batch", str(options.max_batch), "--max-queue", str(4 * options.max_batch))
            server = ServerProcess("--batching", batching, *limits, *options.server)
            servers[batching] = stack.enter_context(server)
        bench = _Bench(options, servers, results, on_progress)
        for mix in options.mixes:
            bench.measure_alone(mix)
        for i in range(options.rounds):
            bench.run_round(i)
        results.complete = True
    return results


@dataclass
class _Bench:
    """A bench in progress: its running servers, and what was measured."""

    options: ServingOptions
    servers: dict[Batching, ServerProcess]
    results: ServingResults
    on_progress: OnProgress
    outcomes: dict[tuple[str, float, Batching], list[list[Outcome]]] = field(default_factory=dict)
    number: int = 0  # of the next call

    def measure_alone(self, mix: str) -> None:
        """A mix's latency when nothing else is running, what batches of calls take, and the most that is made."""
        self.on_progress(f"{mix}: calls alone", 0, 0)
        seconds: dict[Batching, float] = {}
        for batching, server in self.servers.items():
            asyncio.run(send_in_turn(server.url, self._calls(mix, len(MIXES[mix]))))  # warmup
            answers = asyncio.run(send_in_turn(server.url, self._calls(mix, _LONE_CALLS)))
            for answer, _ in answers:
                if answer.status != 200:
                    raise InputError(f"the server answers {answer.status} to a call alone: {answer.body.decode()}")
            seconds[batching] = median(seconds for _, seconds in answers)
        max_batch = self.options.max_batch
        capacity = _BURST * max_batch / self._seconds_together(mix, _BURST * max_batch)
        batch_seconds = tuple(
            median(self._seconds_together(mix, size) for _ in range(_TOGETHER)) for size in range(1, max_batch + 1)
        )
        self.results.lone[mix] = Lone(seconds["continuous"], dict(seconds), capacity, batch_seconds)

    def _seconds_together(self, mix: str, count: int) -> float:
        """What the server with continuous batching takes for calls that come together."""
        calls = self._calls(mix, count)
        outcomes = asyncio.run(send_when_due(self.servers["continuous"].url, calls, [0.0] * count))
        for outcome in outcomes:
            if outcome.status != 200:
                raise InputError(f"the server answers {outcome.status} to one of {count} calls that come together")
        return max(outcome.ended for outcome in outcomes)

    def run_round(self, number: int) -> None:
        """Every rate of every mix, the servers taking turns with the same arrivals."""
        options = self.options
        cases = [(mix, load) for mix in options.mixes for load in options.loads]
        for i, (mix, load) in enumerate(cases):
            self.on_progress(f"{mix} at {load:g} of capacity", number * len(cases) + i, options.rounds * len(cases))
            rate = load * self.results.lone[mix].capacity
            rng = random.Random(f"{options.seed} {number} {mix} {load}")
            due = poisson_arrivals(rate, options.seconds, rng) or [0.0]
            calls = self._calls(mix, len(due))
            measured: dict[Batching, tuple[list[Outcome], float]] = {}
            first = (number + i) % len(BATCHINGS)  # none is always the first, with a processor that has cooled down
            order: list[Batching] = [*BATCHINGS[first:], *BATCHINGS[:first]]
            for batching in order:
                server = self.servers[batching]
                before = _denoiser_calls(server)
                outcomes = asyncio.run(send_when_due(server.url, calls, due))
                images, denoiser_calls = (b - a for a, b in zip(before, _denoiser_calls(server), strict=True))
                measured[batching] = outcomes, images / max(denoiser_calls, 1)
            self._add(mix, load, rate, measured)

    def _add(self, mix: str, load: float, rate: float, measured: dict[Batching, tuple[list[Outcome], float]]) -> None:
        """Count a round with those before it."""
        results: dict[Batching, BatchingResult] = {}
        for batching in BATCHINGS:
            outcomes, batch_size = measured[batching]
            rounds = self.outcomes.setdefault((mix, load, batching), [])
            rounds.append(outcomes)
            deadline = self.options.deadline * self.results.lone[mix].seconds
            results[batching] = summarise(rounds, self.options.seconds, deadline, batch_size)
        self.results.comparisons[mix, load] = Comparison(mix, load, rate, results)

    def _calls(self, mix: str, count: int) -> list[Call]:
        """Calls of a mix's kinds in turn, each with images that no call before had."""
        kinds: Sequence[Kind] = MIXES[mix]
        first, self.number = self.number, self.number + count
        return [image_call(kinds[i % len(kinds)], first + i, self.options.settings) for i in range(count)]


def _denoiser_calls(server: ServerProcess) -> tuple[float, float]:
    """Images in all calls of the denoiser, and the calls."""
    metrics = server.metrics()  # both at one moment, since the last step's report may come after its images
    return metrics["generation_batch_size_sum"], metrics["generation_batch_size_count"]
