"""`mige-rt bench`: every candidate in every case, beside its baselines and its parity, in one run."""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.candidates import Case, Home, besides, wanted
from benchmarks.case import Effort, OnProgress, measure_case
from benchmarks.findings import Findings, model_name, title
from benchmarks.machine import environment, measure_peaks
from benchmarks.worker import CandidateError, Worker
from engines.factory import ENGINES, has_nvidia_driver
from export.exporter import ExportLimits, ExportOptions, export_bundle
from mige_rt.bundle import is_bundle, read_config, read_manifest
from mige_rt.config import ModelConfig, Precision
from mige_rt.errors import InputError


@dataclass(frozen=True)
class Plan:
    """What to measure. models: of one model, in several precisions; the first is the one that PyTorch takes and that
    missing precisions are exported from. Empty precisions: each bundle's own. sizes: (width, height) in pixels."""

    models: tuple[Path, ...]
    engines: tuple[str, ...] = ENGINES
    device: str = "auto"
    precisions: tuple[Precision, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()  # empty: the trained one
    references: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = (1,)
    steps: tuple[int, ...] = (60,)  # the published edits'
    guidance_scale: float = 5.0
    image_guidance_scale: float = 1.0
    effort: Effort = field(default_factory=Effort)
    compile: bool = True  # torch.compile as a candidate
    peak_side: int | None = None  # see `machine.measure_peaks`
    command: str = "mige-rt bench"

    def cases(self, config: ModelConfig) -> list[Case]:
        return [
            Case(references, batch, steps, size, self.guidance_scale, self.image_guidance_scale)
            for size in self.sizes or ((config.size, config.size),)
            for batch in self.batches
            for steps in sorted(self.steps, reverse=True)
            for references in self.references
        ]


def bench(plan: Plan, on_progress: OnProgress = lambda what, done, total: None) -> Findings:
    """Measure. Ctrl-C ends it with what was measured, `complete` false.

    Raises InputError when nothing can be measured: a model that cannot be read, models of different sizes, or no
    reference to compare with.
    """
    config = _one_model(plan.models)
    about = {"name": config.name, "side": config.size, "models": list(map(model_name, plan.models))}
    effort = plan.effort
    found = Findings(plan.command, date.today().isoformat(), about, environment(), effort.runs, effort.warmups)
    try:
        with _models(plan, config, found, on_progress) as models, _Workers(found) as workers:
            _measure(plan, config, models, workers, found, on_progress)
            found.complete = True
    except KeyboardInterrupt:
        pass
    return found


def _one_model(models: Sequence[Path]) -> ModelConfig:
    configs = [read_config(path) for path in models]
    plain = [dataclasses.replace(config, name="", defaults=configs[0].defaults) for config in configs]
    for path, config in zip(models, plain, strict=True):
        if config != plain[0]:
            raise InputError(f"{models[0]} and {path} are models of different sizes; bench them one after the other")
    return configs[0]


@contextmanager
def _models(plan: Plan, config: ModelConfig, found: Findings, say: OnProgress) -> Iterator[dict[str, Path]]:
    """The model for each precision, see `candidates.wanted`; missing ones are exported for the time being."""
    models = {"auto": plan.models[0]}
    for path in plan.models:
        if is_bundle(path):
            models.setdefault(read_manifest(path).precision, path)
    missing = [p for p in plan.precisions if p not in models] if set(plan.engines) - {"pytorch"} else []
    with tempfile.TemporaryDirectory(prefix="mige-rt-bench-") as scratch:
        for precision in missing:
            if precision == "bf16" and not has_nvidia_driver():
                continue  # only PyTorch computes in it here, which needs no bundle
            say(f"exporting {precision} for the time being", 0, 0)
            sides = [side for size in plan.sizes for side in size] or [config.size]
            limits = ExportLimits(max(plan.batches), max(plan.references), (min(sides), max(sides)))
            try:
                export_bundle(
                    str(plan.models[0]),
                    Path(scratch) / precision,
                    precision,
                    limits,
                    options=ExportOptions(validate=False),
                )
                models[precision] = Path(scratch) / precision
            except (InputError, RuntimeError) as error:
                found.skip(f"a bundle in {precision}", str(error))
        yield models


class _Workers:
    """The processes, each started when it is first asked for; all end with the block."""

    def __init__(self, found: Findings) -> None:
        self.found = found
        self.open: dict[Home, Worker] = {}
        self.failed: set[Home] = set()

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.open.values():
            worker.close()

    def get(self, home: Home, title: str) -> Worker | None:
        """None where it cannot be opened, which the findings say once."""
        if home not in self.open and home not in self.failed:
            try:
                self.open[home] = Worker(home)
            except CandidateError as error:
                self.failed.add(home)
                self.found.skip(title, str(error))
        return self.open.get(home)


def _measure(
    plan: Plan, config: ModelConfig, models: dict[str, Path], workers: _Workers, found: Findings, say: OnProgress
) -> None:
    precisions: list[Any] = list(plan.precisions) or [p for p in models if p != "auto"] or ["auto"]
    if len(plan.models) == 1 and not plan.precisions:
        precisions = ["auto"]
    candidates = []
    for candidate in wanted(models, plan.engines, plan.device, precisions, plan.compile):
        say(f"opening {title(candidate)}", 0, 0)
        if workers.get(candidate.home, title(candidate)) is not None:
            candidates.append(candidate)
    plain = [candidate.home for candidate in candidates if candidate.plain]
    reference = _reference(Home(models["auto"], "pytorch", plan.device, "fp32"), plain, workers)
    if reference is None or not plain:
        why = "; ".join(f"{skipped['what']}: {skipped['why']}" for skipped in found.skipped)
        raise InputError(f"there is {'nothing to measure' if reference else 'no reference to compare with'} ({why})")
    device = workers.open[reference].opened.device
    fastest = min(plain, key=lambda home: ENGINES.index(home.engine))
    candidates += [
        candidate for candidate in besides(fastest) if workers.get(candidate.home, title(candidate)) is not None
    ]
    say("the machine's peaks", 0, 0)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found.peaks = pool.submit(measure_peaks, device, plan.peak_side).result()
    for case in plan.cases(config):
        try:
            measure_case(case, config, candidates, workers.open, reference, found, plan.effort, say)
        except CandidateError as error:
            found.skip(str(case), f"the reference cannot make it: {error}")


def _reference(wished: Home, plain: Sequence[Home], workers: _Workers) -> Home | None:
    """PyTorch in float32 by our program: a candidate that turned out to be it, or a process of its own."""
    for home in plain:
        if home.engine == "pytorch" and workers.open[home].opened.precision == "fp32":
            return home
    return wished if workers.get(wished, "the reference, PyTorch fp32") else None
