"""`mige-rt bench`: every candidate in every case, beside its baselines and its parity, in one run."""

from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.bench_results import BenchResults, CandidateResult, Fidelity
from benchmarks.case import AnyPrecision, Candidate, Case, WorkerConfig, main_candidates, optional_candidates
from benchmarks.measure import InterleavedRuns, Latency
from benchmarks.memory_plan import USABLE, free_memory, plan_groups, total_bytes
from benchmarks.parity import OnProgress, same_sizes
from benchmarks.peaks import measure_peaks
from benchmarks.schedule import WorkOptions
from benchmarks.work import Work, count, roofline_seconds
from benchmarks.worker import CandidateError, InvalidOutputError, RunOutput, Worker, cold_start
from engines.factory import ENGINES
from export.environment import environment
from mige_rt.bundle import DEFAULT_MODEL, is_bundle, read_config, read_manifest
from mige_rt.config import ModelConfig, Precision
from mige_rt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure; of sizes, references, batches and numbers of steps, all combinations."""

    models: tuple[Path, ...] = (DEFAULT_MODEL,)  # bundles of one model, or its folder
    engines: tuple[str, ...] = ENGINES
    device: str = "auto"
    precisions: tuple[Precision, ...] = ()  # none: the models' own
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
    peak_side: int | None = None  # see `peaks.measure_peaks`
    memory: int | None = None  # bytes that may be used at a time; None: what is free
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
    config = read_config(options.models[0])
    for path in options.models[1:]:
        if not same_sizes(config, read_config(path)):
            raise InputError(f"{options.models[0]} and {path} are models of different sizes; bench them one by one")
    names = ["tiny" if path == DEFAULT_MODEL else str(path) for path in options.models]
    model = {"name": config.name, "size": config.size, "models": names}
    today = date.today().isoformat()
    results = BenchResults(options.command, today, model, environment(), options.iterations, options.warmup)
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        _Bench(options, config, results, on_progress, stack).run()
        results.complete = True
    return results


@dataclass
class _Bench:
    """One bench in progress: its workers, each started when it is first asked for, and its results."""

    options: BenchOptions
    config: ModelConfig
    results: BenchResults
    on_progress: OnProgress
    stack: ExitStack  # that ends the workers
    workers: dict[WorkerConfig, Worker] = field(default_factory=dict)  # by process
    failed: set[WorkerConfig] = field(default_factory=set)  # processes that could not be opened
    truths: dict[Case, RunOutput] = field(default_factory=dict)  # the reference's
    plain: dict[tuple[Case, WorkerConfig], RunOutput] = field(default_factory=dict)

    def run(self) -> None:
        options, results = self.options, self.results
        wanted = main_candidates(options.models[0], self._bundles(), options.engines, options.device, options.compile)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            device, free = pool.submit(free_memory, options.device).result()
        free = options.memory or free
        groups, too_large = plan_groups(wanted, self.config, device, free)
        for candidate in too_large:
            needed = total_bytes([candidate], self.config, device)
            results.skip(candidate.title(), f"it needs about {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free")
        reference = self._reference(wanted, device, free)
        self._make_truths(reference, groups[:1])
        fastest: WorkerConfig | None = None
        for group in groups:
            candidates = self._open_group(group)
            plain = [candidate.worker for candidate in candidates if candidate.plain]
            fastest = min(filter(None, [*plain, fastest]), key=lambda w: ENGINES.index(w.engine), default=None)
            if len(groups) == 1 and fastest:
                candidates += [candidate for candidate in optional_candidates(fastest) if self._open(candidate)]
            self._measure_group(candidates)
        if fastest is None:
            reasons = "; ".join(f"{skipped['name']}: {skipped['reason']}" for skipped in results.skipped)
            raise InputError(f"there is nothing to measure ({reasons})")
        if len(groups) > 1:
            for group in plan_groups(optional_candidates(fastest), self.config, device, free)[0]:
                self._measure_group(self._open_group(group))

    def _make_truths(self, reference: WorkerConfig, next_group: list[list[Candidate]]) -> None:
        """What every candidate is compared with, made first; the reference is closed if it is not a candidate, too."""
        self.on_progress("the machine's peaks", 0, 0)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            device = self.workers[reference].opened.device
            self.results.peaks = pool.submit(measure_peaks, device, self.options.peak_side).result()
        for case in self.options.cases(self.config):
            self.on_progress(f"{case}: the reference", 0, 0)
            try:
                self.truths[case] = self.workers[reference].run(Candidate(reference), case)
            except CandidateError as error:
                self.results.skip(str(case), f"the reference cannot make it: {error}")
        self._close_all_but([candidate for group in next_group for candidate in group])

    def _open_group(self, group: list[Candidate]) -> list[Candidate]:
        """Those of a group that can be opened; processes that it does not need are closed before."""
        self._close_all_but(group)
        return [candidate for candidate in group if self._open(candidate)]

    def _close_all_but(self, candidates: list[Candidate]) -> None:
        needed = {candidate.worker.process for candidate in candidates}
        for process in self.workers.keys() - needed:
            self.workers.pop(process).kill()

    def _measure_group(self, candidates: list[Candidate]) -> None:
        self.results.groups.append([self._title(candidate) for candidate in candidates])
        for case in self.truths:
            self._measure(case, candidates)

    def _title(self, candidate: Candidate) -> str:
        return candidate.title(self.workers[candidate.worker.process].opened.precision)

    def _bundles(self) -> dict[AnyPrecision, Path | None]:
        """The bundle of each precision to measure; None where there is none, which PyTorch does not need."""
        models, precisions = self.options.models, self.options.precisions
        bundles: dict[AnyPrecision, Path | None] = {}
        for path in filter(is_bundle, models):
            bundles.setdefault(read_manifest(path).precision, path)
        if not precisions:
            return bundles if bundles and models[1:] else {"auto": models[0]}
        for precision in precisions if set(self.options.engines) - {"pytorch"} else ():
            if precision not in bundles:
                make = f"make one with mige-rt export --precision {precision}, and give it by another --model"
                self.results.skip(f"a bundle in {precision}", f"none of the models is one: {make}")
        return {precision: bundles.get(precision) for precision in precisions}

    def _open(self, candidate: Candidate, name: str = "") -> bool:
        """Whether the candidate's worker is there; the results say once why it is not."""
        name, process = name or candidate.title(), candidate.worker.process
        if process not in self.workers and process not in self.failed:
            self.on_progress(f"opening {name}", 0, 0)
            try:
                worker = self.workers[process] = Worker(process)
                self.stack.callback(worker.kill)
            except CandidateError as error:
                self.failed.add(process)
                self.results.skip(name, str(error), isinstance(error, InvalidOutputError))
        return process in self.workers

    def _reference(self, wanted: list[Candidate], device: str, free: int) -> WorkerConfig:
        """PyTorch in float32 by our variant, opened: a candidate that is it, or a process of its own.

        Where the GPU has too little memory for it, it runs on the CPU. Raises InputError when it cannot be opened.
        """
        for candidate in wanted:
            worker = candidate.worker
            if candidate.plain and worker.engine == "pytorch" and worker.precision in ("auto", "fp32"):
                if self._open(candidate) and self.workers[worker].opened.precision == "fp32":
                    return worker
                self._close_all_but([])
        config = WorkerConfig(self.options.models[0], "pytorch", self.options.device, "fp32")
        if total_bytes([Candidate(config)], self.config, device) > USABLE * free:
            config = replace(config, device="cpu")
        if not self._open(Candidate(config), "the reference, PyTorch fp32"):
            reasons = "; ".join(f"{skipped['name']}: {skipped['reason']}" for skipped in self.results.skipped)
            raise InputError(f"there is no reference to compare with ({reasons})")
        return config

    def _measure(self, case: Case, candidates: list[Candidate]) -> None:
        """Adds the case's results, as far as it gets."""
        truth = self.truths[case]
        if case not in self.results.cases:
            self.results.cases.append(case)
            self.results.references.append(truth)
        results: dict[str, CandidateResult] = {}
        for candidate in candidates:
            worker, name = self.workers[candidate.worker.process], self._title(candidate)
            self.on_progress(f"{case}: {name}", 0, 0)
            try:
                run = worker.run(candidate, case)
            except CandidateError as error:
                self.results.skip(f"{name}, {case}", str(error), isinstance(error, InvalidOutputError))
                continue
            if candidate.plain:
                self.plain[case, candidate.worker] = run
            compared = truth if candidate.exact else self.plain.get((case, candidate.worker), truth)
            fidelity = Fidelity.of(run, compared, candidate.exact)
            work, roofline = self._work(case, candidate, run)
            results[name] = CandidateResult(case, candidate, worker.opened, run, fidelity, work, roofline)
        self._time(case, results)

    def _work(self, case: Case, candidate: Candidate, run: RunOutput) -> tuple[Work | None, dict[str, float] | None]:
        """The work, unless it depends on the image; and its roofline."""
        precision, peaks = run.precision, self.results.peaks
        if not candidate.exact:
            return None, None
        options: Any = {"task": case.task, "tokens": run.tokens, "precision": precision, **vars(case)}
        work = count(self.config, candidate.worker.variant, WorkOptions(**options))
        rate = peaks and peaks.flops.get(precision)
        return work, roofline_seconds(work, rate, peaks.bytes) if peaks and rate else None

    def _time(self, case: Case, results: dict[str, CandidateResult]) -> None:
        """Times the candidates in turn; they are added with what was measured, also when it is interrupted."""
        workers = {name: self.workers[result.candidate.worker.process] for name, result in results.items()}
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
