"""Shards made by actors of a Ray cluster (`ray.data`), whose machines see the same folders."""

import pickle
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import ray
from ray import data

from mige_rt.batch.ray_data import ray_cluster
from mige_rt.errors import InputError
from trainer.data.encode import Encoders
from trainer.data.shards import Shard, ShardReport
from trainer.data.workers import MakeShard, use_one_thread

_ray: Any = ray  # the types of both are partly unknown
_data: Any = data


class _Actor:
    """The encoders, as `map_batches` takes them. Shards and reports travel pickled, between our own processes alone."""

    def __init__(self, make: MakeShard, load: Callable[[], Encoders]) -> None:
        self._encoders = load()
        self._make = partial(make, self._encoders)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        use_one_thread(self._encoders.device)
        return {"report": [pickle.dumps(self._report(pickle.loads(shard))) for shard in batch["shard"]]}

    def _report(self, shard: Shard) -> ShardReport | InputError:
        try:
            return self._make(shard)
        except InputError as error:  # Ray would wrap it into texts of its own
            return error


def make_on_ray(
    make: MakeShard, work: Sequence[Shard], load: Callable[[str], Encoders], address: str, actors: int, device: str
) -> Generator[ShardReport, None, None]:
    """Make shards by actors of a cluster.

    Args:
        make: Makes a shard with an actor's encoders.
        work: The shards, with absolute paths.
        load: Gives the encoders on a device.
        address: See `ray_cluster`.
        actors: How many.
        device: cpu, or cuda: then each has a GPU.

    Yields:
        What came of each, as it is done.

    Raises:
        InputError: No cluster answers, a shard cannot be made, or an actor ended by itself.
    """
    if not work:
        return
    with ray_cluster(address):
        number, has_gpu = min(actors, len(work)), device != "cpu"
        if has_gpu and (gpus := _ray.cluster_resources().get("GPU", 0)) < number:
            raise InputError(
                f"{number} processes need a GPU each, and the cluster at {address!r} has {gpus:g}; give fewer"
            )
        context: Any = _data.DataContext.get_current()
        context.max_errored_blocks = -1  # what ends an actor costs the shards of one block
        dataset: Any = _data.from_items(
            [{"shard": pickle.dumps(shard)} for shard in work], override_num_blocks=len(work)
        ).map_batches(
            _Actor,
            fn_constructor_args=(make, partial(load, device)),
            batch_size=1,
            compute=_data.ActorPoolStrategy(size=number),
            num_gpus=1 if has_gpu else None,
            scheduling_strategy="SPREAD",
        )
        reports = 0
        for row in dataset.iter_rows():
            report: ShardReport | InputError = pickle.loads(row["report"])
            if isinstance(report, InputError):
                raise report
            reports += 1
            yield report
        if reports < len(work):
            raise InputError(
                f"{len(work) - reports} shards were not made, since their actors ended by themselves, perhaps for lack "
                "of memory; Ray's log says more. Give fewer --processes: the same command goes on where it stopped"
            )
