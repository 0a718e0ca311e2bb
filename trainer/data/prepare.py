"""A manifest's images through the frozen encoders, once, into shards that training reads.

The folder has `shard-000000.tar` and so on, webdataset's tar files, each with `shard-000000.json` beside it once it is
whole: what came of its samples. `plan.json` says what they are made from. `index.json`, which makes the folder a
prepared set (`trainer.data.prepared`), is written when all shards are there.

A shard depends on the manifest, the encoders and the options alone: it has the same bytes whenever and by however many
processes it is made, on one kind of machine. So a run that was stopped, at whatever moment, goes on with the shards
that are missing, and several machines may each make a part of them in one folder.
"""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from engines.pytorch import torch_device
from mige_rt.atomic import atomic_file
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from trainer.checkpoints.open_checkpoint import CheckpointLocation
from trainer.data.encode import Encoders, load_encoders
from trainer.data.manifest import ManifestSample, open_manifest
from trainer.data.plan import write_plan
from trainer.data.prepared import INDEX_FILE, SCHEMA, Index, ShardEntry
from trainer.data.shards import CorruptImage, Shard, ShardReport, make_shard
from trainer.data.workers import MakeShard, devices_of_processes, make_here, make_in_processes

CORRUPT_FILE = "corrupt.jsonl"
MAX_CORRUPT = 0.01  # of the images


@dataclass(frozen=True)
class PrepareOptions:
    """How a manifest is prepared.

    Attributes:
        processes: How many work at once; each holds the encoders.
        ray: Address of a Ray cluster whose actors do the work, see `mige_rt.batch.ray_data`; None: this machine.
        device: cpu, cuda (the processes take turns at the GPUs), cuda:1, or auto: cuda where there is a GPU.
        shard_samples: Samples in each shard.
        batch: Images that go through an encoder at once.
        seed: Of the order of the samples: a shard is a random part of the manifest.
        filtered: Apply the paper's filters (`trainer.data.filters`).
        part: (i, n): make the i-th of n parts of the shards, from 1 on.
        root: The folder that the manifest's paths are relative to; None: see `open_manifest`.
    """

    processes: int = 1
    ray: str | None = None
    device: str = "auto"
    shard_samples: int = 256
    batch: int = 8
    seed: int = 0
    filtered: bool = True
    part: tuple[int, int] = (1, 1)
    root: Path | None = None


@dataclass(frozen=True)
class PrepareReport:
    """What came of a manifest.

    Attributes:
        total: Of all shards that are in the folder.
        shards: How many there are.
        missing: How many are left to the other parts.
    """

    total: ShardReport
    shards: int
    missing: int


OnProgress = Callable[[str, int, int], None]  # "shards", how many are done, and how many there are


