"""Work done in a process of its own, so that its memory is given back and its death takes nothing with it.

The process gets a job as JSON on stdin and writes JSON lines: {"phase": what is being done}, at last one of
{"result": ...} and {"error": in words}. It dies with its parent, where the system can do that.
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
from typing import IO, Any

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, of Linux's prctl


class WorkerFailedError(Exception):
    """A worker ended without a result. said: whether it said why itself; code: its exit code."""

    def __init__(self, why: str, said: bool, code: int) -> None:
        super().__init__(why)
        self.said, self.code = said, code


def run_worker(
    command: Sequence[str],
    job: Mapping[str, Any],
    on_phase: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    started: Callable[[subprocess.Popen[str]], None] = lambda process: None,
) -> dict[str, Any]:
    """The result of a worker, which is killed if anything goes wrong here. Raises WorkerFailedError."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **(environment or {})},
        ) as process,
    ):
        started(process)
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended before it read the job: its log says why
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            last = _follow(process.stdout, on_phase)
        except BaseException:
            process.kill()
            raise
        code = process.wait()
        log.seek(0)
        if "result" in last:
            return last["result"]
        # Its last words in one line, since they become part of a sentence.
        raise WorkerFailedError(last.get("error") or " ".join(log.read()[-2000:].split()), "error" in last, code)


def _follow(lines: IO[str], on_phase: Callable[[str], None]) -> dict[str, Any]:
    """Pass on what a worker is doing until its last line, which is returned; {} when it ended without one."""
    for text in lines:
        line = json.loads(text)
        if "phase" not in line:
            return line
        on_phase(line["phase"])
    return {}


def serve(work: Callable[[dict[str, Any], Callable[[str], None]], Any], expected: tuple[type[Exception], ...]) -> None:
    """The worker's side: do the job on stdin by work(job, on_phase). Exceptions of the types `expected` are said in
    their own words, and those of the disk in plain ones. Whatever a library prints goes to stderr."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)

    def say(**line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    try:
        say(result=work(json.load(sys.stdin), lambda phase: say(phase=phase)))
    except expected as error:
        say(error=str(error) or repr(error))
    except OSError as error:
        say(error=f"a file cannot be read or written ({error}): make room on the disk, or give another path")
