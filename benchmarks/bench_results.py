"""What `mige-rt bench` measured, as data: one result a candidate and case, speedups, what was skipped; and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.case import Candidate, Case, Variant
from benchmarks.measure import Latency, Speedup, speedup
from benchmarks.parity import ImageErrors, Tolerance, tolerance
from benchmarks.peaks import Peaks
from benchmarks.work import Work
from benchmarks.worker import Memory, OpenedEngine, RunOutput
from mige_rt.bundle import DEFAULT_MODEL

SCHEMA = 2
ABOUT = ["command", "date", "complete", "model", "environment", "iterations", "warmup", "skipped", "failed"]
NESTED = ("opened", "fidelity", "latency", "cold_start", "memory")


@dataclass(frozen=True)
class Fidelity:
    """How far a candidate's images are from the reference's, the worst of the batch, from the same noise."""

    reference: str
    errors: ImageErrors
    tolerance: Tolerance
    ok: bool | None  # within the tolerance; None where the candidate is meant to differ

    @staticmethod
    def of(run: RunOutput, reference: RunOutput, judged: bool) -> "Fidelity":
        images = list(zip(run.images, reference.images, strict=True))
        errors = ImageErrors.of((run.latents, reference.latents), images)
        limits = tolerance(run.precision, reference.precision)
        ok = all(metric.ok for metric in errors.metrics(limits))
        return Fidelity(reference.name, errors, limits, ok if judged else None)


@dataclass(frozen=True)
class CandidateResult:
    """One candidate in one case."""

    case: Case
    candidate: Candidate
    opened: OpenedEngine
    run: RunOutput
    fidelity: Fidelity
    work: Work | None
    roofline: dict[str, float] | None  # the least seconds of each graph
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
        return self.run.memory if self.candidate == Candidate(self.candidate.worker.process) else None

    @property
    def roofline_seconds(self) -> float | None:
        return None if self.roofline is None else sum(self.roofline.values())

    def to_json(self) -> dict[str, Any]:
        options = asdict(self.candidate)
        worker = options.pop("worker")
        del worker["model"], worker["runtime"]  # `opened` has the model by the name that it has on every machine
        kind = {"exact": self.candidate.exact, "plain": self.candidate.plain}
        median, roofline = self.latency and self.latency.median, self.roofline_seconds
        return {
            "name": self.name,
            "candidate": {**worker, **options, **kind},
            "counts": self.counts,
            "images_per_minute": median and 60 * self.case.batch / median,
            "roofline_seconds": roofline,
            "times_roofline": median / roofline if median and roofline else None,
            **{name: value and asdict(value) for name in NESTED for value in [getattr(self, name)]},
            "graphs": {graph: {"calls": calls, "seconds": took} for graph, (calls, took) in self.run.graphs.items()},
            "work": self.work and self.work.to_json(),
            "roofline": self.roofline,
        }


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
    groups: list[list[str]] = field(default_factory=list)  # names of candidates that took turns with each other

    def skip(self, name: str, reason: str, invalid_output: bool = False) -> None:
        """invalid_output: it made something that is no image, which is as bad as an image that fails parity."""
        reason = reason.replace(str(DEFAULT_MODEL), "tiny")  # its path differs on every machine
        self.skipped.append({"name": name, "reason": reason, "invalid_output": invalid_output})

    @property
    def failed(self) -> list[str]:
        """What made images that are not right, or none, in words."""
        failed = []
        for result in (result for result in self.results if result.fidelity.ok is False):
            metrics = result.fidelity.errors.metrics(result.fidelity.tolerance)
            beyond = "; ".join(f"{metric.name} {metric.text}, {metric.limit}" for metric in metrics if not metric.ok)
            failed.append(f"{result.name}, {result.case}: {beyond}")
        return failed + [f"{what['name']}: {what['reason']}" for what in self.skipped if what["invalid_output"]]

    def speedups(self) -> list[dict[str, Any]]:
        """What each change is worth: `candidate` is `speedup` times as fast as `baseline`."""
        return [
            {"case": number, "change": change, "baseline": before.name, "candidate": after.name}
            | {"speedup": asdict(gain), "verdict": gain.verdict}
            for number, case in enumerate(self.cases)
            for change, before, after in _changes([result for result in self.results if result.case == case])
            if (gain := _speedup(before, after))
        ]

    def to_json(self) -> dict[str, Any]:
        number = {case: number for number, case in enumerate(self.cases)}
        return {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in ABOUT},
            "groups": self.groups,
            "peaks": self.peaks and asdict(self.peaks),
            "cases": [
                {"title": str(case), "task": case.task, "tokens": reference.tokens, **asdict(case)}
                for case, reference in zip(self.cases, self.references, strict=True)
            ],
            "results": [{"case": number[result.case], **result.to_json()} for result in self.results],
            "speedups": self.speedups(),
        }


def _speedup(before: CandidateResult, after: CandidateResult) -> Speedup | None:
    """None where there are fewer than two pairs of iterations, since it was interrupted."""
    iterations = [result.latency.iterations for result in (before, after) if result.latency]
    return speedup(*iterations) if len(iterations) == 2 and min(map(len, iterations)) > 1 else None


def _changes(results: Sequence[CandidateResult]) -> list[tuple[str, CandidateResult, CandidateResult]]:
    """What is compared in one case: each change from the published variant to ours, all together, and the options."""
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
    return [(change, before, after) for change, before, after in pairs if before is not None]