def prepare(
    manifest: Path,
    model: CheckpointLocation,
    out: Path,
    options: PrepareOptions,
    *,
    on_progress: OnProgress | None = None,
    on_corrupt: Callable[[CorruptImage], None] | None = None,
) -> PrepareReport:
    """Compute what training reads of a manifest's samples, or go on where a run was stopped.

    Args:
        manifest: See `trainer.data.manifest`.
        model: Where the VAE and the ViT are taken from, see `load_encoders`.
        out: The folder to make, or one that an earlier run of the same kind began.
        options: How to do it.
        on_progress: Called after each shard.
        on_corrupt: Called with each image that cannot be read.

    Returns:
        What came of it. Samples with a corrupt image are left out.

    Raises:
        InputError: The manifest or the model cannot be used, `out` holds something else, the disk is full, or more than
            MAX_CORRUPT of the images are corrupt: then the run stops as soon as that is certain.
    """
    if options.ray is not None and options.part != (1, 1):
        raise InputError("--part is for machines that share a folder without Ray; leave it out with --ray")
    # With Ray it is the cluster that has a GPU, or has none.
    device = options.device if options.ray is not None and options.device != "auto" else torch_device(options.device)
    root = None if options.root is None else options.root.absolute()
    manifest, out = manifest.absolute(), out.absolute()  # as actors elsewhere find them
    samples = open_manifest(manifest, root)
    shards = _shards(samples, out, options)
    is_here = options.ray is None and options.processes == 1
    encoders = load_encoders(model, device if is_here else "cpu")
    config, fingerprint, rounded = encoders.config, encoders.fingerprint(), encoders.fingerprint(rounded=True)
    # All that the shards' bytes depend on.
    plan = {
        "schema": SCHEMA,
        "manifest": sha256(manifest.read_bytes()).hexdigest(),
        "images_root": None if root is None else str(root),
        "model": config.name,
        "encoders": fingerprint,
        "device": device.partition(":")[0],
        "shard_samples": options.shard_samples,
        "batch": options.batch,
        "seed": options.seed,
        "filtered": options.filtered,
    }
    write_plan(out, plan)
    part, parts = options.part
    todo = [shard for shard in shards[part - 1 :: parts] if not shard.report_path.is_file()]
    total = _total(shards)
    most_corrupt = MAX_CORRUPT * sum(len(sample.paths()) for sample in samples)
    _check_corrupt(total, most_corrupt, out)
    make = partial(make_shard, batch=options.batch, filtered=options.filtered)
    if is_here:
        reports = make_here(partial(make, encoders), todo, encoders.device)
    else:
        del encoders  # each process has its own
        reports = _elsewhere(make, todo, partial(load_encoders, model), device, options)
    with closing(reports):  # an error here ends the processes
        for done, report in enumerate(reports, len(shards) - len(todo) + 1):
            total.add(report)
            if on_corrupt:
                for image in report.corrupt:
                    on_corrupt(image)
            _check_corrupt(total, most_corrupt, out)
            if on_progress:
                on_progress("shards", done, len(shards))
    missing = sum(not shard.report_path.is_file() for shard in shards)
    if not missing:
        _write_index(out, shards, config, fingerprint, rounded)
    return PrepareReport(total, len(shards), missing)


def _elsewhere(
    make: MakeShard, todo: Sequence[Shard], load: Callable[[str], Encoders], device: str, options: PrepareOptions
) -> Generator[ShardReport, None, None]:
    """Shards made by several processes of this machine, or of a cluster."""
    if options.ray is None:
        return make_in_processes(make, todo, load, devices_of_processes(device, options.processes))
    from trainer.data.ray_workers import make_on_ray  # which needs the extra ray

    return make_on_ray(make, todo, load, options.ray, options.processes, device)


def _shards(samples: Sequence[ManifestSample], out: Path, options: PrepareOptions) -> list[Shard]:
    order: list[int] = np.random.default_rng(options.seed).permutation(len(samples)).tolist()
    starts = range(0, len(samples), options.shard_samples)
    chunks = [order[start : start + options.shard_samples] for start in starts]
    return [
        Shard(out / f"shard-{number:06d}.tar", [(i, samples[i]) for i in chunk]) for number, chunk in enumerate(chunks)
    ]


def _total(shards: Sequence[Shard]) -> ShardReport:
    """What came of the shards that are whole."""
    total = ShardReport()
    for shard in shards:
        if shard.report_path.is_file():
            total.add(ShardReport.read(shard.report_path))
    return total


def _check_corrupt(total: ShardReport, most: float, out: Path) -> None:
    if len(total.corrupt) > most:
        raise InputError(
            f"{len(total.corrupt)} images cannot be read, more than {MAX_CORRUPT:.0%} of them, such as: "
            f"{total.corrupt[0].error}. Repair them or take their lines out of the manifest, and remove {out}, which "
            "leaves them out so far"
        )


def _write_index(
    out: Path, shards: Sequence[Shard], config: ModelConfig, fingerprint: str, rounded_fingerprint: str
) -> None:
    """Make a prepared set of shards that are all there."""
    total = _total(shards)
    _check_corrupt(total, MAX_CORRUPT * total.images, out)
    sizes = [(shard.path.name, ShardReport.read(shard.report_path).samples) for shard in shards]
    index = Index(
        schema=SCHEMA,
        config=config.to_json(),
        encoders=fingerprint,
        samples=total.samples,
        tasks=dict(sorted(total.tasks.items())),
        shards=tuple(ShardEntry(name, samples) for name, samples in sizes if samples),
        encoders_float16=rounded_fingerprint,
    )
    with atomic_file(out / CORRUPT_FILE) as temporary:
        lines = [json.dumps(asdict(image)) + "\n" for image in total.corrupt]
        temporary.write_text("".join(lines), encoding="utf-8")
    with atomic_file(out / INDEX_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(index), indent=2) + "\n", encoding="utf-8")
