"""MigePipeline: a prompt and pictures in, pictures out.

B samples, N different pictures that prompts refer to, R rows = B x guidance branches.
"""

import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from array_api_compat import array_namespace
from PIL.Image import Image as Picture

from engines.interface import GRAPHS, Array, Engine, Precision, to_numpy
from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE, check_file, is_bundle, read_config, read_manifest
from mige_rt.conditioning import Encoder, warn_of_crop
from mige_rt.config import ModelConfig, Solver, TaskDefaults
from mige_rt.denoise import Savings, denoise, plain_step
from mige_rt.errors import InputError
from mige_rt.guidance import branches
from mige_rt.images import Fit, aspect_size, to_picture
from mige_rt.instruction import Task, Tokenize, load_tokenizer
from mige_rt.requests import EditScope, Request, Resolved, resolve
from mige_rt.scheduler import draw_noise, solver_table

if TYPE_CHECKING:
    from mige_rt.cuda_graphs import CapturedSteps

MAX_ENLARGED = 16  # times the trained area; far beyond it, attention needs more memory than machines have
# Of graphs that must be there together, when memory is short.
PHASES = (("vae_encoder", "image_encoder"), ("text_encoder",), ("conditioner", "denoiser"), ("vae_decoder",))


@dataclass(frozen=True)
class Settings:
    """How pictures are made; None is the model's default for the task.

    size is (width, height) in pixels, multiples of `ModelConfig.multiple`. fit: see `pictures.vae_pixels`; None is the
    published way: crop, but the references of generation are padded. With aspect, references are padded, too.
    guidance_range and reuse save time and change the picture a little, see `denoise.Savings`; None: they do not.
    """

    steps: int | None = None
    text_scale: float | None = None
    source_scale: float | None = None
    size: tuple[int, int] | None = None
    fit: Fit | None = None
    solver: Solver | None = None  # None: the published one
    guidance_range: tuple[float, float] | None = None
    reuse: float | None = None

    def savings(self) -> Savings:
        """Raises InputError when they are no shares of the steps, or a threshold below 0."""
        first, last = self.guidance_range or (0.0, 1.0)
        if not 0 <= first < last <= 1:
            raise InputError(
                f"the guidance range is {first} to {last}; a part of 0 to 1 is expected, such as 0.1 to 0.8"
            )
        reuse = 0.0 if self.reuse is None else self.reuse
        if not 0 <= reuse < 1:
            raise InputError(f"the threshold of reuse is {reuse}; 0 (none) to 1 is expected, such as 0.05")
        return Savings((first, last), reuse)


