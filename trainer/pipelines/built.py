"""A shard as a pipeline writes it: samples in one of webdataset's tar files, and what came of the records."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from mige_rt.atomic import atomic_file
from mige_rt.errors import InputError
from mige_rt.requests import RequestRecord
from trainer.data.manifest import manifest_line
from trainer.data.shards import TAR_HEADER
from trainer.pipelines.records import Drop, Record, Sample


@dataclass(frozen=True)
class StageCount:
    """What a stage leaves.

    Attributes:
        records: How many are left.
        entities: How many in their images are left.
        new_entities: How many the stage has brought up, before it left any out.
    """

    records: int
    entities: int
    new_entities: int

    def __add__(self, other: "StageCount") -> "StageCount":
        """Both together."""
        return StageCount(
            self.records + other.records,
            self.entities + other.entities,
            self.new_entities + other.new_entities,
        )


@dataclass(frozen=True)
class DropLine:
    """What was left out: a record, or an entity in it (its number from 0 on)."""

    id: str
    entity: int | None
    stage: str
    reason: str
    detail: str
    bad: bool


@dataclass
class BuiltShard:
    """What came of a shard's records.

    Attributes:
        records: How many there were.
        bad: How many of them were bad.
        funnel: What is left after each stage, by its name.
        lines: Of the training manifest.
        dropped: What was left out.
    """

    records: int = 0
    bad: int = 0
    funnel: dict[str, StageCount] = field(default_factory=dict[str, StageCount])
    lines: list[str] = field(default_factory=list[str])
    dropped: list[DropLine] = field(default_factory=list[DropLine])

    def add(self, other: "BuiltShard") -> None:
        """Count another shard's records as well."""
        self.records += other.records
        self.bad += other.bad
        for name, count in other.funnel.items():
            self.funnel[name] = self.funnel.get(name, StageCount(0, 0, 0)) + count
        self.lines += other.lines
        self.dropped += other.dropped

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "BuiltShard":
        """The inverse of `write`."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return BuiltShard(
            records=content["records"],
            bad=content["bad"],
            funnel={name: StageCount(**count) for name, count in content["funnel"].items()},
            lines=content["lines"],
            dropped=[DropLine(**line) for line in content["dropped"]],
        )


def count_stages(stages: Sequence[str], records: Sequence[Record]) -> dict[str, StageCount]:
    """What is left after each stage, by its name."""
    order = {name: number for number, name in enumerate(stages)}

    def passed(drop: Drop | None, stage: int) -> bool:
        return drop is None or order[drop.stage] > stage

    counts: dict[str, StageCount] = {}
    for name, number in order.items():
        remaining = [record for record in records if passed(record.drop, number)]
        entities = [
            candidate
            for record in remaining
            for candidate in record.candidates
            if candidate.stage and order[candidate.stage] <= number and passed(candidate.drop, number)
        ]
        new = sum(candidate.stage == name for record in records for candidate in record.candidates)
        counts[name] = StageCount(len(remaining), len(entities), new)
    return counts


def write_shard(path: Path, stages: Sequence[str], records: Sequence[Record], max_bad: float) -> BuiltShard:
    """Write a shard and its report, each whole or not at all.

    Args:
        path: Of the .tar; the report is a .json beside it, written when the .tar is whole.
        stages: The names of the pipeline's stages.
        records: That went through all of them.
        max_bad: The largest part of them that may be bad.

    Raises:
        InputError: More of them are bad, or the disk cannot be written.
    """
    dropped = [line for record in records for line in _drop_lines(record)]
    bad = [record for record in records if record.drop is not None and record.drop.bad]
    if len(bad) > max_bad * len(records):
        first = next(line for line in dropped if line.bad)
        raise InputError(
            f"{len(bad)} of {len(records)} records of {path.name} are bad, such as {first.id} at the stage "
            f"{first.stage}: {first.reason} ({first.detail}). Mend them or what reads them, or raise max_bad in the "
            "config, and start the same command again"
        )
    built = BuiltShard(len(records), len(bad), count_stages(stages, records), dropped=dropped)
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as file, TarWriter(file, **TAR_HEADER) as tar:
            for record in records:
                for k, sample in enumerate(record.samples):
                    key = f"{record.number:09d}-{k}"
                    tar.write({"__key__": key, **sample.files, "json": _description(record, sample)})
                    built.lines.append(_manifest_line(path.name, key, sample))
        built.write(path.with_suffix(".json"))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); make room, and start the same command again") from error
    return built


def _drop_lines(record: Record) -> list[DropLine]:
    entities = [(k, candidate.drop) for k, candidate in enumerate(record.candidates) if candidate.drop is not None]
    drops = [*entities, *([(None, record.drop)] if record.drop is not None else [])]
    return [DropLine(record.id, entity, drop.stage, drop.reason, drop.detail, drop.bad) for entity, drop in drops]


def _description(record: Record, sample: Sample) -> bytes:
    """What a reader of the tar file alone needs."""
    values: Mapping[str, Any] = {
        "id": record.id,
        "prompt": sample.prompt,
        "images": sample.images,
        "source": sample.source,
        "target": sample.target,
        "size": sample.size,
        "scores": sample.scores,
        "subjects": sample.subjects,
    }
    return (json.dumps(values, sort_keys=True) + "\n").encode()


def _manifest_line(shard: str, key: str, sample: Sample) -> str:
    def path(name: str) -> str:
        return f"{shard}/{key}.{name}"

    record = RequestRecord(
        id=key,
        prompt=sample.prompt,
        images=tuple(map(path, sample.images)),
        source=None if sample.source is None else path(sample.source),
        target=path(sample.target),
        size=sample.size,
        scores=dict(sample.scores) or None,
    )
    return manifest_line(record)
