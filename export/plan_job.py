"""The job of a plan's builder, and its result."""

from dataclasses import dataclass
from pathlib import Path

from engines.plans import PlanEngine
from mige_rt.graphs import GraphName

PlanProfile = dict[str, tuple[list[int], list[int], list[int]]]  # by input: the smallest, usual and largest shape


@dataclass(frozen=True)
class PlanOptions:
    """The builder's options.

    Attributes:
        optimization_level: the builder's own default.
        tf32: fp32 is fp32 here; for speed there is fp16.
    """

    optimization_level: int = 3
    tf32: bool = False


@dataclass(frozen=True)
class PlanJob:
    """A plan to build.

    Attributes:
        engine: the runtime.
        graph: the graph's name.
        onnx: its file.
        plan: the file to write.
        profile: the shapes that it is built for.
        capabilities: the GPUs' compute capabilities, as 8.9.
        workspace: bytes of the GPU's memory that the builder may use; None: the builder's default.
        gpu: the GPU to build on, as CUDA_VISIBLE_DEVICES takes it; None: none.
        timing_cache: what TensorRT measured for earlier plans.
        options: the builder's.
    """

    engine: PlanEngine
    graph: GraphName
    onnx: Path
    plan: Path
    profile: PlanProfile
    capabilities: tuple[str, ...]
    workspace: int | None
    gpu: str | None
    timing_cache: Path
    options: PlanOptions


@dataclass(frozen=True)
class BuiltPlan:
    """What building took; peak_bytes: of the process's memory, None where the system does not say."""

    seconds: float
    peak_bytes: int | None
