"""Work done in a process of its own, so that its memory is given back and its death takes nothing with it.

The process gets a job as JSON on stdin and writes JSON lines: {"phase": what is being done}, at last one of
{"result": ...} and {"error": in words}. It dies with its parent, where the system can do that. Jobs and results are
dataclasses.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from pydantic import TypeAdapter

Job = TypeVar("Job")
Result = TypeVar("Result")
OnPhase = Callable[[str], None]  # what a worker is doing

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, of Linux's prctl


class WorkerFailedError(Exception):
    """A worker ended without a result. explained: whether it gave the reason itself; code: its exit code."""

    def __init__(self, reason: str, explained: bool, code: int) -> None:
        super().__init__(reason)
        self.explained, self.code = explained, code


@dataclass(frozen=True)
class WorkerHooks:
    """What a worker's parent does besides.

    Attributes:
        on_phase: gets what the worker is doing.
        on_start: is given the process.
        environment: variables that the worker has besides its parent's.
    """

    on_phase: OnPhase = lambda phase: None
    on_start: Callable[[subprocess.Popen[str]], None] = lambda process: None
    environment: Mapping[str, str] | None = None


def run_worker(
    command: Sequence[str], job: object, result_type: type[Result], hooks: WorkerHooks = WorkerHooks()
) -> Result:
    """The result of a worker, which is killed if anything goes wrong here. Raises WorkerFailedError."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(  # noqa: S603, the commands are ours
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **(hooks.environment or {})},
        ) as process,
    ):
        hooks.on_start(process)
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended before it read the job: its log says why
                process.stdin.write(json.dumps(to_json(job)))
                process.stdin.close()
            last = _follow(process.stdout, hooks.on_phase)
        except BaseException:
            process.kill()
            raise
        code = process.wait()
        log.seek(0)
        if "result" in last:
            return TypeAdapter(result_type).validate_python(last["result"])
        # The end of its log in one line, since it becomes part of a sentence.
        raise WorkerFailedError(last.get("error") or " ".join(log.read()[-2000:].split()), "error" in last, code)


def to_json(value: object) -> Any:
    """A dataclass as plain data."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def _follow(lines: IO[str], on_phase: OnPhase) -> dict[str, Any]:
    """Pass on what a worker is doing until its last line, which is returned; {} when it ended without one."""
    for text in lines:
        line = json.loads(text)
        if "phase" not in line:
            return line
        on_phase(line["phase"])
    return {}


def serve(work: Callable[[Job, OnPhase], object], job_type: type[Job], expected: tuple[type[Exception], ...]) -> None:
    """Run the worker's side: read a job from stdin, do it, and write its result to stdout.

    Whatever a library prints goes to stderr. On Linux the worker ends with the process that started it.

    Args:
        work: does the job; takes it and on_phase, and returns the result.
        job_type: what stdin is read as.
        expected: types of exceptions that are reported with their own messages. Those of the disk are reported with
            what to do; all others end the process.
    """
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)

    def write(**line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    try:
        job = TypeAdapter(job_type).validate_python(json.load(sys.stdin))
        write(result=to_json(work(job, lambda phase: write(phase=phase))))
    except expected as error:
        write(error=str(error) or repr(error))
    except OSError as error:
        write(error=f"a file cannot be read or written ({error}): make room on the disk, or give another path")
