"""The batch of `mige-rt run`: what is to be made of a request file, who makes it, and what is said meanwhile."""

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mige_rt.batch.failures import Failure, check_failures_file, write_failures
from mige_rt.batch.images import is_finished, model_identity, request_digest
from mige_rt.batch.processes import run_in_processes
from mige_rt.batch.worker import BatchJob, BatchSettings, BatchWorker, Outcome, open_model
from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.cli.limits import given_limits
from mige_rt.cli.run import DEFAULT_OUT, RunOptions
from mige_rt.cli.shared import engine_for, is_verbose
from mige_rt.errors import InputError, requires
from mige_rt.image_output import OutputExistsError, check_existing, check_name, numbered, output_paths
from mige_rt.known_files import sha256
from mige_rt.lora import Lora
from mige_rt.requests import RequestLine, RequestRecord, read_records
from mige_rt.sampling_params import SamplingParams
from mige_rt.terminal import console, echo, report, report_cause, report_lines

PAUSE = 30.0  # seconds between two lines on what is done, where stderr is no terminal


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A line of a request file that can be read, and its files.

    Attributes:
        line: What was read.
        record: The line's.
        paths: One for each image.
        finished: Those that an earlier run made of the same request.
    """

    line: RequestLine
    record: RequestRecord
    paths: list[Path]
    finished: list[Path]

    @property
    def missing(self) -> int:
        """How many images are to be made."""
        return len(self.paths) - len(self.finished)


def run_batch(options: RunOptions, batch: Path, params: SamplingParams, seed: int) -> bool:
    """Make the images of every line; a line that cannot be used is reported and passed over.

    Args:
        options: The command's.
        batch: The request file.
        params: How to sample.
        seed: Of the first image of line 1; that of another line follows from its number.

    Returns:
        Whether every line was made.

    Raises:
        InputError: The batch is refused before any work, or the model cannot be opened.
    """
    settings = _settings(options, batch, params)
    lines, failures = _plan(options, batch, settings, seed)
    if options.failures is not None:
        check_failures_file(options.failures, overwrite=options.overwrite)
    for failure in failures:
        report(f"{batch} line {failure.line}: {failure.reason}")
    todo = [line for line in lines if line.missing]
    if len(todo) < len(lines):
        report(f"{len(lines) - len(todo):,} of {len(lines):,} requests are finished already, and stay as they are")
    by_number = {line.line.number: line for line in todo}
    is_refused = False
    try:
        with _progress(sum(line.missing for line in todo)) as advance:
            for outcome in _outcomes(options, settings, [_job(options, line, seed) for line in todo]):
                line = by_number[outcome.number]
                _report_outcome(batch, outcome)
                if outcome.error:
                    failures.append(Failure(line=outcome.number, id=line.line.id, reason=outcome.error))
                advance(len(outcome.paths), line.missing)
    except InputError:  # the model cannot be opened
        is_refused = True
        raise
    finally:  # also after Ctrl-C
        if options.failures is not None and not is_refused:
            write_failures(options.failures, failures)
    return not failures


def _settings(options: RunOptions, batch: Path, params: SamplingParams) -> BatchSettings:
    """What all lines share. Workers elsewhere open the model by the same arguments, and do not say so."""
    model = options.model or DEFAULT_MODEL
    on_ray = options.ray is not None
    open_there = partial(
        open_model,
        os.path.abspath(model) if on_ray and os.path.exists(model) else str(model),
        options.model,
        [replace(lora, path=lora.path.absolute()) for lora in options.loras],
        engine=engine_for(options.engine, options.loras),
        device=options.device,
        precision=options.precision,
        low_memory=options.low_vram,
        compile=options.compile,
        attention=options.attention,
        **given_limits(),
    )
    return BatchSettings(
        folder=batch.parent.absolute() if on_ray else batch.parent,
        images=options.image_settings(params),
        model=model_identity(
            options.model, options.engine, options.device, options.precision, *map(_lora_identity, options.loras)
        ),
        open=open_there if on_ray or options.workers not in (None, 1) else options.open_pipeline,
    )


def _lora_identity(lora: Lora) -> str:
    try:
        return f"{lora.scale} {sha256(lora.file)}"
    except OSError:  # loading it will say what is wrong
        return str(lora)


def _plan(options: RunOptions, batch: Path, settings: BatchSettings, seed: int) -> tuple[list[_Line], list[Failure]]:
    """Every line that can be used, and those that cannot.

    Raises:
        InputError: A line would write over a file that must not be replaced.
    """
    out = options.out or DEFAULT_OUT
    check_name(out)  # a folder that cannot be written is no line's fault
    lines: list[_Line] = []
    failures: list[Failure] = []
    for line in read_records(batch):
        try:
            if isinstance(line.record, InputError):
                raise line.record
            seed_given = None if options.seed is None else _line_seed(options, line, seed)
            lines.append(_plan_line(options, settings, line, line.record, seed_given))
        except OutputExistsError as error:
            raise InputError(f"{batch} line {line.number}: {error}") from error
        except InputError as error:
            if is_verbose():
                report_cause(error)
            failures.append(Failure(line=line.number, id=line.id, reason=str(error)))
    _check_inputs_stay(options, batch, lines)
    return lines, failures


def _plan_line(
    options: RunOptions, settings: BatchSettings, line: RequestLine, record: RequestRecord, seed: int | None
) -> _Line:
    """A line's files: those of an earlier run of the same request stay.

    Args:
        options: The command's.
        settings: Of the batch.
        line: The line.
        record: Its record.
        seed: Its seed as far as the user gave one.

    Raises:
        OutputExistsError: A file is there that this request has not made, and it may not be replaced.
        InputError: A file can never be replaced.
    """
    out = numbered(options.out or DEFAULT_OUT, line.id)
    paths = output_paths(out, options.num_images)
    existing = [path for path in paths if os.path.lexists(path)]
    finished: list[Path] = []
    if existing and not options.overwrite:
        with suppress(ValueError):  # an input that cannot be read, of which making the images will speak
            digest = request_digest(record, settings.folder, seed, settings.images, settings.model)
            finished = [path for path in existing if is_finished(path, digest)]
    for path in paths:
        if path not in finished:
            check_existing(path, overwrite=options.overwrite)
    return _Line(line=line, record=record, paths=paths, finished=finished)


def _line_seed(options: RunOptions, line: RequestLine, seed: int) -> int:
    return seed + (line.number - 1) * options.num_images


def _job(options: RunOptions, line: _Line, seed: int) -> BatchJob:
    paths = [path.absolute() for path in line.paths] if options.ray is not None else line.paths
    return BatchJob(
        number=line.line.number,
        text=line.line.text,
        seed=_line_seed(options, line.line, seed),
        is_drawn=options.seed is None,
        paths=tuple(map(str, paths)),
    )


def _outcomes(options: RunOptions, settings: BatchSettings, jobs: Sequence[BatchJob]) -> Iterator[Outcome]:
    """Make the jobs where the options say."""
    if not jobs:
        return iter(())
    if options.ray is not None:
        with requires("ray", "--ray"):
            from mige_rt.batch.ray_data import run_on_ray

        return run_on_ray(settings, jobs, options.ray, options.workers)
    if options.workers not in (None, 1):
        return run_in_processes(settings, jobs, options.workers)
    return map(BatchWorker(settings), jobs)


def _report_outcome(batch: Path, outcome: Outcome) -> None:
    """Print what was written, and what was not. Raises InputError when the model cannot be opened."""
    if outcome.no_model:
        if is_verbose():
            report_lines(outcome.cause)
        raise InputError(outcome.error)
    for sentence in outcome.warnings:
        report(f"warning: {sentence}")
    for path in outcome.paths:
        echo(path)
    if outcome.error:
        if is_verbose() and outcome.cause:
            report_lines(outcome.cause.rstrip("\n"))
        report(f"{batch} line {outcome.number}: {outcome.error}")


def _check_inputs_stay(options: RunOptions, batch: Path, lines: Sequence[_Line]) -> None:
    """Raises InputError when --overwrite would replace the request file, or an image that another line reads."""
    readers: dict[str, set[int]] = {}
    for line in lines:
        for path in line.record.paths(batch.parent):
            with suppress(ValueError):  # a zero byte in the name, of which opening it will speak
                readers.setdefault(os.path.realpath(path), set()).add(line.line.number)
    for line in lines:
        for path in line.paths:
            target = os.path.realpath(path)
            if target == os.path.realpath(batch):
                raise InputError(f"line {line.line.number} of {batch} would overwrite the file itself; write elsewhere")
            if others := readers.get(target, set()) - {line.line.number}:
                raise InputError(
                    f"{batch} line {line.line.number} would overwrite {path}, which line {min(others)} reads; "
                    "write elsewhere"
                )
    if options.failures is not None:
        target = os.path.realpath(options.failures)
        if target == os.path.realpath(batch) or target in readers:
            raise InputError(f"--failures would overwrite {options.failures}, which the batch reads; write elsewhere")


def pace(made: int, left: int, seconds: float) -> str:
    """How fast a batch goes: `12 images, 3.4 a minute, 1 h 20 min left`.

    Args:
        made: Images so far.
        left: Images to come.
        seconds: Since the beginning.
    """
    if not made or seconds <= 0:
        return f"{made:,} images, {left:,} left"
    rate = made / seconds * 60
    minutes = round(left / rate)
    time_left = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    return f"{made:,} images, {rate:.3g} a minute, {time_left if minutes else 'less than a minute'} left"


@contextmanager
def _progress(total: int) -> Generator[Callable[[int, int], None], None, None]:
    """Shows on stderr how fast a batch goes; the function given takes how many images were made, and were to be made.

    A bar where stderr is a terminal; else a line now and then, and one at the end.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    stderr = console(stderr=True)
    began = last_line = time.monotonic()
    made = ended = 0
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("images", total=total)

        def advance(of_job: int, wanted: int) -> None:
            nonlocal made, ended, last_line
            made, ended, now = made + of_job, ended + wanted, time.monotonic()
            text = pace(made, total - ended, now - began)
            bar.update(task, description=text, completed=ended)
            if not stderr.is_terminal and now - last_line >= PAUSE and ended < total:
                last_line = now
                report(text)

        yield advance
    if made > 1:
        seconds = time.monotonic() - began
        report(f"{made:,} of {total:,} images in {seconds:.0f} s, {made / seconds * 60:.3g} a minute")
