"""A pipeline over raw records, into shards and the training manifest that leads into them.

The folder has `shard-000000.tar` and so on, each with `shard-000000.json` beside it once it is whole. `plan.json` says
what they are made from. When all shards are there, `manifest.jsonl`, `dropped.jsonl`, `funnel.json` and `funnel.png`
are written: the samples for `mige-rt data prepare`, what was left out and why, and what each stage left.

A shard holds the samples of the next `shard_records` records. What comes of a record depends on it and on the roles
alone, so a run that was stopped, at whatever moment, goes on with the shards that are missing and ends on the same
bytes, as far as the roles give the same answers.
"""

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from engines.pytorch import torch_device
from mige_rt.atomic import atomic_file
from mige_rt.errors import InputError
from trainer.data.manifest import MANIFEST
from trainer.data.plan import write_plan
from trainer.pipelines.add import add_stages
from trainer.pipelines.built import BuiltShard, write_shard
from trainer.pipelines.chat import served_model
from trainer.pipelines.config import OpenAIRole, PipelineConfig
from trainer.pipelines.edit import edit_stages
from trainer.pipelines.funnel import plot_funnel
from trainer.pipelines.inputs import read_records
from trainer.pipelines.language import Prompts
from trainer.pipelines.loaders import Roles, identities
from trainer.pipelines.preview import write_preview
from trainer.pipelines.records import Record
from trainer.pipelines.replace import replace_stages
from trainer.pipelines.stages import Stage, run_stages
from trainer.pipelines.subject import subject_stages
from trainer.plotting import check_matplotlib

SCHEMA = 1
DROPPED, FUNNEL, FUNNEL_PLOT, PREVIEW = "dropped.jsonl", "funnel.json", "funnel.png", "dry-run.png"

PIPELINES: Mapping[str, Callable[[PipelineConfig], list[Stage]]] = {
    "subject": subject_stages,
    "edit": edit_stages,
    "add": add_stages,
    "replace": replace_stages,
}

OnProgress = Callable[[str, int, int], None]  # "shards", how many are done, and how many there are


@dataclass(frozen=True)
class BuildOptions:
    """How a pipeline is run.

    Attributes:
        ray: Address of a Ray cluster, see `mige_rt.batch.ray_data.ray_cluster`; None: without Ray, in this process.
        limit: Take the first so many records alone.
    """

    ray: str | None = None
    limit: int | None = None


def build(
    config: PipelineConfig, data: Path, out: Path, options: BuildOptions, on_progress: OnProgress | None = None
) -> BuiltShard:
    """Make training samples of raw records, or go on where a run was stopped.

    Args:
        config: The pipeline and its roles.
        data: See `read_records`.
        out: The folder to make, or one that an earlier run of the same kind began.
        options: How to do it.
        on_progress: Called after each shard.

    Returns:
        What came of all records.

    Raises:
        InputError: The input cannot be used, a role cannot work, too many records are bad, or `out` holds something
            else. Shards that are whole stay.
    """
    check_matplotlib()
    if options.ray is None:
        _check_devices(config)
    records = _records(config, data, options.limit)
    write_plan(out, _plan(config, records), allowed=(PREVIEW,))
    shards = {
        out / f"shard-{number:06d}.tar": records[start : start + config.shard_records]
        for number, start in enumerate(range(0, len(records), config.shard_records))
    }
    reports = {path: path.with_suffix(".json") for path in shards}
    todo = {path: chunk for path, chunk in shards.items() if not reports[path].is_file()}
    stages = [stage.name for stage in PIPELINES[config.pipeline.name](config)]
    with closing(_finished(config, [record for chunk in todo.values() for record in chunk], options)) as finished:
        whole = _whole_shards(todo, finished)
        for done, (path, chunk) in enumerate(whole, len(shards) - len(todo) + 1):
            write_shard(path, stages, chunk, config.max_bad)
            if on_progress:
                on_progress("shards", done, len(shards))
    missing = [path.name for path in shards if not reports[path].is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(shards)} shards were not made, such as {missing[0]}: a Ray actor ended by itself, "
            "perhaps for lack of memory. Ray's log says why; start the same command again"
        )
    total = BuiltShard()
    for path in shards:
        total.add(BuiltShard.read(reports[path]))
    _write_summary(out, total)
    return total


