"""The ONNX Runtime engine: a bundle's graphs on the CPU, with NumPy arrays, or on CUDA, with torch tensors."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from engines.batch_parallel import Arrays, batch_size, parts_of, run_in_parts, usable_cores
from engines.device import parse_device
from engines.interface import Array, EngineOptions
from mige_rt.bundle import GraphEntry, Manifest, OpenedModel
from mige_rt.errors import InputError, NotAvailableError
from mige_rt.graphs import GRAPHS, AxisRange, GraphName, axis_size, named_sizes

SetOptions = Callable[[onnxruntime.SessionOptions], None]

CUDA = "CUDAExecutionProvider"
# Both packages in one place lose CUDA, and mige-rt brings onnxruntime.
INSTALL_CUDA = "pip install 'mige-rt[torch]' && pip uninstall -y onnxruntime && pip install onnxruntime-gpu"


class OnnxRuntimeEngine:
    """One session a graph, made when the graph is first run.

    On the CPU, the batch of a graph is run in parts where it is large enough (engines/batch_parallel.py), by a session
    of one thread, which is another than that of small batches.

    On CUDA, all sessions run on one stream of this engine's own, which waits for torch's and is waited for.
    """

    name = "onnxruntime"
    max_cuda_graphs = 0

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: str,
        *,
        set_options: SetOptions = lambda options: None,
        split_batch: bool = True,
    ) -> None:
        """Prepare to run a bundle; `open` finds the device out.

        Args:
            folder: The bundle.
            manifest: Its manifest.
            device: cpu, or cuda:N, which is there.
            set_options: Changes what a session is made with.
            split_batch: Run a batch in parts on the CPU.
        """
        self.folder, self.manifest, self.device = folder, manifest, device
        self.set_options = set_options
        self.precision: str = manifest.precision
        self.limits: Mapping[str, AxisRange] = manifest.ranges
        self.cores = usable_cores() if device == "cpu" else 1
        self.split_batch = split_batch and self.cores > 1
        self.pool = ThreadPoolExecutor(self.cores, "batch") if self.split_batch else None  # it starts threads when used
        self.sessions: dict[tuple[GraphName, int], onnxruntime.InferenceSession] = {}  # by graph and threads
        self._stream: Any = None if device == "cpu" else _new_stream(device)

    @classmethod
    def open(cls, model: OpenedModel, options: EngineOptions) -> "OnnxRuntimeEngine":
        """Open a bundle. device auto: cuda where ONNX Runtime and PyTorch both see one.

        Raises:
            NotAvailableError: The device is not there, or does not compute in the bundle's precision.
        """
        assert model.manifest is not None
        device = _device(options.device)
        if device == "cpu" and any(computes_in_bf16(entry) for entry in model.manifest.graphs.values()):
            raise NotAvailableError(
                "ONNX Runtime's CPU does not compute in bf16: use --engine pytorch, or export with --precision fp16"
            )
        if model.manifest.precision == "int8" and device != "cpu":
            raise NotAvailableError(
                f"{model.folder} holds integer products that ONNX Runtime has for CPUs alone: use --device cpu, or "
                "export with --precision fp16"
            )
        return cls(model.folder, model.manifest, device)

    def check_device(self) -> None:
        """Load a first graph on CUDA, so that it fails before the first image where CUDA cannot be had.

        Raises:
            NotAvailableError: ONNX Runtime cannot use the device.
            InputError: The graph cannot be loaded.
        """
        if self.device != "cpu":
            self._session("vae_encoder", 0)

    def array(self, values: NDArray[Any]) -> Array:
        """See `Engine.array`."""
        if self.device == "cpu":
            return values
        import torch

        return torch.as_tensor(values, device=self.device)

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`."""
        if self.device != "cpu":
            return self._run_bound(self._session(graph, 0), graph, inputs)
        arrays = cast("Arrays", inputs)
        parts = parts_of(batch_size(graph, arrays), self.cores)
        if self.pool is None or parts == 1:
            return dict(self._run_arrays(self._session(graph, self.cores), graph, arrays))
        run = partial(self._run_arrays, self._session(graph, 1), graph)
        return dict(run_in_parts(graph, arrays, parts, self.pool, run))

    def embed_timesteps(self, timesteps: Array) -> Array:
        """See `Engine.embed_timesteps`: the graph embeds them."""
        return timesteps

    def is_capturable(self, graph: GraphName) -> bool:
        """See `Engine.is_capturable`."""
        return False

    def release(self, graphs: Sequence[GraphName]) -> None:
        """See `Engine.release`."""
        for key in [key for key in self.sessions if key[0] in graphs]:
            del self.sessions[key]

    def _run_arrays(self, session: onnxruntime.InferenceSession, graph: GraphName, inputs: Arrays) -> Arrays:
        names = [spec.name for spec in GRAPHS[graph].outputs]
        try:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))
        except Exception as error:  # the library's own classes derive from Exception alone
            shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in inputs.items())
            raise InputError(
                f"ONNX Runtime could not run {graph} of {self.folder} with {shapes}: memory ran out, or the graph is "
                "not what mige-rt wrote; make fewer or smaller images at once, or export the bundle again"
            ) from error

    def _session(self, graph: GraphName, threads: int) -> onnxruntime.InferenceSession:
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
                    f"ONNX Runtime {onnxruntime.__version__} cannot load {path} for {self.device}: a graph that "
                    "`mige-rt export` wrote is expected, and memory for it; try --device cpu, another precision, or "
                    "export the bundle again"
                ) from error
            if self.device != "cpu" and CUDA not in session.get_providers():  # ONNX Runtime goes on without it
                raise NotAvailableError(f"ONNX Runtime could not load its CUDA provider for {path}: {_cuda_remedy()}")
            self.sessions[graph, threads] = session
        return self.sessions[graph, threads]

    def _providers(self) -> list[Any]:
        if self.device == "cpu":
            return ["CPUExecutionProvider"]
        options = {
            "device_id": self.device.partition(":")[2],
            "user_compute_stream": str(self._stream.cuda_stream),
            "use_tf32": str(int(self.precision != "fp32")),  # its 10 bits are not what fp32 promises
            "cudnn_conv_algo_search": "HEURISTIC",  # the default tries every algorithm at each new size
            "arena_extend_strategy": "kSameAsRequested",  # the default doubles, beside PyTorch's own memory
        }
        return [(CUDA, options), "CPUExecutionProvider"]

    def _run_bound(
        self, session: onnxruntime.InferenceSession, graph: GraphName, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run on CUDA, reading and writing torch tensors where they lie."""
        import torch

        binding, index = session.io_binding(), int(self.device.partition(":")[2])
        sizes: dict[str, int] = {}
        bound: list[torch.Tensor] = []  # must live until the graph was run
        for spec in GRAPHS[graph].inputs:
            tensor = cast("torch.Tensor", inputs[spec.name]).contiguous()
            bound.append(tensor)
            sizes |= named_sizes(self.manifest.graphs[graph].axes[spec.name], tensor.shape)
            binding.bind_input(spec.name, "cuda", index, _NUMPY[spec.dtype], list(tensor.shape), tensor.data_ptr())
        outputs: dict[str, Array] = {}
        for spec in GRAPHS[graph].outputs:
            shape = [axis_size(axis, sizes) for axis in self.manifest.graphs[graph].axes[spec.name]]
            output = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self.device)
            binding.bind_output(spec.name, "cuda", index, _NUMPY[spec.dtype], shape, output.data_ptr())
            outputs[spec.name] = output
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # the library's own classes derive from Exception alone
            raise InputError(f"ONNX Runtime could not run {graph} of {self.folder} ({error})") from error
        current.wait_stream(self._stream)
        return outputs


_NUMPY: dict[str, type] = {"float32": np.float32, "int64": np.int64, "bool": np.bool_}


def computes_in_bf16(entry: GraphEntry) -> bool:
    """Whether a graph has bfloat16 in it, for which ONNX Runtime's CPU has no kernels."""
    return "bfloat16" in entry.precision.values()


def _new_stream(device: str) -> Any:
    """A stream that is not torch's default one, whose handle is 0: ONNX Runtime takes 0 for none, and makes its own."""
    import torch

    return torch.cuda.Stream(device)


def _cuda_remedy() -> str:
    """What to do where ONNX Runtime has no CUDA."""
    if _is_installed("onnxruntime") and _is_installed("onnxruntime-gpu"):
        return (
            "onnxruntime and onnxruntime-gpu are both installed, and one has overwritten the other; run: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        )
    return f"use --device cpu, or install: {INSTALL_CUDA}; CUDA and cuDNN must be of the versions that it names"


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def _device(name: str) -> str:
    """What is there of the device that was named: cpu or cuda:N. Raises InputError when it is not there."""
    device = parse_device(name)
    providers = onnxruntime.get_available_providers()
    if device.kind == "cpu" or (device.kind == "auto" and CUDA not in providers):
        return "cpu"
    try:
        import torch

        count = torch.cuda.device_count()
    except ImportError:
        count = 0
    if CUDA in providers and (device.index or 0) < count:
        return f"cuda:{device.index or 0}"
    if device.kind == "auto":
        return "cpu"
    raise NotAvailableError(
        f"ONNX Runtime has no device {name!r} here (its providers: {', '.join(providers)}; CUDA devices that PyTorch "
        f"sees: {count}): {_cuda_remedy()}"
    )
