"""What `mige-rt bench` found, as data: rows, comparisons, what was skipped and why; and as JSON."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image as Picture

from benchmarks.candidates import SHORT, Candidate, Case
from benchmarks.machine import Peaks
from benchmarks.measure import Latency, Ratio, ratio
from benchmarks.tolerance import Tolerance, finite
from benchmarks.work import Work
from benchmarks.worker import Memory, Opened
from mige_rt.bundle import DEFAULT_MODEL
from trainer.evaluate.metrics import rounded

SCHEMA = 1
ENGINE_TITLES = {
    "pytorch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
}


def model_name(path: Path) -> str:
    """As reports have it: the default model has another path on every machine."""
    return "tiny" if path == DEFAULT_MODEL else str(path)


def title(candidate: Candidate, opened: Opened | None = None) -> str:
    """A candidate's name: what it is, or is asked to be where it was not opened yet."""
    precision = candidate.home.precision if opened is None else opened.precision
    name = ENGINE_TITLES[candidate.home.engine] + ("" if precision == "auto" else f" {precision}")
    return f"{name}, {candidate.extra}" if candidate.extra else name


@dataclass(frozen=True)
class Fidelity:
    """How far a candidate's pictures are from the reference's, the worst of the batch, from the same noise.

    latents: relative RMS error of the final latents; psnr in dB; similarity: SSIM; largest: difference of a pixel's
    channel, of 255. ok: within what is allowed for the precision; None where the candidate is meant to differ.
    """

    reference: str
    latents: float
    psnr: float
    similarity: float
    largest: int
    ok: bool | None
    allowed: Tolerance

    @property
    def shortfall(self) -> str:
        """What is beyond the tolerance, in words."""
        said = []
        if self.latents > self.allowed.latents:
            said.append(f"final latents differ by {self.latents:.1e}, at most {self.allowed.latents:.1e} is allowed")
        if self.psnr < self.allowed.psnr:
            said.append(f"PSNR {self.psnr:.1f} dB, at least {self.allowed.psnr:g} is needed")
        if self.similarity < self.allowed.similarity:
            said.append(f"SSIM {self.similarity:.4f}, at least {self.allowed.similarity:g} is needed")
        return "; ".join(said)

    def to_json(self) -> dict[str, Any]:
        """An infinite error is null."""
        return {**vars(self), "latents": finite(self.latents), "allowed": vars(self.allowed)}


@dataclass(frozen=True)
class Row:
    """One candidate in one case. memory: None where another row's process ran it; graphs: calls and seconds of each,
    from one run that was looked into; floor: the least seconds of each graph, where the work was counted; short: a run
    of SHORT steps, where the case has more."""

    case: int
    steps: int
    batch: int
    candidate: Candidate
    opened: Opened
    fidelity: Fidelity
    memory: Memory | None
    graphs: dict[str, tuple[int, float]]
    work: Work | None
    floor: dict[str, float] | None
    pictures: tuple[Picture, ...]
    short: Latency | None = None
    latency: Latency | None = None
    cold_start: Latency | None = None

    @property
    def name(self) -> str:
        return title(self.candidate, self.opened)

    @property
    def seconds_a_step(self) -> float | None:
        """The difference to a run of two steps, over the steps that it had less; None where noise hides it."""
        if self.latency is None or self.short is None:
            return None
        step = (self.latency.median - self.short.median) / (self.steps - SHORT)
        return step if step > 0 else None

    @property
    def counts(self) -> bool:
        """Whether it was measured and its pictures are right; savings, which are to differ, stand beside the rest."""
        return self.latency is not None and self.fidelity.ok is not False

    @property
    def floor_seconds(self) -> float | None:
        return None if self.floor is None else sum(self.floor.values())

    @property
    def times_floor(self) -> float | None:
        least = self.floor_seconds
        return None if self.latency is None or not least else self.latency.median / least

    @property
    def pictures_a_minute(self) -> float | None:
        return None if self.latency is None else 60 * self.batch / self.latency.median

    def to_json(self) -> dict[str, Any]:
        home = self.candidate.home
        return {
            "case": self.case,
            "name": self.name,
            "engine": home.engine,
            "program": home.program,
            "compile": home.compile,
            "low_vram": home.low_vram,
            "prompt_cached": self.candidate.cached,
            "guidance_range": self.candidate.guidance_range,
            "reuse": self.candidate.reuse,
            "model": self.opened.model_name,
            "device": self.opened.device,
            "precision": self.opened.precision,
            "torch_threads": self.opened.threads,
            "opening_seconds": self.opened.seconds,
            "counts": self.counts,
            "fidelity": self.fidelity.to_json(),
            "latency_seconds": None if self.latency is None else vars(self.latency),
            "two_steps_seconds": None if self.short is None else vars(self.short),
            "seconds_a_step": self.seconds_a_step,
            "pictures_a_minute": self.pictures_a_minute,
            "cold_start_seconds": None if self.cold_start is None else vars(self.cold_start),
            "memory_bytes": None if self.memory is None else vars(self.memory),
            "graphs": {graph: {"calls": calls, "seconds": took} for graph, (calls, took) in self.graphs.items()},
            "work": None if self.work is None else self.work.to_json(),
            "floor_seconds": self.floor_seconds,
            "floor_seconds_by_graph": self.floor,
            "times_floor": self.times_floor,
        }


