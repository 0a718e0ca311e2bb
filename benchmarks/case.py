"""One case of a bench: every candidate's pictures beside the reference's, then its seconds, in turn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.candidates import SHORT, Candidate, Case, Home
from benchmarks.cold_start import cold_start
from benchmarks.findings import Fidelity, Findings, Row, title
from benchmarks.measure import Latency, Turns
from benchmarks.parity import load_similarity
from benchmarks.tolerance import tolerance
from benchmarks.work import Work, count, floor_seconds
from benchmarks.worker import CandidateError, Made, Seen, Worker
from export.validate import measure
from mige_rt.config import ModelConfig
from trainer.evaluate.metrics import psnr

SHORT_RUNS = 3
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Effort:
    """How often everything is run: runs that count, warm-ups before them, and starts of the command."""

    runs: int = 10
    warmups: int = 3
    cold_starts: int = 3


@dataclass(frozen=True)
class Reference:
    """What the others' pictures are compared with."""

    name: str
    precision: str
    made: Made
    seen: Seen


def measure_case(
    case: Case,
    config: ModelConfig,
    candidates: list[Candidate],
    workers: Mapping[Home, Worker],
    reference: Home,
    found: Findings,
    effort: Effort,
    say: OnProgress,
) -> None:
    """Adds the case's rows to `found`, as far as it gets. Raises CandidateError when the reference cannot make it."""
    exact = Candidate(reference)
    worker = workers[reference]
    say(f"{case}: the reference", 0, 0)
    name = title(exact, worker.opened)
    truth = Reference(name, worker.opened.precision, worker.make(exact, case), worker.look(exact, case))
    number = len(found.cases)
    found.cases.append(case)
    found.tokens.append(truth.seen.tokens)
    found.references.append(tuple(map(Image.fromarray, truth.made.pictures)))

    rows: dict[str, Row] = {}
    made: dict[Home, Reference] = {}
    for candidate in candidates:
        worker = workers[candidate.home]
        name = title(candidate, worker.opened)
        say(f"{case}: {name}", 0, 0)
        try:
            own = Reference(name, worker.opened.precision, worker.make(candidate, case), worker.look(candidate, case))
            if candidate.plain:
                made[candidate.home] = own
            beside = truth if candidate.exact else made.get(candidate.home, truth)
            short = None if case.steps <= SHORT else _short(worker, candidate, case, say, name)
        except CandidateError as error:
            found.skip(f"{name}, {case}", str(error), error.wrong)
            continue
        work = _work(config, candidate, case, own)
        floor = None
        if work is not None and found.peaks is not None and own.precision in found.peaks.flops:
            floor = floor_seconds(work, found.peaks.flops[own.precision], found.peaks.bytes)
        rows[name] = Row(
            number,
            case.steps,
            case.batch,
            candidate,
            worker.opened,
            _fidelity(beside, own, candidate.exact),
            # What runs in another row's process has its memory.
            own.made.memory if candidate == Candidate(candidate.home) else None,
            own.seen.graphs,
            work,
            floor,
            tuple(map(Image.fromarray, own.made.pictures)),
            short,
        )
    _time(case, rows, workers, found, effort, say)


def _seconds_of(worker: Worker, candidate: Candidate, case: Case) -> Callable[[], float]:
    return lambda: worker.seconds(candidate, case)


def _short(worker: Worker, candidate: Candidate, case: Case, say: OnProgress, name: str) -> Latency:
    """Of a run of SHORT steps."""
    case = replace(case, steps=SHORT)
    say(f"{case}: {name}", 0, 0)
    return Latency.of([worker.seconds(candidate, case) for _ in range(1 + SHORT_RUNS)][1:])


def _time(
    case: Case,
    rows: Mapping[str, Row],
    workers: Mapping[Home, Worker],
    found: Findings,
    effort: Effort,
    say: OnProgress,
) -> None:
    """Times the rows in turn; they are added to `found` with what was measured, also when it is interrupted."""
    turns = Turns(
        {name: _seconds_of(workers[row.candidate.home], row.candidate, case) for name, row in rows.items()},
        (CandidateError,),
    )
    starts: dict[str, Latency] = {}
    try:
        turns.run(effort.runs, effort.warmups, lambda name, done, total: say(f"{case}: {name}", done, total))
        for name, row in rows.items():
            if row.candidate.plain and row.case == 0 and effort.cold_starts:
                say(f"cold start of {name}", 0, 0)
                try:
                    starts[name] = cold_start(row.candidate.home, case, effort.cold_starts)
                except CandidateError as error:
                    found.skip(f"the cold start of {name}", str(error))
    finally:
        for name, row in rows.items():
            seconds = turns.seconds.get(name)
            found.rows.append(
                replace(row, latency=Latency.of(seconds) if seconds else None, cold_start=starts.get(name))
            )
        for name, why in turns.failed.items():
            found.skip(f"{name}, {case}", why)


def _work(config: ModelConfig, candidate: Candidate, case: Case, own: Reference) -> Work | None:
    """None for what a candidate saves besides: its work depends on the picture, or on what was made before."""
    if candidate.cached or not candidate.exact:
        return None
    precision: Any = own.precision
    return count(
        config,
        candidate.home.program,
        task=case.task,
        references=case.references,
        tokens=own.seen.tokens,
        steps=case.steps,
        batch=case.batch,
        size=case.size,
        precision=precision,
        guidance_scale=case.guidance_scale,
        image_guidance_scale=case.image_guidance_scale,
    )


def _fidelity(reference: Reference, own: Reference, judged: bool) -> Fidelity:
    similarity = load_similarity()
    pairs = list(zip(own.made.pictures, reference.made.pictures, strict=True))
    latents = measure(own.seen.latents, reference.seen.latents)[0]
    decibels = min(psnr(a, b) for a, b in pairs)
    alike = min(similarity(a, b) for a, b in pairs)
    largest = max(int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max()) for a, b in pairs)
    allowed = tolerance(own.precision, reference.precision)
    ok = latents <= allowed.latents and decibels >= allowed.psnr and alike >= allowed.similarity
    return Fidelity(reference.name, latents, decibels, alike, largest, ok if judged else None, allowed)
