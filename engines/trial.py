"""Bundles that were not made here, run once in a process of their own before they are run in this one.

A graph of allowed operators alone may still ask for more memory and time than there is. `python -m engines.trial`
loads each graph of a bundle, runs it at the smallest sizes, and compares what it gives with the table.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.interface import Engine
from engines.outputs import OutputCheck
from mige_rt.bundle import MANIFEST, Manifest, OpenedModel, open_model
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError, NotAvailableError, NotFiniteError
from mige_rt.graph_checks import check_graphs
from mige_rt.graphs import GRAPHS, axis_size
from mige_rt.known_files import remember

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

SECONDS = 60  # that a trial may take,
BYTES_A_SECOND = 50_000_000  # and how fast weights are read besides
BASE_BYTES = 3 << 30  # address space of Python and ONNX Runtime with nothing loaded, and room for a small graph
WEIGHT_COPIES = 6  # as narrow weights are widened, and packed for matrix products
_NOT_FINITE = 3  # the exit code of a trial whose graphs give NaN or infinite values,
_NOT_AVAILABLE = 4  # and of one that the machine is to blame for
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}  # address space is counted, and threads take most


def admit(model: OpenedModel, engine: Engine, *, trust: bool) -> None:
    """Check a bundle that was not made here before its graphs are run.

    Its ONNX files are compared with what the exporter writes. Then, for ONNX Runtime, it is tried in another process,
    with limits on time and, on the CPU, on memory; a bundle that passed is remembered.

    Args:
        model: The bundle, or a model folder, which has no graphs.
        engine: What will run it.
        trust: Leave the trial out.

    Raises:
        InputError: The bundle is not to be used.
    """
    if model.manifest is None or engine.name == "pytorch" or model.known:
        return
    check_graphs(model.folder, model.manifest)
    if trust or engine.name != "onnxruntime":
        return
    run_trial(model.folder, model.manifest, engine.device)
    remember(model.folder / MANIFEST)


def run_trial(folder: Path, manifest: Manifest, device: str) -> None:
    """Load and run each graph of a bundle once in a process of its own.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        device: cpu or cuda:N.

    Raises:
        InputError: A graph cannot be run, gives something else than the table says, or takes too much time or memory.
        NotFiniteError: What a graph gives is not finite.
        NotAvailableError: ONNX Runtime cannot use the device.
    """
    weights = [graph.weights.bytes for graph in manifest.graphs.values()]
    seconds = SECONDS + sum(weights) // BYTES_A_SECOND
    memory = BASE_BYTES + WEIGHT_COPIES * max(weights) if device == "cpu" else None  # CUDA maps more than there is
    job = {"folder": str(folder.absolute()), "device": device, "memory": memory}
    command = [sys.executable, "-P", "-m", "engines.trial"]  # -P: a bundle has a folder `engines`, which is no code
    again = "do not use this bundle, or open it with --trust if you know who made it"
    try:
        ended = subprocess.run(  # noqa: S603, a command of ours
            command,
            input=json.dumps(job),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            env={**os.environ, **_ENVIRONMENT},
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"{folder} was not exported on this machine, and trying its graphs took more than {seconds} s: {again}"
        ) from error
    if ended.returncode == 0:
        return
    reason = next(iter(ended.stdout.splitlines()[-1:]), f"the process ended with exit code {ended.returncode}")
    if ended.returncode == _NOT_AVAILABLE:
        raise NotAvailableError(reason)
    limit = "" if memory is None else f", with at most {memory / 2**30:.0f} GiB of memory"
    error_type = NotFiniteError if ended.returncode == _NOT_FINITE else InputError
    raise error_type(
        f"{folder} was not exported on this machine, and trying its graphs{limit} failed ({reason}): {again}"
    ) from RuntimeError(ended.stderr[-4000:])


def _one_thread(options: "SessionOptions") -> None:
    options.intra_op_num_threads = 1


def _try_graphs(config: ModelConfig, manifest: Manifest, engine: Engine) -> None:
    check = OutputCheck(config)
    sizes = {axis: span.min for axis, span in manifest.ranges.items()}
    make: dict[str, Callable[..., NDArray[Any]]] = {"bool": np.ones}
    for graph, entry in manifest.graphs.items():
        inputs = {
            spec.name: engine.array(
                make.get(spec.dtype, np.zeros)([axis_size(axis, sizes) for axis in entry.axes[spec.name]], spec.dtype)
            )
            for spec in GRAPHS[graph].inputs
        }
        check(graph, inputs, engine.run(graph, inputs))
        engine.release([graph])


def main() -> None:
    """Read a job from stdin, and do it; if the bundle failed, exit code 2, 3 or 4 and a sentence on stdout."""
    job = json.load(sys.stdin)
    if job["memory"] is not None and sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
    from engines.onnx_runtime import OnnxRuntimeEngine

    try:
        model = open_model(Path(job["folder"]))
        assert model.manifest is not None
        engine = OnnxRuntimeEngine(
            model.folder, model.manifest, job["device"], set_options=_one_thread, split_batch=False
        )
        _try_graphs(model.config, model.manifest, engine)
    except MemoryError:
        print("memory ran out")
        sys.exit(2)
    except InputError as error:
        print(error)
        print(error.__cause__, file=sys.stderr)
        codes: dict[type[InputError], int] = {NotFiniteError: _NOT_FINITE, NotAvailableError: _NOT_AVAILABLE}
        sys.exit(codes.get(type(error), 2))


if __name__ == "__main__":
    main()
