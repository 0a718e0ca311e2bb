"""Batches mixed from several prepared sets by ratios, the same ones whenever and from wherever they are asked for.

What a process reads at a step is a function of the seed, the step, its rank and the number of processes, so nothing has
to be saved for a resumed run. Each source is an endless series of its shards, shuffled anew each time round, of which a
process takes every n-th, n being the number of processes; it shuffles the samples of each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from trainer.data.prepared import PreparedSample, PreparedSet, open_prepared

GOLDEN = 0.6180339887498949  # of all steps along a circle, those of this length cover it most evenly
SHARD_ORDER, SAMPLE_ORDER, BATCH_OFFSET, BATCH_ORDER, NOISE = range(5)  # so that no two draws share a seed


@dataclass(frozen=True)
class Source:
    """One kind of samples, an entry of a config's `sources:`.

    Attributes:
        path: A folder that `mige-rt data prepare` made, or several, which are read as one, each as often as it has
            samples.
        ratio: How many of its samples there are for one of a source whose ratio is 1. None: 1, with which four sources
            of subject-driven samples, edits, additions and replacements stand as in the paper: subject-driven
            generation and editing 1:1, addition and replacement 1:1.
    """

    path: str | tuple[str, ...]
    ratio: float | None = None

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # where it stands in a list; read by pydantic


@dataclass(frozen=True, eq=False)
class MixedSamples:
    """A batch before it is collated.

    Attributes:
        samples: Of all sources, shuffled.
        sources: Which source each is from.
        generator: For the noise that the latents are drawn with.
    """

    samples: list[PreparedSample]
    sources: NDArray[np.int64]
    generator: np.random.Generator


class MixedBatches:
    """The batches of a run.

    Attributes:
        config: The sizes of the model whose encoders made the sources.
        encoders: Digests of these encoders' weights, exact and as float16 holds them, see `Index`.
    """

    config: ModelConfig
    encoders: tuple[str, str | None]

    def __init__(self, sources: Sequence[Source], batch: int, seed: int) -> None:
        """Open the sources.

        Args:
            sources: At least one.
            batch: Samples in a batch of each process.
            seed: Of the order of everything.

        Raises:
            InputError: A source is no prepared set or empty, a ratio is not above 0, or the sources were made with
                different encoders.
        """
        if not sources:
            raise InputError("sources is empty; name at least one folder that mige-rt data prepare made")
        self._sources = [_Shards.open(source) for source in sources]
        ratios = [1.0 if source.ratio is None else source.ratio for source in sources]
        for k, ratio in enumerate(ratios):
            if not (np.isfinite(ratio) and ratio > 0):
                raise InputError(f"sources[{k}].ratio is {ratio}; expected a number greater than 0")
        first = self._sources[0].sets[0]
        for prepared in (prepared for source in self._sources for prepared in source.sets):
            if prepared.index.encoders != first.index.encoders:
                raise InputError(
                    f"{prepared.folder} was prepared with other encoders than {first.folder}; prepare both with one "
                    "model"
                )
        self.config = first.config
        self.encoders = first.index.encoders, first.index.encoders_float16
        self._bounds = np.cumsum(ratios) / sum(ratios) * batch  # of each source's part of a batch, [S]
        self._bounds[-1] = batch
        self._seed = seed

    def batches(self, step: int, rank: int, ranks: int) -> Iterator[MixedSamples]:
        """The batches of one process from a step on, without end.

        Each has of each source the number that its ratio asks for, rounded up or down by chance, so that the mean is
        exact.

        Args:
            step: The first step.
            rank: The process's.
            ranks: Number of processes.

        Yields:
            The step's samples.
        """
        taken = self._counts(np.arange(step), rank).sum(axis=0)
        series = [
            _Series(shards, (self._seed, k), rank, ranks, int(taken[k])) for k, shards in enumerate(self._sources)
        ]
        while True:
            counts = self._counts(np.arange(step, step + 1), rank)[0]
            sources = np.repeat(np.arange(len(series)), counts)
            sources = np.random.default_rng((BATCH_ORDER, self._seed, step, rank)).permutation(sources)
            samples = [next(series[k]) for k in sources]
            generator = np.random.default_rng((NOISE, self._seed, step, rank))
            yield MixedSamples(samples, sources, generator)
            step += 1

    def _counts(self, steps: NDArray[np.int64], rank: int) -> NDArray[np.int64]:
        """How many samples of each source a process takes at some steps, [steps,S].

        The samples stand one apart from each other on a line as long as the batch, of which each source has its part;
        the first one's place is spread evenly over the steps.
        """
        first = np.random.default_rng((BATCH_OFFSET, self._seed, rank)).random()
        offsets = (first + GOLDEN * steps) % 1  # [steps]
        below = np.ceil(self._bounds - offsets[:, None]).astype(np.int64)  # samples before each part's end
        return np.diff(below, axis=1, prepend=0)


@dataclass(frozen=True)
class _Shards:
    """The shards of one source, in whichever of its folders they are."""

    sets: tuple[PreparedSet, ...]
    places: tuple[tuple[int, int], ...]  # of each shard: the set, and its number there
    sizes: tuple[int, ...]  # samples of each shard

    @staticmethod
    def open(source: Source) -> "_Shards":
        paths = (source.path,) if isinstance(source.path, str) else source.path
        sets = tuple(open_prepared(Path(path)) for path in paths)
        places = tuple((s, n) for s, prepared in enumerate(sets) for n in range(len(prepared.index.shards)))
        sizes = tuple(sets[s].index.shards[n].samples for s, n in places)
        if not sizes:
            raise InputError(f"{', '.join(paths) or 'a source'} has no samples; take it out of the sources")
        return _Shards(sets, places, sizes)

    def read(self, shard: int) -> list[PreparedSample]:
        s, n = self.places[shard]
        return self.sets[s].read_shard(n)


class _Series:
    """One process's samples of one source, from any of them on."""

    def __init__(self, shards: _Shards, seed: tuple[int, int], rank: int, ranks: int, skipped: int) -> None:
        self._shards, self._seed, self._ranks = shards, seed, ranks
        self._turn, self._next = rank, skipped  # a number in the endless series of shards, and a sample of that shard
        self._order = np.empty(0, np.int64)  # shards, this time round
        self._round = -1
        self._samples: list[PreparedSample] | None = None  # of the shard at _turn
        while self._next >= (size := shards.sizes[self._shard()]):
            self._next -= size
            self._turn += ranks

    def _shard(self) -> int:
        turn_round, place = divmod(self._turn, len(self._shards.sizes))
        if turn_round != self._round:
            self._round = turn_round
            order = np.random.default_rng((SHARD_ORDER, *self._seed, turn_round))
            self._order = order.permutation(len(self._shards.sizes))
        return int(self._order[place])

    def __next__(self) -> PreparedSample:
        shard = self._shard()
        if self._next >= self._shards.sizes[shard]:
            self._samples, self._next = None, 0
            self._turn += self._ranks
            shard = self._shard()
        if self._samples is None:
            samples = self._shards.read(shard)
            order = np.random.default_rng((SAMPLE_ORDER, *self._seed, self._turn)).permutation(len(samples))
            self._samples = [samples[i] for i in order]
        self._next += 1
        return self._samples[self._next - 1]
