"""Shards made in this process, or in several."""

import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import cycle, islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

import torch

from mige_rt.errors import InputError
from trainer.data.encode import Encoders
from trainer.data.shards import Shard, ShardReport

MakeShard = Callable[[Encoders, Shard], ShardReport]


class Opened(Protocol):
    """What a process loads once, and makes shards with."""

    @property
    def device(self) -> torch.device:
        """That it computes on."""
        ...


_Opened = TypeVar("_Opened", bound=Opened)
_Work = TypeVar("_Work")
_Made = TypeVar("_Made")


def make_here(
    make: Callable[[Shard], ShardReport], work: Sequence[Shard], device: torch.device
) -> Generator[ShardReport, None, None]:
    """Make shards in this process.

    Args:
        make: Makes one.
        work: The shards.
        device: That it computes on.

    Yields:
        What came of each.
    """
    threads = torch.get_num_threads()
    try:
        for shard in work:
            use_one_thread(device)
            yield make(shard)
    finally:
        torch.set_num_threads(threads)


def devices_of_processes(device: str, processes: int) -> list[str]:
    """The device of each process: where there are several GPUs and none is named, they take turns."""
    all_gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return list(islice(cycle(all_gpus if device == "cuda" else [device]), processes))


def make_in_processes(
    make: Callable[[_Opened, _Work], _Made],
    work: Sequence[_Work],
    load: Callable[[str], _Opened],
    devices: Sequence[str],
) -> Generator[_Made, None, None]:
    """Make shards in a process for each device; they end with this one, however it ends.

    Args:
        make: Makes a shard with what a process has loaded.
        work: The shards.
        load: Gives it on a device.
        devices: Of each process.

    Yields:
        What came of each, as it is done.

    Raises:
        InputError: A process ended by itself.
    """
    context = get_context("spawn")
    queue = context.SimpleQueue()
    for device in devices:
        queue.put(device)
    executor = ProcessPoolExecutor(len(devices), mp_context=context, initializer=_start_process, initargs=(load, queue))
    try:
        futures = [executor.submit(_make_in_process, make, shard) for shard in work]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise InputError(
            "a process ended by itself, perhaps for lack of memory; give fewer --processes: the same command goes on "
            "where this one stopped"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_opened: Any = None  # of a process


def _start_process(load: Callable[[str], Opened], devices: Any) -> None:
    global _opened  # noqa: PLW0603  # how a process of a pool keeps what its tasks share
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _opened = load(devices.get())
    use_one_thread(_opened.device)


def _end_with_parent() -> None:
    """A process of a pool would wait for ever for a parent that was killed."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _make_in_process(make: Callable[[Any, _Work], _Made], shard: _Work) -> _Made:
    return make(_opened, shard)


def use_one_thread(device: torch.device) -> None:
    """On a CPU the number of threads changes the last bits."""
    if device.type == "cpu":
        torch.set_num_threads(1)
