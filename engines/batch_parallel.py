"""The batch of a graph in parts, each on a core of its own.

A small graph gains little from several threads within each of its nodes; the entries of its batch (guidance branches
and images) are independent of each other, and gain nearly as much as there are cores.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, GraphName, TensorSpec

_IDLE = 1 / 4  # the share of the cores' time that may be lost to parts of unequal size
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"

Arrays = Mapping[str, NDArray[Any]]


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


def parts_of(batch: int, cores: int) -> int:
    """In how many parts to run a batch: one a core where that leaves the cores few idle, or else 1."""
    if cores == 1 or batch < cores:
        return 1
    slots = -(-batch // cores) * cores
    return cores if (slots - batch) / slots < _IDLE else 1


def batch_size(graph: GraphName, inputs: Arrays) -> int:
    """R of a graph's inputs; 1 where its outputs have no such axis."""
    if not all("R" in spec.axes for spec in GRAPHS[graph].outputs):
        return 1
    spec = next(spec for spec in GRAPHS[graph].inputs if "R" in spec.axes)
    return int(inputs[spec.name].shape[spec.axes.index("R")])


def run_in_parts(
    graph: GraphName, inputs: Arrays, parts: int, pool: ThreadPoolExecutor, run: Callable[[Arrays], Arrays]
) -> dict[str, NDArray[Any]]:
    """The outputs of the whole batch.

    Args:
        graph: Which.
        inputs: By name.
        parts: How many.
        pool: Runs all parts but the first, which this thread runs.
        run: Is called with each part's inputs, and gives its outputs.

    Raises:
        InputError: The parts' outputs do not fit together.
    """
    pieces = {spec.name: _split(inputs[spec.name], spec, parts) for spec in GRAPHS[graph].inputs}
    first, *others = ({name: piece[k] for name, piece in pieces.items()} for k in range(parts))
    futures = [pool.submit(run, part) for part in others]
    results = [run(first), *(future.result() for future in futures)]
    try:
        return {
            spec.name: np.concatenate([result[spec.name] for result in results], axis=spec.axes.index("R"))
            for spec in GRAPHS[graph].outputs
        }
    except ValueError as error:
        shapes = [{name: list(values.shape) for name, values in result.items()} for result in results]
        raise InputError(
            f"{graph} gives tensors of the shapes {shapes} for the parts of one batch, which do not fit together: the "
            "graph is not one that mige-rt wrote; do not use this bundle"
        ) from error


def _split(values: NDArray[Any], spec: TensorSpec, parts: int) -> list[NDArray[Any]]:
    return np.array_split(values, parts, axis=spec.axes.index("R")) if "R" in spec.axes else [values] * parts