class MigePipeline:
    """MIGE on one engine. Make one with `from_pretrained`; call it with prompts and pictures."""

    def __init__(
        self,
        config: ModelConfig,
        tokenize: Tokenize,
        engine: Engine,
        model_name: str = "",
        low_memory: bool = False,
        capture: bool = True,
    ) -> None:
        """model_name: what to call the model in a picture's metadata; the configuration's name if empty. low_memory,
        capture: see `from_pretrained`."""
        self.config = config
        self.model_name = model_name or config.name
        self.engine = engine
        self.low_memory = low_memory
        self.encoder = Encoder(config, tokenize, engine.array, self._run)
        self._step = plain_step(lambda **inputs: self._run("denoiser", **inputs))
        self._captured: CapturedSteps | None = None
        if capture and engine.captures:
            from mige_rt import cuda_graphs as cuda  # needs torch

            self._step = self._captured = cuda.CapturedSteps(self._step, engine)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        engine: str = "auto",
        device: str = "auto",
        precision: Precision | Literal["auto"] = "auto",
        *,
        low_memory: bool = False,
        capture: bool = True,
        compile: bool = False,
    ) -> "MigePipeline":
        """Open a bundle (made by `mige-rt export`) or a model folder (made by `mige-rt convert` or by training); the
        shipped default if none is named.

        device auto: cuda where there is one. precision auto: a bundle's own; with PyTorch fp32 on the CPU, bf16 on
        CUDA. low_memory: the image encoders, the text encoder, the denoiser and the decoder are loaded when they are
        needed and released before the next, which costs the time of loading. capture: on CUDA, steps are captured as
        graphs (not by ONNX Runtime). compile: PyTorch's denoiser goes through torch.compile.
        Raises InputError when the folder, the engine, the device or the precision is not what it should be.
        """
        from engines.factory import open_engine

        folder = Path(model)
        config = read_config(folder)
        if is_bundle(folder):
            check_file(folder, read_manifest(folder).tokenizer)
        tokenize = load_tokenizer(folder / TOKENIZER_FILE)
        name = config.name if folder == DEFAULT_MODEL else str(model)
        opened = open_engine(folder, engine, device, precision, low_memory, compile)
        return cls(config, tokenize, opened, name, low_memory, capture)

    def __call__(
        self,
        prompt: str | Sequence[str],
        images: Sequence[Picture] | Sequence[Sequence[Picture]] = (),
        source: Picture | Sequence[Picture | None] | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        steps: int | None = None,
        text_scale: float | None = None,
        source_scale: float | None = None,
        size: tuple[int, int] | None = None,
        fit: Fit | None = None,
        solver: Solver | None = None,
        guidance_range: tuple[float, float] | None = None,
        reuse: float | None = None,
        scope: EditScope = "local",
        task: Task | None = None,
        on_step: Callable[[int, int], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> list[Picture]:
        """Make a picture; with a list of prompts, a batch: a list of pictures a prompt, of sources, of seeds (or one
        seed, from which each gets the next).

        steps to reuse: see `Settings`. on_step(done, total) is called after each step; on_warning gets one
        sentence. A picture depends on its own seed alone, never on the batch. Raises InputError on unusable input.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        number = len(prompts)
        if fit not in (None, *get_args(Fit)) or scope not in get_args(EditScope):
            raise InputError(
                f"fit is {fit!r} and scope {scope!r}; fit is one of {', '.join(get_args(Fit))}, scope one of "
                f"{', '.join(get_args(EditScope))}"
            )
        if isinstance(images, Picture) or isinstance(source, str | Path):
            raise InputError("images is a list of Pillow pictures and source one Pillow picture, not a path")
        per_prompt = [images] if isinstance(prompt, str) else list(images) or [()] * number
        sources = [source] * number if source is None or isinstance(source, Picture) else list(source)
        if seed is None:
            seed = secrets.randbelow(2**31)
        seeds = [int(seed) + i for i in range(number)] if isinstance(seed, Integral) else list(seed)  # type: ignore[arg-type]
        if not number or not (len(per_prompt) == len(sources) == len(seeds) == number):
            raise InputError(
                f"{number} prompts, {len(per_prompt)} lists of pictures, {len(sources)} sources and {len(seeds)} seeds "
                "were given; give one of each for every prompt"
            )
        requests = [
            Request(p, tuple(i), s, n, task)  # type: ignore[arg-type]
            for p, i, s, n in zip(prompts, per_prompt, sources, seeds, strict=True)
        ]
        settings = Settings(steps, text_scale, source_scale, size, fit, solver, guidance_range, reuse)
        return self.make([resolve(request, scope) for request in requests], settings, on_step, on_warning)

    def complete(self, settings: Settings, task: Task) -> Settings:
        """The settings with the model's defaults for the task filled in; size and fit stay as they are."""
        defaults: TaskDefaults = getattr(self.config.defaults, task)
        return replace(
            settings,
            steps=defaults.steps if settings.steps is None else settings.steps,
            text_scale=defaults.text_scale if settings.text_scale is None else settings.text_scale,
            source_scale=defaults.source_scale if settings.source_scale is None else settings.source_scale,
        )

    def make(
        self,
        batch: Sequence[Resolved],
        settings: Settings,
        on_step: Callable[[int, int], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> list[Picture]:
        """Like `__call__`, for resolved requests, which must all be of one task."""
        tasks = {request.task for request in batch}
        if len(tasks) > 1:
            raise InputError(f"the batch mixes the tasks {', '.join(sorted(tasks))}; run them apart")
        said: set[str] = set()

        def warn(sentence: str) -> None:
            if on_warning is not None and sentence not in said:
                said.add(sentence)
                on_warning(sentence)

        task, fit = batch[0].task, settings.fit
        settings = self.complete(settings, task)
        assert settings.steps is not None and settings.text_scale is not None
        rows = branches(settings.text_scale, None if task == "subject" else settings.source_scale)
        table = solver_table(settings.solver or "dpm_solver_pp_2m", settings.steps, self.config.prediction)
        savings = settings.savings()
        width, height = self.output_size(batch, settings.size, fit, warn)
        self._check_limits(batch, width, height)
        factor, channels = self.config.vae.factor, self.config.vae.channels
        noise = draw_noise([request.seed for request in batch], (channels, height // factor, width // factor))

        source = None if task == "subject" else self.encoder.sources(batch, width, height, fit)
        text_states, text_mask = self.encoder.prompts(batch, fit, warn)
        xp = array_namespace(text_states)
        has_text = np.repeat([row.text for row in rows], len(batch))  # [R], branch-major
        cross_kv = self._run(
            "conditioner", text_states=xp.concat([text_states] * len(rows)), has_text=self.engine.array(has_text)
        )
        latents = denoise(
            self._step,
            self.engine.array(noise),
            source,
            cross_kv,
            self.engine.array(np.tile(text_mask, (len(rows), 1))),
            rows,
            table,
            on_step,
            savings,
        )
        pixels = self._run("vae_decoder", latents=latents / self.config.vae.scale)
        return [to_picture(picture) for picture in to_numpy(pixels)]

    def output_size(
        self, batch: Sequence[Resolved], size: tuple[int, int] | None, fit: Fit | None, warn: Callable[[str], None]
    ) -> tuple[int, int]:
        """(width, height) of the pictures to make. Raises InputError when they cannot have the size asked for."""
        sources = [request.source for request in batch if request.source is not None]
        multiple = self.config.multiple
        if fit == "aspect":
            if size is not None:
                raise InputError("a size was given with fit aspect, which takes the source's shape; give only one")
            if not sources:
                raise InputError("fit aspect takes the source's shape, and there is no source; give a size instead")
            sizes = {aspect_size(source.size, self.config.size**2, multiple) for source in sources}
            if len(sizes) > 1:
                raise InputError("the batch's sources have different shapes; run them apart, or use fit crop or pad")
            return sizes.pop()
        width, height = size or (self.config.size, self.config.size)
        if min(width, height) < multiple or width % multiple or height % multiple:
            raise InputError(
                f"the size is {width}x{height}; both sides must be multiples of {multiple}, "
                f"such as {self.config.size}x{self.config.size}"
            )
        if width * height > MAX_ENLARGED * self.config.size**2:
            raise InputError(
                f"the size is {width}x{height}; this model was trained for {self.config.size}x{self.config.size}, "
                f"and at most {MAX_ENLARGED} times that area is made"
            )
        for source in sources if fit in (None, "crop") else ():
            warn_of_crop(source, width, height, warn)
        return width, height

    def _check_limits(self, batch: Sequence[Resolved], width: int, height: int) -> None:
        """Raises InputError that names the limit of the engine's graphs, and what raises it."""
        factor = self.config.vae.factor
        references = {(image.size, image.tobytes()) for request in batch for image in request.images}
        asked = {
            "B": (len(batch), 1, "pictures made at once", "--max-batch"),
            "N": (len(references), 1, "pictures that prompts refer to", "--max-references or --max-batch"),
            "w": (width // factor, factor, "pixels of width", "--size or --sizes"),
            "h": (height // factor, factor, "pixels of height", "--size or --sizes"),
        }
        for axis, (size, unit, what, option) in asked.items():
            span = self.engine.limits.get(axis)
            if span is not None and size and not span.smallest <= size <= span.largest:
                spoken = (
                    f"{span.smallest * unit}"
                    if span.smallest == span.largest
                    else (f"{span.smallest * unit} to {span.largest * unit}")
                )
                raise InputError(
                    f"{size * unit} {what} are asked for, and this model's graphs take {spoken}: export it again with "
                    f"another {option}" + ("" if self.engine.precision == "int8" else ", or use --engine pytorch")
                )

    def forget(self) -> None:
        """Drop the encoded prompts and sources that are remembered, and captured graphs."""
        self.encoder.forget()
        if self._captured is not None:
            self._captured.clear()

    @property
    def most_at_once(self) -> int:
        """How many pictures `make` takes at most."""
        span = self.engine.limits.get("B")
        return sys.maxsize if span is None else span.largest

    def _run(self, graph: str, **inputs: Array) -> Array:
        """The first output of a graph."""
        if self.low_memory:
            phase = next(phase for phase in PHASES if graph in phase)
            others = [other for other in GRAPHS if other not in phase]
            if "denoiser" in others and self._captured is not None:
                self._captured.clear()
            self.engine.release(others)
        return next(iter(self.engine.run(graph, inputs).values()))
