"""A batch on several processes of this machine, a pipeline each."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from mige_rt.batch.worker import BatchJob, BatchSettings, BatchWorker, Outcome

PATIENCE = 5.0  # seconds that a process that closed its connection has for ending by itself


def run_in_processes(settings: BatchSettings, jobs: Sequence[BatchJob], workers: int) -> Iterator[Outcome]:
    """Make jobs in several processes, a share of the cores each.

    A process that ends while it makes a job (memory ran out, or someone killed it) costs that job alone: another takes
    its place.

    Args:
        settings: Of the batch; travels to each process.
        jobs: What to make.
        workers: How many processes.

    Yields:
        The outcome of each job, in the order in which they end.
    """
    todo = deque(jobs)
    pool = [_Process(settings, core) for core in _core_shares(min(workers, len(jobs)))]
    try:
        for process in pool:
            process.send(todo.popleft())
        while busy := {process.connection: process for process in pool if process.job is not None}:
            for connection in wait(list(busy)):
                process = busy[connection]  # pyright: ignore[reportArgumentType]
                yield process.receive()
                if todo:
                    process.send(todo.popleft())
    finally:
        for process in pool:
            process.close()


def _core_shares(workers: int) -> list[list[int]]:
    """The cores that each worker is bound to: as many, and none twice where there are enough. Empty: all."""
    if sys.platform != "linux":
        return [[] for _ in range(workers)]
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // workers)
    return [[cores[(i * share + k) % len(cores)] for k in range(share)] for i in range(workers)]


class _Process:
    """One worker's process, which ends when this one does: it then reads the end of its connection."""

    def __init__(self, settings: BatchSettings, cores: list[int]) -> None:
        self._settings, self._cores = settings, cores
        self.job: BatchJob | None = None  # the one that it makes now
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_work, args=(theirs, self._settings, self._cores), name="mige-rt-batch", daemon=True
        )
        self._process.start()
        theirs.close()  # or else the end of the process would not end the connection

    def send(self, job: BatchJob) -> None:
        self.job = job
        with suppress(OSError):  # it has ended, which `receive` will find out
            self.connection.send(job)

    def receive(self) -> Outcome:
        """What has become of the job. If the process has ended instead, another is started."""
        assert self.job is not None
        job, self.job = self.job, None
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self._process.join(PATIENCE)
            self.close()
            error = (
                f"the worker process ended while it made this (exit code {self._process.exitcode}); is there enough "
                "memory? fewer --workers need less"
            )
            self._start()
            return Outcome(number=job.number, error=error)

    def close(self) -> None:
        """End the process, which holds nothing that is worth a farewell."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _work(connection: Connection, settings: BatchSettings, cores: list[int]) -> None:
    """Make jobs until the connection ends; what the process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    if cores and sys.platform == "linux":
        os.sched_setaffinity(0, cores)
    worker = BatchWorker(settings)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            connection.send(worker(connection.recv()))
