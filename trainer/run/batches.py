"""A run's batches, made while the step before is computed."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from mige_rt.tokenizer import Tokenize
from trainer.data.batches import TrainingBatch, collate
from trainer.data.mixing import MixedBatches

AHEAD = 2  # batches

T = TypeVar("T")


@dataclass(frozen=True)
class RunBatches:
    """A process's batches from a number of batches on; see `MixedBatches.batches`.

    Attributes:
        mixed: The sources.
        tokenize: The model's tokenizer.
    """

    mixed: MixedBatches
    tokenize: Tokenize

    def __call__(self, first: int, rank: int, ranks: int) -> Iterator[TrainingBatch]:
        """Collated, without end."""
        return made_ahead(self._collated(first, rank, ranks), AHEAD)

    def _collated(self, first: int, rank: int, ranks: int) -> Iterator[TrainingBatch]:
        for batch in self.mixed.batches(first, rank, ranks):
            yield collate(batch.samples, self.mixed.config, self.tokenize, batch.generator)


def made_ahead(items: Iterator[T], number: int) -> Iterator[T]:
    """The items of an endless iterator, of which a thread makes the next ones meanwhile.

    Args:
        items: The iterator, which is used by that thread alone.
        number: How many are made ahead.

    Yields:
        The items, in their order; what making one raises is raised in its place.
    """
    executor = ThreadPoolExecutor(1)
    try:
        pending: deque[Future[T]] = deque(executor.submit(next, items) for _ in range(number))
        while True:
            item = pending.popleft().result()
            pending.append(executor.submit(next, items))
            yield item
    finally:
        executor.shutdown(cancel_futures=True)
