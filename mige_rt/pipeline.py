"""MigePipeline: a prompt and pictures in, pictures out.

B samples, N different pictures that prompts refer to, R rows = B x guidance branches.
"""

import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray
from PIL.Image import Image as Picture

from engines.interface import Array, Engine, Precision, to_numpy
from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE, check_file, is_bundle, read_config, read_manifest
from mige_rt.config import ModelConfig, TaskDefaults
from mige_rt.denoise import denoise
from mige_rt.errors import InputError
from mige_rt.guidance import branches
from mige_rt.instruction import (
    PLACEHOLDER,
    Task,
    Tokenize,
    clean_caption,
    collate,
    compose_prompt,
    count_placeholders,
    encode_prompt,
    load_tokenizer,
    rewrite_instruction,
    words_kept,
)
from mige_rt.pictures import Fit, aspect_size, check_picture, cropped_share, to_picture, vae_pixels, vit_pixels
from mige_rt.sampler import dpm_solver_pp_2m, draw_noise

EditScope = Literal["local", "global"]
MAX_ENLARGED = 16  # times the trained area; far beyond it, attention needs more memory than machines have
CROP_WARNING = 0.1  # share of a picture cut away without a word


@dataclass(frozen=True)
class Request:
    """One picture to make. images in placeholder order; a source makes it an edit of that picture."""

    prompt: str
    images: tuple[Picture, ...] = ()
    source: Picture | None = None
    seed: int = 0
    task: Task | None = None  # None: read off the pictures


@dataclass(frozen=True)
class Settings:
    """How pictures are made; None is the model's default for the task.

    size is (width, height) in pixels, multiples of `ModelConfig.multiple`. fit: see `pictures.vae_pixels`; None is the
    published way: crop, but the references of generation are padded. With aspect, references are padded, too.
    """

    steps: int | None = None
    text_scale: float | None = None
    source_scale: float | None = None
    size: tuple[int, int] | None = None
    fit: Fit | None = None


@dataclass(frozen=True)
class Resolved:
    """A request whose task is known, and whose prompt has one picture for each placeholder."""

    prompt: str
    images: tuple[Picture, ...]
    source: Picture | None
    seed: int
    task: Task


def _same(a: Picture, b: Picture) -> bool:
    return a is b or (a.size == b.size and a.tobytes() == b.tobytes())


def resolve(request: Request, scope: EditScope = "local") -> Resolved:
    """Which of the three uses a request is, and its multimodal prompt (paper, section 3.1).

    Without a source: subject-driven generation. With one: an edit, where every picture in the prompt is the source;
    subject-driven editing, where some are not. A prompt without a placeholder is rewritten by the paper's rule, and
    `images` may be left out where each placeholder can only be the source.

    Raises InputError when placeholders and pictures do not match, or the task needs a source and there is none.
    """
    for picture in (*request.images, request.source):
        if picture is not None and not isinstance(picture, Picture):
            raise InputError(f"a picture is a {type(picture).__name__}; a Pillow picture is expected")
    source = None if request.source is None else check_picture(request.source)
    images = tuple(check_picture(image) for image in request.images)
    if source is not None:
        images = tuple(source if _same(image, source) else image for image in images)
    prompt, placeholders = request.prompt, count_placeholders(request.prompt)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt holds half a character ({error}); write it as UTF-8") from error
    if not clean_caption(prompt):
        raise InputError(f"the prompt is empty ({prompt!r}); say in words what the picture should be")
    if source is not None:
        rewritten = rewrite_instruction(prompt, scope)
        named = (source,) * count_placeholders(rewritten)
        if placeholders == 0 and images in ((), (source,), named):
            prompt, images = rewritten, named
        elif placeholders == 1 and not images:
            images = (source,)
        placeholders = count_placeholders(prompt)
    if placeholders != len(images):
        raise InputError(
            f"the prompt has {placeholders} {PLACEHOLDER} and {len(images)} pictures were given; "
            "give one picture for each, in their order"
        )
    if source is None:
        task: Task = "subject"
    else:
        task = "edit" if all(image is source for image in images) else "compose"
    if request.task is not None:
        if (request.task == "subject") != (source is None):
            needs = "takes no source picture" if source is not None else "needs a source picture"
            raise InputError(f"the task {request.task!r} {needs}; the pictures given are those of {task!r}")
        task = request.task
    return Resolved(prompt, images, source, request.seed, task)


def _warn_of_crop(image: Picture, width: int, height: int, warn: Callable[[str], None]) -> None:
    share = cropped_share(image.size, width, height)
    if share > CROP_WARNING:
        warn(
            f"{share:.0%} of a picture of {image.width}x{image.height} is cropped away for {width}x{height}; "
            "fit aspect keeps the source's shape, fit pad keeps all of every picture"
        )


