"""A batch on a Ray cluster, whose machines see the same folders: Ray Data (`ray.data`) over the jobs."""

import json
import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import ray
from ray import data

from mige_rt.batch.worker import BatchJob, BatchSettings, BatchWorker, Outcome
from mige_rt.errors import InputError

_ray: Any = ray  # the types of both are partly unknown
_data: Any = data


class _Actor:
    """A worker as `map_batches` takes it. Jobs and outcomes travel as JSON, which Arrow leaves as it is."""

    def __init__(self, settings: BatchSettings) -> None:
        self._worker = BatchWorker(settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        jobs = [BatchJob(**json.loads(job)) for job in batch["job"]]
        return {"outcome": [json.dumps(asdict(self._worker(job))) for job in jobs]}


def run_on_ray(
    settings: BatchSettings, jobs: Sequence[BatchJob], address: str, workers: int | None
) -> Iterator[Outcome]:
    """Make jobs by actors of a Ray cluster.

    Args:
        settings: Of the batch; travels to each actor. Its paths are absolute.
        jobs: What to make.
        address: As `ray.init` takes it: `auto`, `HOST:PORT`, `ray://HOST:PORT`, or `local` for a cluster of this
            machine alone that ends with the batch.
        workers: How many actors; None: one for each GPU, or where there is none, for each machine.

    Yields:
        The outcome of each job, in the order in which they end.

    Raises:
        InputError: No cluster answers at this address, or starts here within Ray's 30 seconds.
    """
    with ray_cluster(address):
        yield from _outcomes(settings, jobs, workers)


@contextmanager
def ray_cluster(address: str) -> Generator[None, None, None]:
    """A connection to a Ray cluster.

    Args:
        address: As `ray.init` takes it: `auto`, `HOST:PORT`, `ray://HOST:PORT`, or `local` for a cluster of this
            machine alone that ends with the block.

    Raises:
        InputError: No cluster answers at this address, or starts here within Ray's 30 seconds.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or else Ray warns of GPUs that nobody asked for
    try:
        _ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except Exception as error:  # Ray raises Exception itself where a node does not start in time
        raise InputError(
            f"no Ray cluster answers at {address!r} ({error}); start one with `ray start --head`, or give --ray local"
        ) from error
    try:
        context: Any = _data.DataContext.get_current()
        context.enable_progress_bars = False
        yield
    finally:
        _ray.shutdown()


def _outcomes(settings: BatchSettings, jobs: Sequence[BatchJob], workers: int | None) -> Iterator[Outcome]:
    gpus = int(_ray.cluster_resources().get("GPU", 0))
    actors = min(workers or gpus or len(_ray.nodes()), len(jobs))
    context: Any = _data.DataContext.get_current()
    context.max_errored_blocks = -1  # what ends an actor costs the jobs of one block
    dataset: Any = _data.from_items(
        [{"job": json.dumps(asdict(job))} for job in jobs],
        override_num_blocks=min(len(jobs), max(4 * actors, len(jobs) // 16)),
    )
    outcomes: Any = dataset.map_batches(
        _Actor,
        fn_constructor_args=(settings,),
        batch_size=1,
        compute=_data.ActorPoolStrategy(size=actors),
        num_gpus=1 if gpus else None,
        scheduling_strategy="SPREAD",  # an actor uses all the cores of its machine
    )
    ended: set[int] = set()
    for row in outcomes.iter_rows():
        outcome = Outcome(**json.loads(row["outcome"]))
        ended.add(outcome.number)
        yield outcome
    for job in jobs:
        if job.number not in ended:
            yield Outcome(number=job.number, error="the Ray actor ended while it made this; its log says why")
