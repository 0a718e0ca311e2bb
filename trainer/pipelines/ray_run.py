"""A pipeline on Ray Data: its stages as actors, each of which holds the roles of its stages (`ray.data`).

Stages of roles that need no GPU, one after another and with as many actors, share them; every other role has its own.
Images travel as paths, so all machines have to see the same folders.
"""

import itertools
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import data

from mige_rt.batch.ray_data import ray_cluster
from mige_rt.errors import InputError
from trainer.pipelines.config import PipelineConfig
from trainer.pipelines.loaders import Roles
from trainer.pipelines.records import Record
from trainer.pipelines.stages import Stage, run_stages

_ray: Any = ray  # the types of both are partly unknown
_data: Any = data


@dataclass(frozen=True)
class StageGroup:
    """Stages in the same actors.

    Attributes:
        stages: In their order.
        concurrency: How many actors.
        num_gpus: Of each.
    """

    stages: tuple[Stage, ...]
    concurrency: int
    num_gpus: float


class _StageActor:
    """Stages as `map_batches` takes them. Records travel pickled, between our own processes alone."""

    def __init__(self, config: PipelineConfig, stages: Sequence[Stage]) -> None:
        self._roles, self._stages = Roles(config), stages

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        records = [pickle.loads(content) for content in batch["record"]]
        for record in records:
            run_stages(self._stages, record, self._roles)
        return {"record": [pickle.dumps(record) for record in records]}


def group_stages(config: PipelineConfig, stages: Sequence[Stage]) -> list[StageGroup]:
    """Which stages share actors. Those without a role go with the stage before, the first ones with the one after."""
    places = [_place(config, stage) for stage in stages]
    place = next((place for place in places if place is not None), ("", 1, 0.0))
    placed: list[tuple[Stage, tuple[str, int, float]]] = []
    for stage, own_place in zip(stages, places, strict=True):
        place = own_place or place
        placed.append((stage, place))
    groups = itertools.groupby(placed, key=lambda pair: pair[1])
    return [StageGroup(tuple(stage for stage, _ in pairs), place[1], place[2]) for place, pairs in groups]


def _place(config: PipelineConfig, stage: Stage) -> tuple[str, int, float] | None:
    """What stages in the same actors have in common: the role, where it needs a GPU; actors; GPUs of each."""
    role = None if stage.role is None else getattr(config.roles, stage.role)
    if role is None:
        return None
    return stage.role or "" if role.num_gpus else "", role.concurrency, role.num_gpus


def run_on_ray(
    config: PipelineConfig, stages: Sequence[Stage], records: Sequence[Record], address: str
) -> Iterator[Record]:
    """Take records through stages on a Ray cluster.

    Args:
        config: The pipeline and its roles.
        stages: Of the pipeline.
        records: With absolute paths.
        address: See `ray_cluster`.

    Yields:
        The records, in the order in which they are done. Those of an actor that ended by itself are missing.

    Raises:
        InputError: No cluster answers, or it has fewer GPUs than the roles need.
    """
    groups = group_stages(config, stages)
    with ray_cluster(address):
        resources = _ray.cluster_resources()
        gpus = sum(group.num_gpus * group.concurrency for group in groups)
        if gpus > resources.get("GPU", 0):
            raise InputError(
                f"the roles need {gpus:g} GPUs at once, and the cluster at {address!r} has "
                f"{resources.get('GPU', 0):g}; lower num_gpus or concurrency in the config"
            )
        actors = sum(group.concurrency for group in groups)
        context: Any = _data.DataContext.get_current()
        context.max_errored_blocks = -1  # what ends an actor costs the records of one block
        dataset: Any = _data.from_items(
            [{"record": pickle.dumps(record)} for record in records],
            override_num_blocks=min(len(records), max(4 * actors, len(records) // 16)),
        )
        for group in groups:
            dataset = dataset.map_batches(
                _StageActor,
                fn_constructor_args=(config, group.stages),
                batch_size=1,
                compute=_data.ActorPoolStrategy(size=group.concurrency),
                num_gpus=group.num_gpus or None,
                num_cpus=min(1.0, resources.get("CPU", 1) / actors / 2),  # all of them run at once
            )
        for row in dataset.iter_rows():
            yield pickle.loads(row["record"])
