"""`mige-rt build`: from a bundle's graphs to TensorRT's plans, each built in a process of its own."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from engines.plans import PRODUCTS, SIDECAR, PlanEngine, PlanEntry, Plans, Target, fingerprint
from engines.trt_runtime import capabilities as known_capabilities
from engines.trt_runtime import find_device, import_runtime, is_out_of_memory
from export.plan_job import BuiltPlan, PlanJob, PlanOptions, PlanProfile
from export.processes import OnPhase, WorkerFailedError, WorkerHooks, run_worker
from mige_rt.atomic import atomic_folder
from mige_rt.bundle import Manifest, check_files, file_entry, is_known_bundle, read_manifest
from mige_rt.errors import InputError, NotAvailableError
from mige_rt.graph_checks import check_graphs
from mige_rt.graphs import GRAPHS, AxisRange, GraphName, axis_size
from mige_rt.known_files import remember

# Two kinds of Ampere, Ada Lovelace, Blackwell. For Turing (7.5) it has no matrix products in float32 or bfloat16, and
# every precision of ours has one somewhere.
PORTABLE = ("8.0", "8.6", "8.9", "12.0")
FP8 = (8, 9)  # the least compute capability that multiplies in it
PLAN_OPTIONS = PlanOptions()
OnProgress = Callable[[str, int, int], None]  # what is being done, plans done, plans in all
WORKER = (sys.executable, "-P", "-m", "export.plan_worker")  # -P: see export.exporter


@dataclass(frozen=True)
class _Gpu:
    """A GPU of this machine. uuid: as CUDA_VISIBLE_DEVICES takes it; free: bytes."""

    name: str
    capability: str
    uuid: str
    free: int


@dataclass(frozen=True)
class _Builder:
    """Builds a bundle's plans for a target, on the GPU here if there is one."""

    folder: Path
    manifest: Manifest
    target: Target
    gpu: _Gpu | None
    options: PlanOptions

    def build(
        self, graph: GraphName, plan: Path, timing_cache: Path, on_phase: OnPhase = lambda phase: None
    ) -> BuiltPlan:
        """Write the file `plan` by `export.plan_worker`; errors are those of the function `build`."""
        job = PlanJob(
            engine=self.target.engine,
            graph=graph,
            onnx=(self.folder / self.manifest.graphs[graph].onnx.path).absolute(),
            plan=plan.absolute(),
            profile=profile(self.manifest, graph),
            capabilities=self.target.capabilities,
            workspace=None if self.gpu is None else self.gpu.free * 9 // 10,
            gpu=None if self.gpu is None else self.gpu.uuid,
            timing_cache=timing_cache.absolute(),
            options=self.options,
        )
        hooks = WorkerHooks(on_phase, environment={"CUDA_VISIBLE_DEVICES": job.gpu} if job.gpu else None)
        try:
            return run_worker(WORKER, job, BuiltPlan, hooks)
        except WorkerFailedError as error:
            if error.code == -9 or is_out_of_memory(str(error)):
                raise InputError(
                    f"memory ran out while the plan of {graph} was built "
                    f"({str(error) or 'the system ended the builder'}): end other programs that use the GPU or the "
                    "memory, or export with smaller limits (--max-batch, --max-references, --sizes)"
                ) from error
            if error.explained:
                raise InputError(
                    f"the plan of {graph} could not be built with {PRODUCTS[job.engine]}: {error}"
                ) from error
            raise RuntimeError(
                f"the builder of the plan of {graph} ended with exit code {error.code}: {error}"
            ) from error


