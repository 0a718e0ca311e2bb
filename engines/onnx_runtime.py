"""The ONNX Runtime engine: a bundle's graphs on the CPU, with NumPy arrays, or on CUDA, with torch tensors."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from engines.batch_parallel import groups_of, row_count, run_in_groups, usable_cores
from engines.interface import GRAPHS, Array, Precision, Range, axis_size, named_sizes
from mige_rt.bundle import Manifest, check_files, read_manifest
from mige_rt.errors import InputError, NotAvailableError


class OnnxRuntimeEngine:
    """One session a graph, made when the graph is first run.

    On the CPU, a graph's rows are run side by side where there are enough of them (engines/batch_parallel.py), by a
    session of one thread, which is another than that of few rows.
    """

    name = "onnxruntime"
    captures = 0

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: str,
        set_options: Callable[[onnxruntime.SessionOptions], None] = lambda options: None,
        split_rows: bool = True,
    ) -> None:
        """device is cpu, or cuda:N, which is there. set_options changes what a session is made with; split_rows: run
        rows side by side on the CPU."""
        self.folder, self.manifest, self.device = folder, manifest, device
        self.set_options = set_options
        self.precision: str = manifest.precision
        self.limits: Mapping[str, Range] = manifest.ranges
        self.cores = usable_cores() if device == "cpu" else 1
        self.split_rows = split_rows and self.cores > 1
        self.pool = ThreadPoolExecutor(self.cores, "rows") if self.split_rows else None  # it starts threads when used
        self.sessions: dict[tuple[str, int], onnxruntime.InferenceSession] = {}  # by graph and threads

    @classmethod
    def open(
        cls, folder: Path, device: str = "cpu", precision: Precision | Literal["auto"] = "auto"
    ) -> "OnnxRuntimeEngine":
        """Open a bundle. device auto: cuda where ONNX Runtime and PyTorch both see one.

        Raises InputError when the folder is no bundle, its files are not those of the manifest, the device is not
        there, or another precision is asked for than the bundle has.
        """
        manifest = read_manifest(folder)
        if precision not in ("auto", manifest.precision):
            raise NotAvailableError(
                f"{folder} was exported in {manifest.precision}, and {precision} was asked for: leave --precision out, "
                f"or export a bundle with --precision {precision}"
            )
        found = _device(device)
        if manifest.precision == "bf16" and found == "cpu":
            raise NotAvailableError(
                "ONNX Runtime's CPU does not compute in bf16: use --engine pytorch, or export with --precision fp16"
            )
        check_files(folder, manifest)
        return cls(folder, manifest, found)

    def array(self, values: NDArray[Any]) -> Array:
        if self.device == "cpu":
            return values
        import torch

        return torch.from_numpy(values).to(self.device)

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self.device != "cpu":
            return self._run_bound(self._session(graph, 0), graph, inputs)
        groups = groups_of(row_count(graph, inputs), self.cores)
        if self.pool is None or groups == 1:
            return self._run_alone(self._session(graph, self.cores), graph, inputs)
        return run_in_groups(graph, inputs, groups, self.pool, partial(self._run_alone, self._session(graph, 1), graph))

    def _run_alone(
        self, session: onnxruntime.InferenceSession, graph: str, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        names = [port.name for port in GRAPHS[graph].outputs]
        try:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))
        except Exception as error:  # the library's own classes derive from Exception alone
            raise InputError(f"ONNX Runtime could not run {graph} of {self.folder} ({error})") from error

    def release(self, graphs: Sequence[str]) -> None:
        for key in [key for key in self.sessions if key[0] in graphs]:
            del self.sessions[key]

    def _session(self, graph: str, threads: int) -> onnxruntime.InferenceSession:
        """threads: within a node. The options are set from what benchmarks/results/runtime-settings.md measured."""
        if (graph, threads) not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # errors; its warnings speak of the graph's making
            options.intra_op_num_threads = threads  # ONNX Runtime's own number overlooks what a process is bound to
            options.enable_cpu_mem_arena = options.enable_mem_pattern = self.device != "cpu"
            self.set_options(options)
            path = self.folder / self.manifest.graphs[graph].onnx.path
            try:
                session = onnxruntime.InferenceSession(str(path), options, providers=self._providers())
            except Exception as error:  # the library's own classes derive from Exception alone
                raise InputError(
                    f"ONNX Runtime {onnxruntime.__version__} cannot load {path} for {self.device} ({error}); "
                    "try --device cpu, another precision, or export the bundle again"
                ) from error
            self.sessions[graph, threads] = session
        return self.sessions[graph, threads]

    def _providers(self) -> list[Any]:
        if self.device == "cpu":
            return ["CPUExecutionProvider"]
        import torch

        # On torch's own stream, so that neither waits for the other.
        stream = str(torch.cuda.current_stream(self.device).cuda_stream)
        options = {"device_id": self.device.partition(":")[2], "user_compute_stream": stream}
        return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]

    def _run_bound(
        self, session: onnxruntime.InferenceSession, graph: str, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run on CUDA, reading and writing torch tensors where they lie."""
        import torch

        binding, index = session.io_binding(), int(self.device.partition(":")[2])
        sizes: dict[str, int] = {}
        held = []  # until the graph was run
        for port in GRAPHS[graph].inputs:
            tensor = inputs[port.name].contiguous()
            held.append(tensor)
            sizes |= named_sizes(self.manifest.graphs[graph].axes[port.name], tensor.shape)
            binding.bind_input(port.name, "cuda", index, _NUMPY[port.dtype], list(tensor.shape), tensor.data_ptr())
        outputs = {}
        for port in GRAPHS[graph].outputs:
            shape = [axis_size(axis, sizes) for axis in self.manifest.graphs[graph].axes[port.name]]
            made = torch.empty(shape, dtype=getattr(torch, port.dtype), device=self.device)
            binding.bind_output(port.name, "cuda", index, _NUMPY[port.dtype], shape, made.data_ptr())
            outputs[port.name] = made
        session.run_with_iobinding(binding)
        return outputs


_NUMPY: dict[str, type] = {"float32": np.float32, "int64": np.int64, "bool": np.bool_}


def _device(name: str) -> str:
    """cpu or cuda:N. Raises InputError when it is not there."""
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise InputError(f"{name!r} is no device; expected cpu, cuda or cuda:N")
    if kind == "cpu" or (kind == "auto" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers()):
        return "cpu"
    try:
        import torch

        count = torch.cuda.device_count()
    except ImportError:
        count = 0
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and int(index or 0) < count:
        return f"cuda:{index or 0}"
    if kind == "auto":
        return "cpu"
    raise NotAvailableError(
        f"ONNX Runtime has no device {name!r} here (its providers: "
        f"{', '.join(onnxruntime.get_available_providers())}; CUDA devices that PyTorch sees: {count}); use --device "
        "cpu, or install: pip install onnxruntime-gpu 'mige-rt[torch]'"
    )
