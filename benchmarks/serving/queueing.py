"""What latency continuous batching can have where calls come at random, from what batches of each size take.

A bench of seconds sees few calls, and its 99th percentile is that of the slowest one or two. The same queue, simulated
for as long as it takes, says what those few are a sample of, and so whether the order of the calls or the price of a
batch is what makes them slow.
"""

import random
from collections import deque
from collections.abc import Sequence

from benchmarks.serving.load import poisson_arrivals

_CALLS = 20_000  # on the average; the 99th percentile is then right to a few per cent


def simulated_latencies(batch_seconds: Sequence[float], rate: float, steps: int = 20, seed: int = 0) -> list[float]:
    """In seconds, of a server that advances its images together, each entering at the next step after it came.

    Args:
        batch_seconds: What images that begin and end together take: one, two, and so on up to the largest batch.
        rate: Calls a second, for an image each.
        steps: Of an image, all equally long.
        seed: Of the arrivals.
    """
    arrivals = deque(poisson_arrivals(rate, _CALLS / rate, random.Random(seed)))
    running: list[tuple[float, int]] = []  # when each came, and how many steps it has left
    latencies: list[float] = []
    now = 0.0
    while arrivals or running:
        if not running:
            now = max(now, arrivals[0])
        while arrivals and arrivals[0] <= now and len(running) < len(batch_seconds):
            running.append((arrivals.popleft(), steps))
        now += batch_seconds[len(running) - 1] / steps
        latencies += [now - came for came, left in running if left == 1]
        running = [(came, left - 1) for came, left in running if left > 1]
    return latencies
