"""Builds one plan in a process of its own, so that a builder that dies or fills the memory takes nothing with it.

See `export.processes`.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt, cast

from engines.trt_runtime import import_runtime, make_logger
from export.memory import peak_bytes
from export.plan_job import BuiltPlan, Kernel, PlanJob
from export.processes import OnPhase, serve
from mige_rt.atomic import atomic_file

if TYPE_CHECKING:
    from tensorrt_rtx import IBuilderConfig


_LAYER = re.compile(r"Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants:")
_DATATYPE = re.compile(r"Datatype: (\w+)")
_NO_KERNEL = {"shape_call", "signal", "wait", "reshape"}  # of the host, between streams, and of nothing but a shape


class BuildError(Exception):
    """The plan cannot be built; the message has the builder's words."""


def make_monitor(trt: Any, on_phase: OnPhase) -> Any:
    """The builder's progress, reported at most ten times a second."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()  # pyright: ignore[reportUnknownMemberType]: pybind11 wants the call
            self.steps: dict[str, int] = {}
            self.reported = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
            self.steps[phase_name] = int(num_steps)
            self._report(phase_name)

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            """False stops the builder: nobody reads its reports any more."""
            return self._report(f"{phase_name} {int(step) + 1}/{self.steps.get(phase_name, '?')}")

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def _report(self, phase: str) -> bool:
            if time.monotonic() - self.reported < 0.1:
                return True
            self.reported = time.monotonic()
            try:
                on_phase(phase)
            except OSError:
                return False
            return True

    return Monitor()


def work(job: PlanJob, on_phase: OnPhase) -> BuiltPlan:
    """Write the plan that a job of `export.build_plans` asks for.

    Raises BuildError, or OSError when there is no room.
    """
    started = time.monotonic()
    messages: list[str] = []
    trt = import_runtime(job.engine)
    logger = make_logger(job.engine, messages.append) if job.list_kernels else make_logger(job.engine)
    builder = trt.Builder(logger)
    # Strongly typed, so that the graph's types decide: networks are of no other kind since TensorRT 11.
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    on_phase("reading the graph")
    if not parser.parse_from_file(str(job.onnx)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise BuildError("; ".join(f"{error.node_name()}: {error.desc()}" for error in errors[:3]) or logger.summary())

    config = builder.create_builder_config()
    monitor = make_monitor(trt, on_phase)
    config.progress_monitor = monitor
    config.builder_optimization_level = job.options.optimization_level
    if job.list_kernels:
        # By name, since the stubs lack it.
        detailed = getattr(trt, "ProfilingVerbosity").DETAILED  # noqa: B009
        setattr(config, "profiling_verbosity", detailed)  # noqa: B010
    if not job.options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if job.options.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if job.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    # The workspace is then sized by the shapes that run, not by the largest. By name, since previews come and go.
    previews = cast(dict[str, Any], trt.PreviewFeature.__members__)  # pyright: ignore[reportUnknownMemberType]
    if feature := previews.get("RUNTIME_ACTIVATION_RESIZE_10_10"):
        config.set_preview_feature(feature, True)
    ranges = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        ranges.set_shape(name, *(trt.Dims(shape) for shape in job.profile[name]))
    if config.add_optimization_profile(ranges) < 0:
        raise BuildError(f"the ranges {job.profile} are not possible: {logger.summary()}")
    if job.engine == "tensorrt-rtx":
        _for_rtx(trt, config, job.capabilities)
    else:
        _read_timings(config, job.timing_cache)

    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(logger.summary())
    on_phase("writing the plan")
    job.plan.write_bytes(plan)
    if job.engine == "tensorrt":
        _write_timings(config, job.timing_cache)
    kernels = read_kernels(messages) if job.list_kernels else None
    return BuiltPlan(round(time.monotonic() - started, 1), peak_bytes(), kernels)


def read_kernels(messages: Sequence[str]) -> list[Kernel]:
    """The kernels of a plan, from the list of layers that the builder logs at its end, one a line."""
    kernels: list[Kernel] = []
    for line in (line for message in messages for line in message.splitlines()):
        layer = _LAYER.match(line)
        if layer and layer["kind"] not in _NO_KERNEL:
            kernels.append(Kernel(layer["name"], layer["kind"], tuple(_DATATYPE.findall(layer["inputs"]))))
    return kernels


def _for_rtx(trt: Any, config: "IBuilderConfig", capabilities: Sequence[str]) -> None:
    """Set what TensorRT for RTX alone has.

    These are compute capabilities of GPUs that are not here, and a promise that running allocates nothing by itself,
    without which a CUDA graph cannot be captured.
    """
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        member = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}")
        if not config.set_compute_capability(member, i):
            raise BuildError(f"compute capability {capability} is not taken")
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def _read_timings(config: "IBuilderConfig", path: Path) -> None:
    """Let the builder use what it measured for earlier plans. TensorRT for RTX measures nothing when it builds."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    # Those of another GPU or version are not taken; the builder then measures anew.
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _write_timings(config: "IBuilderConfig", path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(config.get_timing_cache().serialize())


def main() -> None:
    """Build the plan that stdin describes."""
    serve(work, PlanJob, (BuildError, MemoryError))


if __name__ == "__main__":
    main()
