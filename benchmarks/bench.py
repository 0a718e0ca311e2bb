"""`mige-rt bench`: every candidate in every case, beside its baselines and its parity, in one run."""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.bench_results import BenchResults, CandidateResult, Fidelity
from benchmarks.case import SHORT_STEPS, Candidate, Case, WorkerConfig, main_candidates, optional_candidates
from benchmarks.machine import environment, measure_peaks
from benchmarks.measure import InterleavedRuns, Latency
from benchmarks.parity import ImageErrors, tolerance
from benchmarks.schedule import WorkOptions
from benchmarks.work import Work, count, roofline_seconds
from benchmarks.worker import CandidateError, RunOutput, Worker, cold_start
from engines.factory import ENGINES, has_nvidia_driver
from export.exporter import ExportLimits, ExportOptions, export_bundle
from mige_rt.bundle import DEFAULT_MODEL, is_bundle, read_config, read_manifest
from mige_rt.config import ModelConfig, Precision
from mige_rt.errors import InputError

SHORT_ITERATIONS = 3

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure; of sizes, references, batches and numbers of steps, all combinations."""

    models: tuple[Path, ...] = (DEFAULT_MODEL,)  # of one model; missing precisions are exported from the first
    engines: tuple[str, ...] = ENGINES
    device: str = "auto"
    precisions: tuple[Precision, ...] = ()  # none: each bundle's own
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) in pixels; none: the trained one
    references: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = (1,)
    num_inference_steps: tuple[int, ...] = (60,)  # the published edits'
    guidance_scale: float = 5.0
    image_guidance_scale: float = 1.0
    iterations: int = 10
    warmup: int = 3
    cold_starts: int = 3  # of the command, for each plain candidate
    compile: bool = True  # torch.compile is a candidate
    peak_side: int | None = None  # see `machine.measure_peaks`
    command: str = "mige-rt bench"

    def cases(self, config: ModelConfig) -> list[Case]:
        return [
            Case(references, batch, steps, size, self.guidance_scale, self.image_guidance_scale)
            for size in self.sizes or ((config.size, config.size),)
            for batch in self.batches
            for steps in sorted(self.num_inference_steps, reverse=True)
            for references in self.references
        ]


def bench(options: BenchOptions, on_progress: OnProgress = lambda what, done, total: None) -> BenchResults:
    """Measure. Ctrl-C ends it with what was measured, `complete` false.

    Raises:
        InputError: A model cannot be read, models have different sizes, or there is no reference to compare with.
    """
    config = _one_config(options.models)
    names = ["tiny" if path == DEFAULT_MODEL else str(path) for path in options.models]
    model = {"name": config.name, "size": config.size, "models": names}
    today = date.today().isoformat()
    results = BenchResults(options.command, today, model, environment(), options.iterations, options.warmup)
    try:
        with _models(options, config, results, on_progress) as models, ExitStack() as stack:
            _Bench(options, config, results, on_progress, stack).run(models)
            results.complete = True
    except KeyboardInterrupt:
        pass
    return results


def _one_config(models: tuple[Path, ...]) -> ModelConfig:
    configs = [read_config(path) for path in models]
    for path, config in zip(models, configs, strict=True):
        if replace(config, name=configs[0].name, defaults=configs[0].defaults) != configs[0]:
            raise InputError(f"{models[0]} and {path} are models of different sizes; bench them one after the other")
    return configs[0]


@contextmanager
def _models(
    options: BenchOptions, config: ModelConfig, results: BenchResults, on_progress: OnProgress
) -> Iterator[dict[str, Path]]:
    """The model for each precision, see `case.main_candidates`; missing ones are exported for the time being."""
    models = {"auto": options.models[0]}
    for path in options.models:
        if is_bundle(path):
            models.setdefault(read_manifest(path).precision, path)
    missing = [p for p in options.precisions if p not in models] if set(options.engines) - {"pytorch"} else []
    sides = [side for size in options.sizes for side in size] or [config.size]
    limits = ExportLimits(max(options.batches), max(options.references), (min(sides), max(sides)))
    unchecked = ExportOptions(validate=False)
    with tempfile.TemporaryDirectory(prefix="mige-rt-bench-") as scratch:
        for precision in missing:
            if precision == "bf16" and not has_nvidia_driver():
                continue  # only PyTorch computes in it here, which needs no bundle
            on_progress(f"exporting {precision} for the time being", 0, 0)
            try:
                export_bundle(str(options.models[0]), Path(scratch) / precision, precision, limits, options=unchecked)
                models[precision] = Path(scratch) / precision
            except (InputError, RuntimeError) as error:
                results.skip(f"a bundle in {precision}", str(error))
        yield models


@dataclass
class _Bench:
    """One bench in progress: its workers, each started when it is first asked for, and its results."""

    options: BenchOptions
    config: ModelConfig
    results: BenchResults
    on_progress: OnProgress
    stack: ExitStack  # that ends the workers
    workers: dict[WorkerConfig, Worker | None] = field(default_factory=dict)  # None: it cannot be opened

    def run(self, models: dict[str, Path]) -> None:
        options, results = self.options, self.results
        precisions: list[Any] = list(options.precisions) or [p for p in models if p != "auto"] or ["auto"]
        if len(options.models) == 1 and not options.precisions:
            precisions = ["auto"]
        wanted = main_candidates(models, options.engines, options.device, precisions, options.compile)
        candidates = [candidate for candidate in wanted if self._open(candidate)]
        plain = [candidate.worker for candidate in candidates if candidate.plain]
        reference = self._reference(WorkerConfig(models["auto"], "pytorch", options.device, "fp32"), plain)
        if reference is None or not plain:
            missing = "nothing to measure" if reference else "no reference to compare with"
            reasons = "; ".join(f"{skipped['name']}: {skipped['reason']}" for skipped in results.skipped)
            raise InputError(f"there is {missing} ({reasons})")
        fastest = min(plain, key=lambda worker: ENGINES.index(worker.engine))
        candidates += [candidate for candidate in optional_candidates(fastest) if self._open(candidate)]
        self.on_progress("the machine's peaks", 0, 0)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            device = self._worker(reference).opened.device
            results.peaks = pool.submit(measure_peaks, device, options.peak_side).result()
        for case in options.cases(self.config):
            try:
                self._measure(case, candidates, Candidate(reference))
            except CandidateError as error:
                results.skip(str(case), f"the reference cannot make it: {error}")

    def _open(self, candidate: Candidate, name: str = "") -> bool:
        """Whether the candidate's worker is there; the results say once why it is not."""
        name, config = name or candidate.title(), candidate.worker
        if config not in self.workers:
            self.on_progress(f"opening {name}", 0, 0)
            try:
                worker = self.workers[config] = Worker(config)
                self.stack.callback(worker.kill)
            except CandidateError as error:
                self.workers[config] = None
                self.results.skip(name, str(error))
        return self.workers[config] is not None

    def _worker(self, config: WorkerConfig) -> Worker:
        worker = self.workers[config]
        assert worker is not None
        return worker

    def _reference(self, config: WorkerConfig, plain: list[WorkerConfig]) -> WorkerConfig | None:
        """PyTorch in float32 by our variant: a candidate that turned out to be it, or a process of its own."""
        for worker in plain:
            if worker.engine == "pytorch" and self._worker(worker).opened.precision == "fp32":
                return worker
        return config if self._open(Candidate(config), "the reference, PyTorch fp32") else None

    def _measure(self, case: Case, candidates: list[Candidate], reference: Candidate) -> None:
        """Adds the case's results, as far as it gets. Raises CandidateError when the reference cannot make it."""
        self.on_progress(f"{case}: the reference", 0, 0)
        truth = self._worker(reference.worker).run(reference, case)
        self.results.cases.append(case)
        self.results.references.append(truth)
        plain: dict[WorkerConfig, RunOutput] = {}
        results: dict[str, CandidateResult] = {}
        short, short_case = None, replace(case, num_inference_steps=SHORT_STEPS)
        for candidate in candidates:
            worker = self._worker(candidate.worker)
            name = candidate.title(worker.opened.precision)
            self.on_progress(f"{case}: {name}", 0, 0)
            try:
                run = worker.run(candidate, case)
                if short_case != case:  # the first of these does not count
                    short = Latency.of([worker.seconds(candidate, short_case) for _ in range(1 + SHORT_ITERATIONS)][1:])
            except CandidateError as error:
                self.results.skip(f"{name}, {case}", str(error), error.invalid_output)
                continue
            if candidate.plain:
                plain[candidate.worker] = run
            compared = truth if candidate.exact else plain.get(candidate.worker, truth)
            fidelity = _fidelity(compared, run, candidate.exact)
            work, roofline = self._work(case, candidate, run)
            results[name] = CandidateResult(case, candidate, worker.opened, run, fidelity, work, roofline, short)
        self._time(case, results)

    def _work(self, case: Case, candidate: Candidate, run: RunOutput) -> tuple[Work | None, dict[str, float] | None]:
        """The work, unless it depends on the image or on what was made before; and its roofline."""
        precision, peaks = run.precision, self.results.peaks
        if candidate.prompt_cached or not candidate.exact:
            return None, None
        options: Any = {"task": case.task, "tokens": run.tokens, "precision": precision, **vars(case)}
        work = count(self.config, candidate.worker.variant, WorkOptions(**options))
        if peaks is None or precision not in peaks.flops:
            return work, None
        return work, roofline_seconds(work, peaks.flops[precision], peaks.bytes)

    def _time(self, case: Case, results: dict[str, CandidateResult]) -> None:
        """Times the candidates in turn; they are added with what was measured, also when it is interrupted."""
        workers = {name: self._worker(result.candidate.worker) for name, result in results.items()}
        timed = {name: partial(workers[name].seconds, result.candidate, case) for name, result in results.items()}
        options, runs, starts = self.options, InterleavedRuns(timed, (CandidateError,)), dict[str, Latency]()
        plain = [result for result in results.values() if result.candidate.plain]
        try:
            runs.run(options.iterations, options.warmup, lambda name, *done: self.on_progress(f"{case}: {name}", *done))
            for result in plain if case == self.results.cases[0] and options.cold_starts else []:
                self.on_progress(f"cold start of {result.name}", 0, 0)
                try:
                    starts[result.name] = cold_start(result.candidate.worker, case, options.cold_starts)
                except CandidateError as error:
                    self.results.skip(f"the cold start of {result.name}", str(error))
        finally:
            for name, result in results.items():
                latency = Latency.of(runs.seconds[name]) if runs.seconds.get(name) else None
                self.results.results.append(replace(result, latency=latency, cold_start=starts.get(name)))
            for name, reason in runs.failed.items():
                self.results.skip(f"{name}, {case}", reason)


def _fidelity(reference: RunOutput, run: RunOutput, judged: bool) -> Fidelity:
    images = list(zip(run.images, reference.images, strict=True))
    errors = ImageErrors.of((run.latents, reference.latents), images)
    limits = tolerance(run.precision, reference.precision)
    ok = all(metric.ok for metric in errors.metrics(limits))
    return Fidelity(reference.name, errors, limits, ok if judged else None)
