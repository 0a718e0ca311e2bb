"""What `mige-rt bench` measured, as data: one result a candidate and case, speedups, what was skipped; and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.case import SHORT_STEPS, Candidate, Case, Variant
from benchmarks.machine import Peaks
from benchmarks.measure import Latency, Speedup, speedup
from benchmarks.parity import ImageErrors, Tolerance
from benchmarks.work import Work
from benchmarks.worker import Memory, OpenedEngine, RunOutput
from mige_rt.bundle import DEFAULT_MODEL

SCHEMA = 2
ABOUT = ["command", "date", "complete", "model", "environment", "iterations", "warmup", "skipped", "failed"]
NESTED = ("opened", "fidelity", "latency", "short", "cold_start", "memory")


@dataclass(frozen=True)
class Fidelity:
    """How far a candidate's images are from the reference's, the worst of the batch, from the same noise."""

    reference: str
    errors: ImageErrors
    tolerance: Tolerance
    ok: bool | None  # within the tolerance; None where the candidate is meant to differ

    @property
    def shortfall(self) -> str:
        """What is beyond the tolerance, in words."""
        return "; ".join(f"{m.name} {m.text}, {m.limit}" for m in self.errors.metrics(self.tolerance) if not m.ok)


@dataclass(frozen=True)
class CandidateResult:
    """One candidate in one case. roofline: the least seconds of each graph; short: a run of SHORT_STEPS."""

    case: Case
    candidate: Candidate
    opened: OpenedEngine
    run: RunOutput
    fidelity: Fidelity
    work: Work | None
    roofline: dict[str, float] | None
    short: Latency | None = None
    latency: Latency | None = None
    cold_start: Latency | None = None

    @property
    def name(self) -> str:
        return self.candidate.title(self.opened.precision)

    @property
    def counts(self) -> bool:
        """Whether it was measured and its images are right; approximations, which are to differ, stand beside it."""
        return self.latency is not None and self.fidelity.ok is not False

    @property
    def memory(self) -> Memory | None:
        """None of what runs in another candidate's process."""
        return self.run.memory if self.candidate == Candidate(self.candidate.worker) else None

    @property
    def roofline_seconds(self) -> float | None:
        return None if self.roofline is None else sum(self.roofline.values())

    def _derived(self) -> dict[str, float | None]:
        """Seconds of a step are the difference to a short run, over the steps that it had less; None in the noise."""
        latency, short, roofline = self.latency, self.short, self.roofline_seconds
        stepped = latency is not None and short is not None and latency.median > short.median
        steps = self.case.num_inference_steps - SHORT_STEPS
        return {
            "seconds_per_step": (latency.median - short.median) / steps if stepped and latency and short else None,
            "images_per_minute": latency and 60 * self.case.batch / latency.median,
            "roofline_seconds": roofline,
            "times_roofline": latency.median / roofline if latency and roofline else None,
        }

    def to_json(self) -> dict[str, Any]:
        options = asdict(self.candidate)
        worker = options.pop("worker")
        del worker["model"], worker["runtime"]  # `opened` has the model by the name that it has on every machine
        kind = {"exact": self.candidate.exact, "plain": self.candidate.plain}
        return {
            "name": self.name,
            "candidate": {**worker, **options, **kind},
            "counts": self.counts,
            **self._derived(),
            **{name: value and asdict(value) for name in NESTED for value in [getattr(self, name)]},
            "graphs": {graph: {"calls": calls, "seconds": took} for graph, (calls, took) in self.run.graphs.items()},
            "work": self.work and self.work.to_json(),
            "roofline": self.roofline,
        }


@dataclass(frozen=True)
class Change:
    """What one change is worth: `candidate` is `speedup` times as fast as `baseline`."""

    case: Case
    change: str
    baseline: str
    candidate: str
    speedup: Speedup
    approximate: bool  # it changes the image a little


