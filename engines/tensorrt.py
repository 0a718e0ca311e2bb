"""The TensorRT engine, and that of TensorRT for RTX: plans that `mige-rt build` made, with torch tensors on CUDA."""

import logging
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cachetools import LRUCache
from numpy.typing import NDArray
from torch import Tensor

from engines.interface import Array, EngineOptions
from engines.plans import PlanEngine, Plans, build_command, find_plans, require_built_here
from engines.trt_runtime import find_device, find_machine, import_runtime, is_out_of_memory, make_logger
from mige_rt.atomic import atomic_file
from mige_rt.bundle import OpenedModel
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, AxisRange, GraphName

if TYPE_CHECKING:
    from tensorrt_rtx import ICudaEngine, IExecutionContext, IRuntimeCache, IRuntimeConfig

ALIGNMENT = 256  # bytes, of every address that TensorRT is given
CACHED_SHAPES = 4  # of each graph, whose outputs stay allocated

_log = logging.getLogger(__name__)


class TensorRTEngine:
    """Takes and gives torch tensors on CUDA; NumPy arrays are copied there.

    An output is overwritten by the next run of its graph with inputs of the same shapes. When shapes repeat, a run
    allocates nothing and reads inputs where they lie, so that a CUDA graph can be captured of it after a first run;
    whoever captures one holds its inputs, its outputs and `workspace`, and drops it when the graph runs with another
    shape, for which the context is set anew. One engine serves one thread.
    """

    max_cuda_graphs = 1

    def __init__(self, name: PlanEngine, device: str, precision: str, ranges: Mapping[str, AxisRange]) -> None:
        """Prepare to run plans on a device, cuda:N, which is there; `open` loads them."""
        self.name: str = name
        self.device, self.precision, self.limits = device, precision, ranges
        self.workspace = torch.empty(ALIGNMENT, dtype=torch.uint8, device=device)  # shared: graphs run one by one
        self._stream = torch.cuda.Stream(device)
        self._plans: dict[GraphName, _Plan] = {}
        self._source: tuple[Path, Plans, _KernelCache | None] | None = None  # what plans are loaded from

    @classmethod
    def open(cls, model: OpenedModel, options: EngineOptions, name: PlanEngine = "tensorrt") -> "TensorRTEngine":
        """Open a bundle with the plans in it that fit this machine.

        Raises:
            NoPlanError: None does; the message has the command that builds them.
            NotAvailableError: The runtime or the GPU is not here.
            InputError: A plan is damaged or cannot be loaded.
        """
        assert model.manifest is not None
        folder, device = model.folder, options.device
        machine = find_machine(name, device)
        plans = find_plans(folder, model.manifest, machine)
        require_built_here(folder, plans, trust=options.trust)
        engine = cls(name, f"cuda:{find_device(name, device)}", model.manifest.precision, plans.ranges)
        cache = None
        if name == "tensorrt-rtx":
            cache = _KernelCache(plans.folder / f"kernels-{machine.capability}.cache")
            if not cache.loaded:
                _log.warning(
                    "TensorRT for RTX compiles kernels for this GPU (%s) when a graph first runs with a shape, which "
                    "makes this run slower than the next; they are kept in %s",
                    machine.gpu,
                    cache.path,
                )
        engine._source = (folder, plans, cache)
        for graph in () if options.low_memory else plans.graphs:
            engine._load(graph)
        return engine

    def array(self, values: NDArray[Any]) -> Array:
        """See `Engine.array`."""
        return torch.as_tensor(values, device=self.device)

    @torch.inference_mode(False)  # buffers made in inference mode could not be written outside it
    @torch.no_grad()
    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`.

        Raises:
            InputError: The plan does not take the inputs' shapes, or memory runs out.
        """
        if graph not in self._plans:
            self._load(graph)
        plan = self._plans[graph]
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            try:
                tensors = {name: torch.as_tensor(inputs[name], device=self.device) for name in plan.inputs}
                is_new = plan.set_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
                self._grow(plan.workspace_bytes)
                plan.set_addresses(tensors, self.workspace)
            except torch.OutOfMemoryError as error:
                raise InputError(self._no_memory(graph, plan.workspace_bytes)) from error
            if current.cuda_stream:
                plan.enqueue(current.cuda_stream)
            else:  # on the default stream TensorRT would wait for the whole device in each run
                self._stream.wait_stream(current)
                plan.enqueue(self._stream.cuda_stream)
                current.wait_stream(self._stream)
            if is_new and plan.cache is not None:
                plan.cache.save()
        return dict(plan.outputs)

    def embed_timesteps(self, timesteps: Array) -> Array:
        """See `Engine.embed_timesteps`: the graph embeds them."""
        return timesteps

    def is_capturable(self, graph: GraphName) -> bool:
        """See `Engine.is_capturable`."""
        context = self._plans[graph].context
        # Of TensorRT for RTX alone, which says no where shapes or weights would be handled on the host.
        ask = getattr(context, "is_stream_capturable", None)
        return ask is None or bool(ask(torch.cuda.current_stream(self.device).cuda_stream))

    def _grow(self, size: int) -> None:
        if size > self.workspace.numel():
            # What was captured or is running with the old one: the former holds it, the latter is before us in line.
            self.workspace = torch.empty(size, dtype=torch.uint8, device=self.device)

    def _no_memory(self, graph: str, needed: int) -> str:
        free, total = torch.cuda.mem_get_info(self.device)
        return (
            f"the GPU ran out of memory in {graph}, which needs {needed / 2**30:.1f} GiB of workspace beside its "
            f"inputs and outputs; {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free: make fewer or smaller "
            "images at once, or end other programs that use the GPU"
        )

    def release(self, graphs: Sequence[GraphName]) -> None:
        """See `Engine.release`."""
        torch.cuda.synchronize(self.device)
        for graph in graphs if self._source is not None else ():
            self._plans.pop(graph, None)
        self.workspace = torch.empty(ALIGNMENT, dtype=torch.uint8, device=self.device)
        torch.cuda.empty_cache()

    def _load(self, graph: GraphName) -> None:
        """Load a graph's plan. Raises InputError when it cannot be loaded."""
        assert self._source is not None
        folder, plans, cache = self._source
        entry, name = plans.graphs[graph], plans.target.engine
        trt, logger = import_runtime(name), make_logger(name)
        runtime = trt.Runtime(logger)
        again = f"build it again with: {build_command(folder, name)}"
        path = plans.folder / entry.plan.path
        with torch.cuda.device(self.device):
            logger.lines.clear()
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                engine = runtime.deserialize_cuda_engine(content)
            context = None if engine is None else _context(trt, engine, cache)
        if engine is None or context is None:
            if is_out_of_memory(logger.summary()):
                free, total = torch.cuda.mem_get_info(self.device)
                raise InputError(
                    f"the GPU has too little memory for the plan {path} ({entry.plan.bytes / 2**30:.1f} GiB): "
                    f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free; end other programs that use it"
                )
            raise InputError(f"the plan {path} could not be loaded ({logger.summary()}); {again}")
        types = {getattr(trt.DataType, name): dtype for name, dtype in _TYPES.items()}
        specs: dict[str, _PlanTensor] = {}
        for i in range(engine.num_io_tensors):
            tensor = engine.get_tensor_name(i)
            if engine.get_tensor_location(tensor) != trt.TensorLocation.DEVICE:
                raise InputError(
                    f"the plan {path} wants {tensor} in the CPU's memory, which no graph of ours does; {again}"
                )
            is_input = engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT
            specs[tensor] = _PlanTensor(is_input, types[engine.get_tensor_dtype(tensor)])
        expected = {spec.name for spec in (*GRAPHS[graph].inputs, *GRAPHS[graph].outputs)}
        if set(specs) != expected:
            raise InputError(f"the plan {path} has the tensors {sorted(specs)} instead of {sorted(expected)}; {again}")
        self._plans[graph] = _Plan(
            graph, self.device, specs, context, cache=cache, keep_alive=_KeepAlive(logger, runtime, engine)
        )


_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _PlanTensor:
    is_input: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class _KeepAlive:
    """What must live as long as an execution context does; the logger has what the runtime last said."""

    logger: Any
    runtime: Any
    engine: Any


class _Plan:
    """One graph's plan with its one execution context, and what the context was last told."""

    def __init__(
        self,
        graph: GraphName,
        device: str,
        specs: Mapping[str, _PlanTensor],
        context: "IExecutionContext",
        *,
        cache: "_KernelCache | None",
        keep_alive: "_KeepAlive",
    ) -> None:
        self.graph, self.device, self.specs, self.cache = graph, device, specs, cache
        self.context = context
        self.inputs = [name for name, spec in specs.items() if spec.is_input]
        self.outputs: dict[str, Tensor] = {}
        self.workspace_bytes = 0
        self._keep_alive = keep_alive
        self._shapes: Shapes = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._outputs: LRUCache[tuple[Any, ...], dict[str, Tensor]] = LRUCache(CACHED_SHAPES)  # by the inputs' shapes
        self._copies: dict[str, Tensor] = {}

    def set_shapes(self, shapes: Shapes) -> bool:
        """Tell the context the inputs' shapes, if they are not those of the last run, and choose the outputs.

        Returns whether no run had these shapes, of those that are remembered. Raises InputError when the plan does not
        take them.
        """
        key = tuple(shapes.items())
        if shapes != self._shapes:
            self._shapes = {}  # until all are set
            for name, shape in shapes.items():
                if not self.context.set_input_shape(name, shape):  # pyright: ignore[reportUnknownMemberType]
                    raise InputError(
                        f"the plan of {self.graph} does not take {name} of shape {list(shape)}: the bundle was "
                        "exported for other sizes; see `mige-rt info`, and export it with larger limits"
                    )
            if missing := self.context.infer_shapes():
                raise RuntimeError(f"TensorRT misses the shapes of {', '.join(missing)} in {self.graph}")
            self.workspace_bytes = self.context.update_device_memory_size_for_shapes()
            self._memory = None  # what it was given was for the old shapes
            self._shapes = shapes
        is_new = key not in self._outputs
        if is_new:
            self._outputs[key] = {
                name: torch.empty(self._shape(name), dtype=spec.dtype, device=self.device)
                for name, spec in self.specs.items()
                if not spec.is_input
            }
        self.outputs = self._outputs[key]
        return is_new

    def _shape(self, name: str) -> list[int]:
        shape = self.context.get_tensor_shape(name)
        return [shape[i] for i in range(len(shape))]

    def set_addresses(self, inputs: Mapping[str, Tensor], workspace: Tensor) -> None:
        """Tell the context where inputs, outputs and the workspace lie, as far as that has changed."""
        for name, tensor in inputs.items():
            self._set_address(name, self._readable(name, tensor))
        for name, tensor in self.outputs.items():
            self._set_address(name, tensor)
        memory = (workspace.data_ptr(), workspace.numel())
        if memory != self._memory:
            self.context.set_device_memory(*memory)
            self._memory = memory

    def enqueue(self, stream: int) -> None:
        """Raises InputError when the runtime says that memory ran out, RuntimeError with its words else."""
        if not self.context.execute_async_v3(stream):
            message = f"{self.graph} could not be run with {self._shapes}: {self._keep_alive.logger.summary()}"
            if is_out_of_memory(message):
                raise InputError(f"the GPU ran out of memory: {message}; make fewer or smaller images at once")
            raise RuntimeError(message)

    def _readable(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, or a copy in a place of its own if it is of another type, not contiguous, or not aligned."""
        dtype = self.specs[name].dtype
        if tensor.dtype == dtype and tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
            return tensor
        copy = self._copies.get(name)
        if copy is None or copy.shape != tensor.shape:
            copy = self._copies[name] = torch.empty(tensor.shape, dtype=dtype, device=self.device)
        return copy.copy_(tensor)

    def _set_address(self, name: str, tensor: Tensor) -> None:
        address = tensor.data_ptr()
        if self._addresses.get(name) != address:
            if not self.context.set_tensor_address(name, address):
                raise RuntimeError(f"TensorRT does not take the address of {name} in {self.graph}")
            self._addresses[name] = address


class _KernelCache:
    """What TensorRT for RTX compiled for this GPU, in a file beside the plans. TensorRT has no such thing."""

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one."""
        self.path = path
        try:
            self._written = path.read_bytes()
        except OSError:
            self._written = b""
        self._cache: IRuntimeCache | None = None
        self._failed = False

    @property
    def loaded(self) -> bool:
        return bool(self._written)

    def attach(self, config: "IRuntimeConfig") -> None:
        """Make the cache, of which all contexts share one, what `config` uses."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._written and not self._cache.deserialize(self._written):
                _log.warning("%s is of another version or GPU; it is made anew", self.path)
        if not config.set_runtime_cache(self._cache):
            raise RuntimeError("TensorRT for RTX does not take a runtime cache")

    def save(self) -> None:
        """Write the file, if there is something new. A cache that cannot be written costs time alone, and is said."""
        content = b"" if self._cache is None else bytes(self._cache.serialize())
        if content == self._written or self._failed:
            return
        try:
            with atomic_file(self.path) as temporary:
                temporary.write_bytes(content)
            self._written = content
        except OSError as error:
            self._failed = True
            _log.warning("compiled kernels cannot be kept (%s); the next run compiles them again", error)


def _context(trt: Any, engine: "ICudaEngine", cache: _KernelCache | None) -> "IExecutionContext | None":
    """A context whose workspace we give: sized for the shapes that run, not the largest, and shared by all graphs."""
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if cache is not None:
        cache.attach(config)
        # Of TensorRT for RTX alone. Eager: the first run with a shape waits for its kernels. Else they take over at
        # some later run, whose result differs in its last bits, and a captured graph would keep the slower ones.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return engine.create_execution_context(config)
