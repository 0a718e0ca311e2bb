"""What `mige-rt bench` measures: candidates (a variant on an engine) and cases (what they are asked to make).

Worker processes import this module, so nothing here loads PyTorch, whose memory is no other engine's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnxruntime
from PIL import Image, ImageChops

import export
from engines.factory import ENGINES
from mige_rt.config import Precision
from mige_rt.images import open_image
from mige_rt.instruction import PLACEHOLDER
from mige_rt.requests import Request, ResolvedRequest, resolve
from mige_rt.sampling_params import SamplingParams

Level = Literal["basic", "extended", "all"]
AnyPrecision = Precision | Literal["auto"]
Variant = Literal["published", "encode_once", "ours"]

VARIANT_TITLES: dict[Variant, str] = {"published": "as published", "encode_once": "encode once", "ours": "ours"}
BASELINES: tuple[Variant, ...] = ("published", "encode_once")
ENGINE_TITLES = {"pytorch": "PyTorch", "onnxruntime": "ONNX Runtime"}
ENGINE_TITLES |= {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
SAMPLES = Path(export.__file__).parent / "samples"
SCENES = tuple(f"picture-{number}.png" for number in (5, 7, 9, 6))
SUBJECTS = tuple(f"picture-{number}.png" for number in (8, 10, 1, 2, 3, 4))

GUIDANCE_RANGE, REUSE = (0.0, 0.5), 0.1  # approximations that change the image a little, see `mige_rt.denoise`


@dataclass(frozen=True)
class RuntimeSettings:
    """A session's options, all of them set, whatever the engine's own are; these are ONNX Runtime's defaults."""

    threads: int = 0  # within a node; 0 is one a core, each bound to its own
    arena: bool = True  # memory is kept between runs
    pattern: bool = True  # memory is laid out in advance for a shape that was seen
    optimisation: Level = "all"
    spinning: bool = True  # threads wait for work in a loop
    batch_parallel: bool = False  # parts of the batch side by side, with as many threads as the engine has for that

    def set_options(self, options: onnxruntime.SessionOptions) -> None:
        if not self.batch_parallel:
            options.intra_op_num_threads = self.threads
        options.enable_cpu_mem_arena = self.arena
        options.enable_mem_pattern = self.pattern
        level = f"ORT_ENABLE_{self.optimisation.upper()}"
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spinning)))


@dataclass(frozen=True)
class WorkerConfig:
    """A variant over one opened engine; precision and device as they are asked for."""

    model: Path
    engine: str
    device: str
    precision: AnyPrecision
    variant: Variant = "ours"
    compile: bool = False
    low_vram: bool = False
    runtime: RuntimeSettings | None = None  # of ONNX Runtime on a CPU; None: the engine's own

    @property
    def process(self) -> "WorkerConfig":
        """The process that it runs in, which all variants share."""
        return replace(self, variant="ours")


@dataclass(frozen=True)
class Candidate:
    """One row of the report: a worker, and the options of each call."""

    worker: WorkerConfig
    guidance_range: tuple[float, float] | None = None
    reuse: float | None = None

    @property
    def exact(self) -> bool:
        """Whether its images are to be the reference's, within the precision's tolerance."""
        return self.guidance_range is None and self.reuse is None

    @property
    def plain(self) -> bool:
        """Whether it is what a user gets without any option."""
        return self.variant_alone == "ours"

    @property
    def variant_alone(self) -> Variant | None:
        """The variant, where nothing else sets it apart from what a user gets; else None."""
        alone = self == Candidate(replace(self.worker, compile=False, low_vram=False))
        return self.worker.variant if alone else None

    @property
    def options(self) -> str:
        """What sets it apart from the plain candidate of its engine, in words; "" where nothing does."""
        first, last = self.guidance_range or (0, 1)
        words = {
            VARIANT_TITLES[self.worker.variant]: self.worker.variant != "ours",
            "torch.compile": self.worker.compile,
            "low VRAM": self.worker.low_vram,
            f"guidance at {first:.0%} to {last:.0%} of the steps": self.guidance_range is not None,
            f"reuse below {self.reuse or 0:g}": self.reuse is not None,
        }
        return ", ".join(word for word, applies in words.items() if applies)

    def title(self, precision: str | None = None) -> str:
        """Its name in the report. precision: the opened engine's; None where it is not opened yet."""
        precision = precision or self.worker.precision
        name = ENGINE_TITLES[self.worker.engine] + ("" if precision == "auto" else f" {precision}")
        return f"{name}, {self.options}" if self.options else name


@dataclass(frozen=True)
class Case:
    """`batch` edits at once, each of `references` images of which one is the source; size is (width, height)."""

    references: int
    batch: int
    num_inference_steps: int
    size: tuple[int, int]
    guidance_scale: float
    image_guidance_scale: float

    @property
    def task(self) -> Literal["edit", "compose"]:
        return "edit" if self.references == 1 else "compose"

    def params(self, candidate: Candidate) -> SamplingParams:
        names = ("num_inference_steps", "guidance_scale", "image_guidance_scale")
        options = {name: getattr(self, name) for name in names}
        approximations = {"guidance_range": candidate.guidance_range, "reuse": candidate.reuse}
        return SamplingParams(width=self.size[0], height=self.size[1], **options, **approximations)

    def __str__(self) -> str:
        width, height = self.size
        references = f"{self.references} reference{'s' * (self.references > 1)}"
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{width}x{height}, {references}, {self.num_inference_steps} steps{batch}"


def requests(case: Case) -> list[ResolvedRequest]:
    """One request for each image of the batch, with images of its own, so that none is spared its encoding."""
    batch, subjects = [], case.references - 1  # of each request
    prompt = f"paint the background of {PLACEHOLDER} yellow"
    if subjects:
        prompt = f"put {', '.join([PLACEHOLDER] * subjects)} into {PLACEHOLDER}"
    for k in range(case.batch):
        source = sample_image(SCENES, k)
        images = [sample_image(SUBJECTS, k * subjects + i) for i in range(subjects)]
        batch.append(resolve(Request(prompt, (*images, source), source, k)))
    return batch


def sample_image(names: Sequence[str], number: int) -> Image.Image:
    """Sample images in turn; from the second turn on they are shifted, so that no two are the same."""
    image = open_image(SAMPLES / names[number % len(names)])
    return ImageChops.offset(image, 5 * (number // len(names)))


def main_candidates(
    model: Path, bundles: Mapping[AnyPrecision, Path | None], engines: Sequence[str], device: str, compile: bool
) -> list[Candidate]:
    """For each precision the baselines on PyTorch, then every engine, slowest first.

    PyTorch runs `model`, the others the precision's bundle, if there is one. compile: PyTorch with torch.compile, too.
    """
    candidates: list[Candidate] = []
    for precision, bundle in bundles.items():
        for engine in reversed([engine for engine in ENGINES if engine in engines]):
            if engine == "pytorch":
                worker = WorkerConfig(model, engine, device, precision)
                candidates += [Candidate(replace(worker, variant=variant)) for variant in (*BASELINES, "ours")]
                candidates += [Candidate(replace(worker, compile=True))] if compile else []
            elif bundle is not None:
                candidates.append(Candidate(WorkerConfig(bundle, engine, device, precision)))
    return candidates


def optional_candidates(fastest: WorkerConfig) -> list[Candidate]:
    """What the fastest engine offers besides: approximations, less memory."""
    return [
        Candidate(fastest, guidance_range=GUIDANCE_RANGE),
        Candidate(fastest, reuse=REUSE),
        Candidate(replace(fastest, low_vram=True)),
    ]