@dataclass
class BenchResults:
    """All of one bench, filled while it runs; complete once it is done."""

    command: str
    date: str
    model: dict[str, Any]
    environment: dict[str, Any]
    iterations: int
    warmup: int
    peaks: Peaks | None = None
    cases: list[Case] = field(default_factory=list)
    results: list[CandidateResult] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    references: list[RunOutput] = field(default_factory=list)  # of each case
    complete: bool = False

    def skip(self, name: str, reason: str, invalid_output: bool = False) -> None:
        """invalid_output: it made something that is no image, which is as bad as an image that fails parity."""
        reason = reason.replace(str(DEFAULT_MODEL), "tiny")  # its path differs on every machine
        self.skipped.append({"name": name, "reason": reason, "invalid_output": invalid_output})

    @property
    def failed(self) -> list[str]:
        """What made images that are not right, or none, in words."""
        failing = (result for result in self.results if result.fidelity.ok is False)
        return [
            *(f"{result.name}, {result.case}: {result.fidelity.shortfall}" for result in failing),
            *(f"{skipped['name']}: {skipped['reason']}" for skipped in self.skipped if skipped["invalid_output"]),
        ]

    @property
    def changes(self) -> list[Change]:
        return [change for case in self.cases for change in _changes(case, [r for r in self.results if r.case == case])]

    def to_json(self) -> dict[str, Any]:
        number = {case: number for number, case in enumerate(self.cases)}
        speedups = [
            {**asdict(change), "case": number[change.case], "verdict": change.speedup.verdict}
            for change in self.changes
        ]
        return {
            "schema": SCHEMA,
            "units": "seconds, bytes, floating-point operations",
            **{name: getattr(self, name) for name in ABOUT},
            "peaks": self.peaks and asdict(self.peaks),
            "cases": [
                {"title": str(case), "task": case.task, "tokens": reference.tokens, **asdict(case)}
                for case, reference in zip(self.cases, self.references, strict=True)
            ],
            "results": [{"case": number[result.case], **result.to_json()} for result in self.results],
            "speedups": speedups,
        }


def _changes(case: Case, results: Sequence[CandidateResult]) -> Iterator[Change]:
    """What each change is worth, from the published variant to ours, in all, and what is on offer besides."""
    counted = [result for result in results if result.counts]
    plain = [result for result in counted if result.candidate.plain]
    precisions = [result.opened.precision for result in plain if result.candidate.worker.engine == "pytorch"]

    def pytorch(result: CandidateResult, variant: Variant = "ours") -> CandidateResult | None:
        """PyTorch's result of a variant, in the precision of another result, if it has that one."""
        precision = result.opened.precision if result.opened.precision in precisions else next(iter(precisions), "")
        of_variant = (r for r in counted if r.candidate.worker.engine == "pytorch" and r.opened.precision == precision)
        return next((r for r in of_variant if r.candidate.variant_alone == variant), None)

    pairs: list[tuple[str, CandidateResult | None, CandidateResult]] = []
    for result in counted:
        worker = result.candidate.worker
        if worker.variant == "encode_once":
            pairs.append(("encoding once", pytorch(result, "published"), result))
        elif result.candidate.plain and worker.engine == "pytorch":
            pairs.append(("leaving out branches of weight zero", pytorch(result, "encode_once"), result))
        elif result.candidate.plain:
            pairs.append(("the runtime", pytorch(result), result))
        elif worker.variant == "ours":
            same = (p for p in plain if p.candidate.worker == replace(worker, low_vram=False, compile=False))
            pairs.append((result.candidate.options, next(same, None), result))
    pairs += [("all together", pytorch(result, "published"), result) for result in plain]
    for change, before, after in pairs:
        if before is not None and before.latency is not None and after.latency is not None:
            iterations = before.latency.iterations, after.latency.iterations
            if min(map(len, iterations)) >= 2:  # fewer, where it was interrupted
                yield Change(case, change, before.name, after.name, speedup(*iterations), not after.candidate.exact)
