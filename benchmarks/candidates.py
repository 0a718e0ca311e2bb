"""What `mige-rt bench` measures: candidates (a program on an engine) and cases (what they are asked to make)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import ImageChops
from PIL.Image import Image as Picture

import export
from benchmarks.table import TITLES
from engines.factory import ENGINES, Asked
from mige_rt.images import open_image
from mige_rt.instruction import PLACEHOLDER
from mige_rt.requests import Request, ResolvedRequest, resolve
from mige_rt.sampling_params import SamplingParams

if TYPE_CHECKING:
    from benchmarks.variants import Program  # needs torch, whose memory is no other engine's

SAMPLES = Path(export.__file__).parent / "samples"
SCENES = ("picture-5.png", "picture-7.png", "picture-9.png", "picture-6.png")
THINGS = ("picture-8.png", "picture-10.png", "picture-1.png", "picture-2.png", "picture-3.png", "picture-4.png")
BASELINES: "tuple[Program, ...]" = ("published", "encode_once")
SEED = 0
SHORT = 2  # steps, the solver's least: of the runs that seconds a step are taken from

# Approximations that change the picture a little, see `mige_rt.denoise.Approximations`.
GUIDANCE_RANGE = (0.0, 0.5)
REUSE = 0.1


@dataclass(frozen=True)
class Home:
    """What a process of its own holds: a program over one opened engine. precision and device as they are asked for."""

    model: Path
    engine: str
    device: str
    precision: Asked
    program: "Program" = "ours"
    compile: bool = False
    low_vram: bool = False


@dataclass(frozen=True)
class Candidate:
    """One row of the report: a home, and what it is told to do besides.

    cached: the prompt was encoded before; without it, everything is encoded anew for each picture.
    """

    home: Home
    cached: bool = False
    guidance_range: tuple[float, float] | None = None
    reuse: float | None = None

    @property
    def exact(self) -> bool:
        """Whether its pictures are to be those of the reference, within the precision's tolerance."""
        return self.guidance_range is None and self.reuse is None

    @property
    def plain(self) -> bool:
        """What a user gets without asking for anything."""
        return (
            self.exact and not (self.cached or self.home.compile or self.home.low_vram) and self.home.program == "ours"
        )

    @property
    def extra(self) -> str:
        """What sets it apart from the plain candidate of its engine, in words; "" where nothing does."""
        home = self.home
        said = [TITLES[home.program]] if home.program != "ours" else []
        said += ["torch.compile"] if home.compile else []
        said += ["low VRAM"] if home.low_vram else []
        said += ["prompt cached"] if self.cached else []
        if self.guidance_range is not None:
            first, last = self.guidance_range
            said.append(f"guidance at {first:.0%} to {last:.0%} of the steps")
        said += [f"reuse below {self.reuse:g}"] if self.reuse is not None else []
        return ", ".join(said)

    def settings(self, case: "Case") -> SamplingParams:
        return SamplingParams(
            steps=case.steps,
            guidance_scale=case.guidance_scale,
            image_guidance_scale=case.image_guidance_scale,
            size=case.size,
            guidance_range=self.guidance_range,
            reuse=self.reuse,
        )


@dataclass(frozen=True)
class Case:
    """What is made: an edit of `references` pictures, of which the first is the source, `batch` at once.

    size is (width, height) in pixels. The scales are the published ones unless told otherwise.
    """

    references: int
    batch: int
    steps: int
    size: tuple[int, int]
    guidance_scale: float
    image_guidance_scale: float

    @property
    def task(self) -> Literal["edit", "compose"]:
        return "edit" if self.references == 1 else "compose"

    def __str__(self) -> str:
        pictures = f"{self.references} reference{'s' * (self.references > 1)}"
        at_once = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.size[0]}x{self.size[1]}, {pictures}, {self.steps} steps{at_once}"


def requests(case: Case) -> list[ResolvedRequest]:
    """One request a picture of the batch, each with pictures of its own, so that none is spared its encoding."""
    made = []
    for k in range(case.batch):
        source = _picture(SCENES, k)
        if case.references == 1:
            prompt, images = f"paint the background of {PLACEHOLDER} yellow", [source]
        else:
            others = range(k * (case.references - 1), (k + 1) * (case.references - 1))
            images = [*(_picture(THINGS, i) for i in others), source]
            prompt = f"put {', '.join([PLACEHOLDER] * len(others))} into {PLACEHOLDER}"
        made.append(resolve(Request(prompt, tuple(images), source, SEED + k)))
    return made


def _picture(names: tuple[str, ...], number: int) -> Picture:
    """Sample pictures in turn; from the second turn on they are shifted, so that no two are the same."""
    picture = open_image(SAMPLES / names[number % len(names)])
    return ImageChops.offset(picture, 5 * (number // len(names)))


def wanted(
    models: dict[str, Path], engines: Sequence[str], device: str, precisions: Sequence[Asked], compile: bool
) -> list[Candidate]:
    """The candidates, slowest first: for each precision the baselines of PyTorch, then every engine; then what the
    fastest engine can do besides.

    models: a model for each precision and, under "auto", the one that is taken for precisions which PyTorch makes of it
    itself. compile: PyTorch through torch.compile is one.
    """
    found: list[Candidate] = []
    for precision in precisions:
        model = models.get(precision, models["auto"])
        for engine in reversed([engine for engine in ENGINES if engine in engines]):
            home = Home(model, engine, device, precision)
            if engine == "pytorch":
                home = Home(models["auto"], engine, device, precision)
                found += [Candidate(replace(home, program=p)) for p in BASELINES]
                found += [Candidate(home)] + ([Candidate(replace(home, compile=True))] if compile else [])
            else:
                found.append(Candidate(home))
    return found


def besides(fastest: Home) -> list[Candidate]:
    """What the fastest engine can do besides: the prompt remembered, savings, less memory."""
    return [
        Candidate(fastest, cached=True),
        Candidate(fastest, guidance_range=GUIDANCE_RANGE),
        Candidate(fastest, reuse=REUSE),
        Candidate(replace(fastest, low_vram=True)),
    ]
