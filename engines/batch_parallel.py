"""Rows of a graph side by side, each group of them on a core of its own.

A small graph gains little from several threads within each of its nodes; its rows (samples and guidance branches) are
independent of each other, and gain nearly as much as there are cores.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engines.interface import GRAPHS, Array, Port

_IDLE = 1 / 4  # the share of the cores' time that may be lost to groups of unequal size
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def usable_cores() -> int:
    """Physical cores that this process may use: two hardware threads of one core count once. At least 1.

    Where the system does not say which those are, its processors.
    """
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    try:
        return len({Path(_SIBLINGS.format(cpu)).read_text() for cpu in allowed})
    except OSError:
        return len(allowed)


def groups_of(rows: int, cores: int) -> int:
    """In how many groups to run so many rows: one a core where that leaves the cores few idle, or else 1."""
    if cores == 1 or rows < cores:
        return 1
    slots = -(-rows // cores) * cores
    return cores if (slots - rows) / slots < _IDLE else 1


def row_count(graph: str, inputs: Mapping[str, Array]) -> int:
    """R of a graph's inputs; 1 where its outputs have no rows."""
    if not all("R" in port.axes for port in GRAPHS[graph].outputs):
        return 1
    port = next(port for port in GRAPHS[graph].inputs if "R" in port.axes)
    return int(inputs[port.name].shape[port.axes.index("R")])


def run_in_groups(
    graph: str,
    inputs: Mapping[str, Array],
    groups: int,
    pool: ThreadPoolExecutor,
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
) -> dict[str, Array]:
    """The outputs of all rows; `run` is called with each group's inputs, in threads of the pool and in this one."""
    ports = GRAPHS[graph].inputs
    pieces = {port.name: _pieces(inputs[port.name], port, groups) for port in ports}
    first, *others = ({name: piece[k] for name, piece in pieces.items()} for k in range(groups))
    waiting = [pool.submit(run, group) for group in others]
    results = [run(first), *(one.result() for one in waiting)]
    return {
        port.name: np.concatenate([result[port.name] for result in results], axis=port.axes.index("R"))
        for port in GRAPHS[graph].outputs
    }


def _pieces(values: Array, port: Port, groups: int) -> list[Array]:
    return np.array_split(values, groups, axis=port.axes.index("R")) if "R" in port.axes else [values] * groups