def build(
    folder: Path,
    engine: PlanEngine,
    capabilities: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
    device: str = "auto",
    *,
    options: PlanOptions = PLAN_OPTIONS,
) -> Path:
    """Build plans of a bundle's six graphs into its engines/<fingerprint>/, in place of older ones, and return that.

    capabilities: the GPUs' compute capabilities, as 8.9, for TensorRT for RTX; by default this machine's, or PORTABLE
    where there is no GPU. TensorRT builds on the GPU (device: auto, cuda, cuda:N) that the plans are for. options: the
    builder's.
    Raises InputError, with nothing written, when the bundle, the runtime, the GPU or a capability is not what it should
    be, a graph cannot be built, or memory or the disk is full; RuntimeError when a builder ends otherwise.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest, everything=True)
    if not is_known_bundle(folder):
        check_graphs(folder, manifest)
    check_request(engine, manifest.precision, capabilities, device, refittable=options.refittable)
    target, gpu = _target(engine, manifest.precision, capabilities, device)
    builder = _Builder(folder, manifest, target, gpu, options)
    name = fingerprint(target, manifest.precision, manifest.ranges, vars(options))
    engines = folder / "engines"
    try:
        engines.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{engines} cannot be made ({error}): give a bundle that can be written") from error
    with atomic_folder(engines / name, replace=True) as out:
        timing_cache = engines / f"timing-{engine}-{target.version}.cache"
        entries: dict[GraphName, PlanEntry] = {}
        for done, graph in enumerate(GRAPHS):
            on_phase = partial(_report_phase, on_progress, graph, done)
            built = builder.build(graph, out / f"{graph}.plan", timing_cache, on_phase)
            entries[graph] = PlanEntry(
                file_entry(out, f"{graph}.plan"),
                manifest.graphs[graph].onnx.sha256,
                manifest.graphs[graph].weights.sha256,
                built.seconds,
                built.peak_bytes,
            )
        if on_progress is not None:
            on_progress("done", len(GRAPHS), len(GRAPHS))
        plans = Plans(out, target, manifest.precision, manifest.ranges, vars(options), entries)
        try:
            (out / SIDECAR).write_text(json.dumps(plans.to_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{out / SIDECAR} cannot be written ({error}): make room on the disk") from error
    remember(engines / name / SIDECAR)
    return engines / name


def check_request(
    engine: PlanEngine,
    precision: str,
    capabilities: Sequence[str] | None,
    device: str = "auto",
    *,
    refittable: bool = False,
) -> None:
    """Check that plans of this precision can be built here for these GPUs.

    Raises:
        InputError: they cannot.
    """
    if precision == "int8":
        raise InputError("int8 is for ONNX Runtime on the CPU: export with --precision fp16, fp8 or int8-sq for plans")
    target, gpu = _target(engine, precision, capabilities, device)
    if refittable and gpu is None:
        raise NotAvailableError(
            "refittable plans are built on a machine with an NVIDIA GPU alone, also those of TensorRT for RTX: build "
            "there, or leave --refittable out"
        )
    if precision == "fp8" and (older := [one for one in target.capabilities if _number(one) < FP8]):
        raise InputError(
            f"GPUs of compute capability {', '.join(older)} have no fp8, which begins with 8.9 (Ada Lovelace): export "
            "with --precision int8-sq or fp16 for them"
        )


def rehearse_plan(folder: Path, graph: GraphName, plan: Path) -> BuiltPlan:
    """Build one graph's plan for the portable set of TensorRT for RTX, as the file `plan`.

    Raises:
        InputError: memory runs out, or the builder refuses the graph.
        RuntimeError: the builder's process ends otherwise.
    """
    manifest = read_manifest(folder)
    target, gpu = _target("tensorrt-rtx", manifest.precision, portable(manifest.precision), "auto")
    return _Builder(folder, manifest, target, gpu, PLAN_OPTIONS).build(graph, plan, plan.with_suffix(".cache"))


def profile(manifest: Manifest, graph: GraphName) -> PlanProfile:
    """The smallest, the usual and the largest shape of each of a graph's inputs."""

    def shape(name: str, size: Callable[[AxisRange], int]) -> list[int]:
        sizes = {axis: size(span) for axis, span in manifest.ranges.items()}
        return [axis_size(axis, sizes) for axis in manifest.graphs[graph].axes[name]]

    return {
        spec.name: (
            shape(spec.name, lambda span: span.min),
            shape(spec.name, lambda span: span.opt),
            shape(spec.name, lambda span: span.max),
        )
        for spec in GRAPHS[graph].inputs
    }


def _report_phase(on_progress: OnProgress | None, graph: GraphName, done: int, phase: str) -> None:
    if on_progress is not None:
        on_progress(f"{graph}: {phase}", done, len(GRAPHS))


def portable(precision: str) -> tuple[str, ...]:
    """The compute capabilities of PORTABLE that compute in a precision."""
    return tuple(one for one in PORTABLE if precision != "fp8" or _number(one) >= FP8)


def _target(
    engine: PlanEngine, precision: str, capabilities: Sequence[str] | None, device: str
) -> tuple[Target, _Gpu | None]:
    """What to build for, and the GPU here, if there is one."""
    version = import_runtime(engine).__version__
    if engine == "tensorrt" and capabilities:
        raise InputError(
            "TensorRT builds for the GPU of this machine alone: leave --compute-capability out, or use --engine "
            "tensorrt-rtx"
        )
    try:
        gpu = _find_gpu(engine, device)
    except NotAvailableError:
        if engine == "tensorrt" or device != "auto":
            raise
        gpu = None  # TensorRT for RTX needs none to build
    if engine == "tensorrt":
        assert gpu is not None
        return Target(engine, version, gpu.name, (gpu.capability,)), gpu
    known = known_capabilities(engine)
    if capabilities:
        chosen = sorted(set(capabilities), key=_number)
    elif gpu is not None:
        chosen = [gpu.capability]
    else:
        chosen = [one for one in portable(precision) if one in known]
    if unknown := [one for one in chosen if one not in known]:
        raise InputError(
            f"TensorRT for RTX {version} cannot build for compute capability {', '.join(unknown)}; it knows "
            f"{', '.join(sorted(known, key=_number))}. On other GPUs, such as an H100, use --engine tensorrt"
        )
    return Target(engine, version, None, tuple(chosen)), gpu


def _number(capability: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,3}\.\d", capability):
        raise InputError(f"{capability!r} is no compute capability; one such as 8.9 is expected")
    return tuple(int(part) for part in capability.split("."))


def _find_gpu(engine: PlanEngine, device: str) -> _Gpu:
    index = find_device(engine, device)
    import torch

    properties = cast(Any, torch.cuda.get_device_properties(index))  # pyright: ignore[reportUnknownMemberType]
    free, _ = torch.cuda.mem_get_info(index)
    return _Gpu(properties.name, f"{properties.major}.{properties.minor}", f"GPU-{properties.uuid}", free)
