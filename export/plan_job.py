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
        refittable: NVIDIA's Refitter can replace the plan's weights. Without a GPU, TensorRT for RTX 1.7 fails to build
            such plans.
    """

    optimization_level: int = 3
    tf32: bool = False
    refittable: bool = False


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
        list_kernels: say which kernels the plan has; it then carries their names, and is larger.
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
    list_kernels: bool = False


@dataclass(frozen=True)
class Kernel:
    """A kernel that a plan launches.

    Attributes:
        name: as the builder calls it: after the operations that it fuses (`__myl_FcAdd_myl0_14`), after the graph's
            nodes, or after its kind (`_gemm_mha_v2_myl0_13`, a fused attention).
        kind: the builder's: kgen and runtime_fusion are generated, gemm and correlation are the library's.
        inputs: their types, as Half or FP8.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]

    @property
    def is_attention(self) -> bool:
        """Whether it is a whole attention: both products and the softmax between them."""
        return "_mha_" in self.name


@dataclass(frozen=True)
class BuiltPlan:
    """What building took; peak_bytes: of the process's memory, None where the system does not say."""

    seconds: float
    peak_bytes: int | None
    kernels: list[Kernel] | None = None  # in the order in which they run; None: not asked for
