"""Making a benchmark's images. A run that was stopped goes on; several may share a folder, each with a part."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

from benchmarks.evaluation.results import Results, RunId, start_results
from benchmarks.evaluation.sample import Benchmark, BenchmarkSample, ImageFile
from mige_rt.errors import InputError
from mige_rt.guidance import branches
from mige_rt.image_output import save_image
from mige_rt.instruction import Task
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import Request, ResolvedRequest, resolve
from mige_rt.sampling_params import SamplingParams
from mige_rt.scheduler import make_schedule

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How images are made.

    Attributes:
        params: How to sample.
        batch: Images at once, if the engine takes as many.
        part: This part of the groups alone, and of how many, from 1.
        limit: The first so many samples alone.
    """

    params: SamplingParams = field(default_factory=SamplingParams)
    batch: int = 8
    part: tuple[int, int] = (1, 1)
    limit: int | None = None


@dataclass(frozen=True)
class Generated:
    """What a run did.

    Attributes:
        images: That were made.
        there: That had been made before.
        failures: By the image's name, why it could not be made.
    """

    images: int
    there: int
    failures: dict[str, str]


@dataclass(frozen=True)
class _Job:
    name: str
    sample: BenchmarkSample
    seed: int


def generate(
    pipe: MigePipeline,
    benchmark: Benchmark,
    results: Results,
    options: GenerateOptions,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Generated:
    """Make the images that a results folder lacks.

    Args:
        pipe: The model.
        benchmark: What to make.
        results: From `open_run`.
        options: How.
        on_progress: Called after each batch.

    Returns:
        What was done; a sample that cannot be used stops no other.
    """
    chosen = benchmark if options.limit is None else benchmark.first(options.limit)
    groups = _groups(chosen, options.part)
    jobs = [_Job(name, sample, seed) for sample, seed, name in chosen.image_names() if sample.group in groups]
    pending = [job for job in jobs if not results.image(job.name).is_file()]
    there, failures, images = len(jobs) - len(pending), dict[str, str](), 0
    on_progress("images", there, len(jobs))
    while pending:
        awaited = {(job.sample.id, job.seed) for job in pending}
        ready = [job for job in pending if (job.sample.after, job.seed) not in awaited]
        pending = [job for job in pending if (job.sample.after, job.seed) in awaited]
        for batch in _batches(_resolved(ready, results, failures), min(options.batch, pipe.max_batch_size)):
            images += _make(pipe, batch, results, options.params, failures)
            on_progress("images", there + images + len(failures), len(jobs))
    return Generated(images, there, failures)


def open_run(folder: Path, pipe: MigePipeline, benchmark: Benchmark, params: SamplingParams) -> Results:
    """Begin a results folder for a model, or go on with one.

    Raises:
        InputError: It holds other images, or no image can be made with these parameters; the folder is then not begun.
    """
    tasks: tuple[Task, ...] = get_args(Task)
    engine = pipe.engine
    resolved = {task: params.with_defaults(pipe.config, task) for task in tasks}
    params.approximations()
    for of_task in resolved.values():
        make_schedule(of_task.scheduler, of_task.num_inference_steps, pipe.config.prediction)
        branches(of_task.guidance_scale, of_task.image_guidance_scale)
    run = RunId(
        layout=benchmark.layout,
        fingerprint=benchmark.fingerprint(),
        model=pipe.model_name,
        engine=engine.name,
        device=engine.device.partition(":")[0],  # parts are made on several of a kind
        precision=engine.precision,
        params={task: asdict(of_task) for task, of_task in resolved.items()},
    )
    return start_results(folder, run)


def _groups(benchmark: Benchmark, part: tuple[int, int]) -> set[str]:
    """The groups of a part: a session's turns stay together."""
    number, parts = part
    return set(list(dict.fromkeys(sample.group for sample in benchmark.samples))[number - 1 :: parts])


def _resolved(
    jobs: Sequence[_Job], results: Results, failures: dict[str, str]
) -> Iterator[tuple[_Job, ResolvedRequest]]:
    for job in jobs:
        try:
            yield job, resolve(_request(job, results))
        except InputError as error:
            failures[job.name] = str(error)


def _request(job: _Job, results: Results) -> Request:
    sample = job.sample
    opened = {image: image.open() for image in dict.fromkeys(sample.images)}
    source = sample.source
    if sample.after is not None:
        source = ImageFile(results.image(f"{sample.after}-{job.seed}.png"))
    edited = None if source is None else opened[source] if source in opened else source.open()
    return Request(sample.prompt, tuple(opened[image] for image in sample.images), edited, job.seed)


def _batches(
    requests: Iterator[tuple[_Job, ResolvedRequest]], size: int
) -> Iterator[list[tuple[_Job, ResolvedRequest]]]:
    """Batches of one task, as the requests come."""
    waiting: dict[str, list[tuple[_Job, ResolvedRequest]]] = {}
    for job, request in requests:
        batch = waiting.setdefault(request.task, [])
        batch.append((job, request))
        if len(batch) == size:
            yield waiting.pop(request.task)
    yield from waiting.values()


def _make(
    pipe: MigePipeline,
    batch: Sequence[tuple[_Job, ResolvedRequest]],
    results: Results,
    params: SamplingParams,
    failures: dict[str, str],
) -> int:
    """Make and write a batch; where it fails, image by image, so that a bad one is known. Returns how many."""
    try:
        images = pipe.generate([request for _, request in batch], params, on_warning=lambda sentence: None)
    except InputError as error:
        if len(batch) > 1:
            return sum(_make(pipe, [one], results, params, failures) for one in batch)
        failures[batch[0][0].name] = str(error)
        return 0
    for (job, request), image in zip(batch, images, strict=True):
        info = {"prompt": request.prompt, "task": request.task, "seed": str(job.seed), "model": results.id.title}
        save_image(image, results.image(job.name), info, overwrite=True)
    return len(images)