def dry_run(config: PipelineConfig, data: Path, out: Path, number: int) -> list[Record]:
    """Take the first records through a pipeline, and show them on a contact sheet, `out`/dry-run.png.

    Args:
        config: The pipeline and its roles.
        data: See `read_records`.
        out: The folder, which is made if it is not there.
        number: Of records.

    Returns:
        What has become of them.

    Raises:
        InputError: The input cannot be used, a role cannot work, or `out` cannot be written.
    """
    _check_devices(config)
    records = list(_in_process(config, _records(config, data, number)))
    try:
        out.mkdir(exist_ok=True)
        write_preview(records, out / PREVIEW)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error}): give a path in an existing folder of your own") from error
    return records


def _check_devices(config: PipelineConfig) -> None:
    """Raises InputError where a role's device is not on this machine. With Ray it is the cluster that has it or not."""
    for name, role in dict(config.roles).items():
        if role is not None:
            try:
                torch_device(role.device)
            except InputError as error:
                raise InputError(f"roles.{name}.device: {error}") from error


def _records(config: PipelineConfig, data: Path, limit: int | None) -> list[Record]:
    is_grounded = config.roles.tagger is None
    return read_records(config.pipeline.name, data, is_grounded=is_grounded)[:limit]


def _plan(config: PipelineConfig, records: Sequence[Record]) -> dict[str, object]:
    """All that the shards' bytes depend on."""
    digest = sha256("\n".join(json.dumps(asdict(record)) for record in records).encode())
    return {
        "schema": SCHEMA,
        "pipeline": config.pipeline.model_dump(mode="json"),
        "roles": identities(config),
        # Apart from the roles, whose entry earlier plans have without it.
        "served_models": {
            name: served_model(role) for name, role in dict(config.roles).items() if isinstance(role, OpenAIRole)
        },
        "prompts": sha256(json.dumps(Prompts(config.prompts).all()).encode()).hexdigest(),
        "records": digest.hexdigest(),
        "shard_records": config.shard_records,
    }


def _finished(
    config: PipelineConfig, records: Sequence[Record], options: BuildOptions
) -> Generator[Record, None, None]:
    """The records as they come out of the pipeline. Raises InputError where a role cannot work."""
    if not records:
        return
    if options.ray is None:
        yield from _in_process(config, records)
        return
    from trainer.pipelines.ray_run import run_on_ray

    for record in run_on_ray(config, PIPELINES[config.pipeline.name](config), records, options.ray):
        yield _unless_stopped(record)


def _in_process(config: PipelineConfig, records: Sequence[Record]) -> Generator[Record, None, None]:
    roles, stages = Roles(config), PIPELINES[config.pipeline.name](config)
    for record in records:
        run_stages(stages, record, roles)
        yield _unless_stopped(record)


def _unless_stopped(record: Record) -> Record:
    if record.stop:
        raise InputError(record.stop)
    return record


def _whole_shards(
    shards: Mapping[Path, Sequence[Record]], records: Iterable[Record]
) -> Generator[tuple[Path, list[Record]], None, None]:
    """Each shard as soon as all of its records are there, in whatever order they come."""
    shard_of = {record.number: path for path, chunk in shards.items() for record in chunk}
    waiting: dict[Path, list[Record]] = {}
    for record in records:
        path = shard_of[record.number]
        waiting.setdefault(path, []).append(record)
        if len(waiting[path]) == len(shards[path]):
            yield path, sorted(waiting.pop(path), key=lambda record: record.number)


def _write_summary(out: Path, total: BuiltShard) -> None:
    plot_funnel(total, out / FUNNEL_PLOT)
    texts = {
        MANIFEST: "".join(total.lines),
        DROPPED: "".join(json.dumps(asdict(line)) + "\n" for line in total.dropped),
        FUNNEL: json.dumps({name: asdict(count) for name, count in total.funnel.items()}, indent=1) + "\n",
    }
    for name, text in texts.items():
        with atomic_file(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