@dataclass(frozen=True)
class Comparison:
    """What one change is worth: `after` is `ratio` times as fast as `before`. what: the change; saving: it changes the
    picture a little."""

    case: int
    what: str
    before: str
    after: str
    ratio: Ratio
    saving: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "ratio": vars(self.ratio), "verdict": self.ratio.verdict}


@dataclass
class Findings:
    """All of one bench, filled while it runs; complete once it is done."""

    command: str
    date: str
    model: dict[str, Any]
    environment: dict[str, Any]
    runs: int
    warmups: int
    peaks: Peaks | None = None
    cases: list[Case] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # of each case's prompts
    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    references: list[tuple[Picture, ...]] = field(default_factory=list)  # each case's pictures by the reference
    complete: bool = False

    def skip(self, what: str, why: str, wrong: bool = False) -> None:
        """wrong: it made something that is no picture, which is as bad as one that fails parity."""
        self.skipped.append({"what": what, "why": why.replace(str(DEFAULT_MODEL), "tiny"), "wrong": wrong})

    @property
    def failed(self) -> list[str]:
        """What made pictures that are not right, or none, in words."""
        rows = (row for row in self.rows if row.fidelity.ok is False)
        return [
            *(f"{row.name}, {self.cases[row.case]}: {row.fidelity.shortfall}" for row in rows),
            *(f"{skipped['what']}: {skipped['why']}" for skipped in self.skipped if skipped["wrong"]),
        ]

    @property
    def comparisons(self) -> list[Comparison]:
        return [found for case in range(len(self.cases)) for found in _compare(case, self.of(case))]

    def of(self, case: int) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def to_json(self) -> dict[str, Any]:
        return rounded(
            {
                "schema": SCHEMA,
                "command": self.command,
                "date": self.date,
                "complete": self.complete,
                "model": self.model,
                "environment": self.environment,
                "peaks": None if self.peaks is None else vars(self.peaks),
                "runs": self.runs,
                "warmups": self.warmups,
                "cases": [
                    {**dataclasses.asdict(case), "task": case.task, "tokens": tokens}
                    for case, tokens in zip(self.cases, self.tokens, strict=True)
                ],
                "rows": [row.to_json() for row in self.rows],
                "comparisons": [comparison.to_json() for comparison in self.comparisons],
                "skipped": self.skipped,
            }
        )


def _compare(case: int, rows: Sequence[Row]) -> Iterator[Comparison]:
    """The steps from the published program to ours, each with its own share; then the whole; then what is on offer
    besides. Rows whose pictures are not right are left out."""
    counted = [row for row in rows if row.counts]
    eager = {
        row.opened.precision: row for row in counted if row.candidate.plain and row.candidate.home.engine == "pytorch"
    }
    ways = [row for row in counted if row.candidate.plain and row.candidate.home.engine != "pytorch"]

    def program(name: str, precision: str) -> Row | None:
        return next(
            (row for row in counted if row.candidate.home.program == name and row.opened.precision == precision), None
        )

    def base(row: Row) -> Row | None:
        """Our program in eager PyTorch, in the row's precision, if it has that one."""
        return eager.get(row.opened.precision) or next(iter(eager.values()), None)

    pairs: list[tuple[str, Row | None, Row | None]] = []
    for precision, ours in eager.items():
        published, once = program("published", precision), program("encode_once", precision)
        pairs += [("encoding once", published, once), ("leaving out branches of weight zero", once, ours)]
        compiled = (row for row in counted if row.candidate.home.compile and row.opened.precision == precision)
        pairs += [("torch.compile", ours, row) for row in compiled]
    for way in ways:
        pairs.append(("the runtime", base(way), way))
    for way in [*eager.values(), *ways]:
        before = base(way)
        pairs.append(("all together", before and program("published", before.opened.precision), way))
    for row in counted:
        if row.candidate.cached or row.candidate.home.low_vram or not row.candidate.exact:
            plain = next((p for p in counted if p.candidate.plain and _same_engine(p, row)), None)
            pairs.append((row.candidate.extra, plain, row))
    for what, before, after in pairs:
        if before is None or after is None or before.latency is None or after.latency is None:
            continue
        if min(len(before.latency.runs), len(after.latency.runs)) >= 2:  # fewer, where it was interrupted
            found = ratio(before.latency.runs, after.latency.runs)
            yield Comparison(case, what, before.name, after.name, found, not after.candidate.exact)


def _same_engine(plain: Row, row: Row) -> bool:
    return dataclasses.replace(row.candidate.home, low_vram=False) == plain.candidate.home