class MigePipeline:
    """MIGE on one engine. Make one with `from_pretrained`; call it with prompts and pictures."""

    def __init__(self, config: ModelConfig, tokenize: Tokenize, engine: Engine, model_name: str = "") -> None:
        """model_name: what to call the model in a picture's metadata; the configuration's name if empty."""
        self.config = config
        self.model_name = model_name or config.name
        self.tokenize = tokenize
        self.engine = engine

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        engine: str = "auto",
        device: str = "auto",
        precision: Precision | Literal["auto"] = "auto",
    ) -> "MigePipeline":
        """Open a bundle (made by `mige-rt export`) or a model folder (made by `mige-rt convert` or by training); the
        shipped default if none is named.

        device auto: cuda where there is one. precision auto: a bundle's own; with PyTorch fp32 on the CPU, bf16 on
        CUDA. Raises InputError when the folder, the engine, the device or the precision is not what it should be.
        """
        from engines.opening import open_engine

        folder = Path(model)
        config = read_config(folder)
        if is_bundle(folder):
            check_file(folder, read_manifest(folder).tokenizer)
        tokenize = load_tokenizer(folder / TOKENIZER_FILE)
        name = config.name if folder == DEFAULT_MODEL else str(model)
        return cls(config, tokenize, open_engine(folder, engine, device, precision), name)

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
        scope: EditScope = "local",
        task: Task | None = None,
        on_step: Callable[[int, int], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> list[Picture]:
        """Make a picture; with a list of prompts, a batch: a list of pictures a prompt, of sources, of seeds (or one
        seed, from which each gets the next).

        steps, scales, size, fit: see `Settings`. on_step(done, total) is called after each step; on_warning gets one
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
        settings = Settings(steps, text_scale, source_scale, size, fit)
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
        table = dpm_solver_pp_2m(settings.steps, self.config.prediction)
        width, height = self.output_size(batch, settings.size, fit, warn)
        self._check_limits(batch, width, height)
        factor, channels = self.config.vae.factor, self.config.vae.channels
        noise = draw_noise([request.seed for request in batch], (channels, height // factor, width // factor))

        text_states, text_mask = self._encode(batch, fit, warn)
        xp = array_namespace(text_states)
        has_text = np.repeat([row.text for row in rows], len(batch))  # [R], branch-major
        cross_kv = self._run(
            "conditioner", text_states=xp.concat([text_states] * len(rows)), has_text=self.engine.array(has_text)
        )
        latents = denoise(
            lambda **inputs: self._run("denoiser", **inputs),
            self.engine.array(noise),
            None if task == "subject" else self._source_latents(batch, width, height, fit),
            cross_kv,
            self.engine.array(np.tile(text_mask, (len(rows), 1))),
            rows,
            table,
            on_step,
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
            _warn_of_crop(source, width, height, warn)
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

    @property
    def most_at_once(self) -> int:
        """How many pictures `make` takes at most."""
        span = self.engine.limits.get("B")
        return sys.maxsize if span is None else span.largest

    def _run(self, graph: str, **inputs: Array) -> Array:
        """The first output of a graph."""
        return next(iter(self.engine.run(graph, inputs).values()))

    def _encode(
        self, batch: Sequence[Resolved], fit: Fit | None, warn: Callable[[str], None]
    ) -> tuple[Array, NDArray[np.bool_]]:
        """text_states [B,L,D] and text_mask [B,L]; each different picture is encoded once."""
        config, side = self.config, self.config.size
        index: dict[tuple[bytes, Fit], int] = {}
        vit: list[NDArray[np.float32]] = []
        vae: list[NDArray[np.float32]] = []
        prompts = []
        for request in batch:
            slots = []
            how: Fit = "crop" if fit == "crop" or (fit is None and request.task != "subject") else "pad"
            for image in request.images:
                if how == "crop":
                    _warn_of_crop(image, side, side, warn)
                key = (repr(image.size).encode() + image.tobytes(), how)
                if key not in index:
                    index[key] = len(vit)
                    vit.append(vit_pixels(image, config.vision.side))
                    vae.append(vae_pixels(image, side, side, how))
                slots.append(index[key])
            text = compose_prompt(request.task, request.prompt)
            del slots[count_placeholders(text) :]  # those that the clean-up cut away with the words
            prompt = encode_prompt(text, slots, self.tokenize, config.qformer.queries, config.max_tokens)
            if prompt.token_ids.max() >= config.text.vocabulary:
                raise InputError(
                    f"the prompt has the token {prompt.token_ids.max()} and the model knows {config.text.vocabulary}: "
                    "the tokenizer is another model's; convert the model again with its own"
                )
            kept = prompt.kept or words_kept(request.prompt)
            if kept is not None:
                warn(f"the prompt is too long and was cut after: ...{kept}")
            prompts.append(prompt)
        token_ids, slot_index, text_mask = collate(prompts)
        array = self.engine.array
        if vit:
            ref_latents = self._run("vae_encoder", pixels_vae=array(np.stack(vae)))
            image_tokens = self._run("image_encoder", pixels_vit=array(np.stack(vit)), ref_latents=ref_latents)
        else:
            image_tokens = array(np.zeros((1, config.qformer.queries, config.text.width), np.float32))
        text_states = self._run(
            "text_encoder",
            token_ids=array(token_ids),
            image_tokens=image_tokens,
            slot_index=array(slot_index),
            text_mask=array(text_mask),
        )
        return text_states, text_mask

    def _source_latents(self, batch: Sequence[Resolved], width: int, height: int, fit: Fit | None) -> Array:
        """[B,c,h,w], scaled; a source that several samples share is encoded once."""
        pixels: list[NDArray[Any]] = []
        index: dict[bytes, int] = {}
        order = []
        for request in batch:
            assert request.source is not None
            made = vae_pixels(request.source, width, height, fit or "crop")
            key = made.tobytes()
            if key not in index:
                index[key] = len(pixels)
                pixels.append(made)
            order.append(index[key])
        latents = self._run("vae_encoder", pixels_vae=self.engine.array(np.stack(pixels)))
        xp = array_namespace(latents)
        return xp.stack([latents[i] for i in order]) * self.config.vae.scale
