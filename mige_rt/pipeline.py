"""MigePipeline: prompts and images in, images out."""

import logging
import secrets
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, cast, get_args

import numpy as np
from PIL import Image

from engines.factory import EngineOptions, has_nvidia_driver, open_engine
from engines.interface import Array, Attention, Engine, array_namespace, lora_engine, to_numpy
from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE, open_model
from mige_rt.conditioning import ConditionEncoder
from mige_rt.config import ModelConfig, Precision, SchedulerName
from mige_rt.denoise import Conditioning, Denoiser, Step, denoise, denoising_step, schedule_rows
from mige_rt.errors import InputError
from mige_rt.graph_runner import GraphRunner
from mige_rt.hub import local_folder
from mige_rt.image_size import Fit
from mige_rt.images import normalize_image
from mige_rt.instruction import EditScope, Task
from mige_rt.lora import Lora
from mige_rt.memory import MemoryBudget
from mige_rt.paste_back import paste_back as put_source_back
from mige_rt.postprocessing import to_image
from mige_rt.preprocessing import vae_pixels
from mige_rt.requests import Request, ResolvedRequest, resolve
from mige_rt.sampling_params import SamplingParams
from mige_rt.sampling_plan import SamplingPlan, plan_sampling
from mige_rt.tokenizer import Tokenize, load_tokenizer

if TYPE_CHECKING:
    import torch

    from mige_rt.cuda_graphs import CudaGraphRunner

_log = logging.getLogger(__name__)

# (pipe, index of the step, its timestep, {"latents": latents}) -> {"latents": latents to go on with}, or nothing new
CallbackOnStepEnd = Callable[["MigePipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class MigePipelineOutput:
    """What a call of the pipeline gives.

    Attributes:
        images: RGB; the images of the first prompt, then those of the second, and so on.
        seeds: Of each image: with it, `num_images_per_prompt=1` and the same arguments, the image is made again.
    """

    images: list[Image.Image]
    seeds: list[int]


P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])


def _in_turn(
    method: "Callable[Concatenate[MigePipeline, P], T]",
) -> "Callable[Concatenate[MigePipeline, P], T]":
    """Calls from several threads wait for each other: caches, an engine's outputs and opened files are shared."""

    @wraps(method)
    def locked(self: "MigePipeline", *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:  # pyright: ignore[reportPrivateUsage]
            return method(self, *args, **kwargs)

    return locked


class MigePipeline:
    """MIGE on one engine: make an image of given things, edit an image, or both at once.

    One pipeline may be used from several threads; their calls take turns, since each uses all cores, or the GPU. A
    callback must not wait for another thread that uses the pipeline.

    Examples:
        >>> from PIL import Image
        >>> from mige_rt import MigePipeline
        >>> pipe = MigePipeline.from_pretrained()
        >>> scene = Image.open("docs/scene.png")
        >>> result = pipe("make the background blue", source=scene, seed=0)
        >>> result.images[0].save("out.png")

    Attributes:
        config: The model's sizes and defaults.
        engine: What runs the model's graphs: its `name`, `device`, `precision` and `limits`.
        model_name: What the model is called in an image's metadata.
        folder: The bundle or the model folder that it was opened from; None where it was assembled from parts.
        max_batch_size: How many images are made at once at most.
    """

    def __init__(  # noqa: PLR0913, what a pipeline is made of
        self,
        config: ModelConfig,
        tokenize: Tokenize,
        engine: Engine,
        *,
        model_name: str = "",
        low_memory: bool = False,
        cuda_graphs: bool = True,
        cfg_parallel: bool = False,
        memory: MemoryBudget | None = None,
    ) -> None:
        """Assemble a pipeline from parts; `from_pretrained` opens them from a folder.

        Args:
            config: The model's.
            tokenize: Its tokenizer.
            engine: Its graphs.
            model_name: The configuration's name if empty.
            low_memory: See `from_pretrained`.
            cuda_graphs: See `from_pretrained`.
            cfg_parallel: See `from_pretrained`; the processes have met already.
            memory: What a run may take; None: no limit.
        """
        self.config = config
        self.model_name = model_name or config.name
        self.engine = engine
        self._loras: list[Lora] = []
        self._lock = threading.RLock()  # re-entrant: a callback may use the pipeline
        self.memory = memory
        self.folder: Path | None = None
        self.runner = GraphRunner(engine, config, low_memory=low_memory)
        self.condition_encoder = ConditionEncoder(config, tokenize, self.runner)
        self._is_parallel = cfg_parallel
        denoiser: Denoiser = partial(self.runner.run, "denoiser")
        if cfg_parallel:
            from mige_rt.cfg_parallel import BranchParallelDenoiser  # needs torch

            denoiser = BranchParallelDenoiser(denoiser)
        self._cuda_graphs: CudaGraphRunner | None = None
        if cuda_graphs and engine.max_cuda_graphs:
            from mige_rt import cuda_graphs as graphs  # needs torch

            self._cuda_graphs = graphs.CudaGraphRunner(engine)
            self.runner.before_denoiser_release = self._cuda_graphs.clear
        self._step: Step = self.captured(denoising_step(denoiser))
        self._is_denoising = False

    @classmethod
    def from_pretrained(  # noqa: PLR0913, diffusers' way to open a model
        cls,
        name_or_path: str | Path = DEFAULT_MODEL,
        *,
        engine: str = "auto",
        device: str = "auto",
        precision: Precision | Literal["auto"] = "auto",
        local_files_only: bool = False,
        low_memory: bool = False,
        cuda_graphs: bool = True,
        compile: bool = False,
        attention: Attention = "auto",
        cfg_parallel: bool = False,
        memory_limit: int | None = None,
        trust: bool = False,
    ) -> "MigePipeline":
        """Open a model.

        Args:
            name_or_path: A bundle (made by `mige-rt export`), a model folder (made by `mige-rt convert` or by
                training), or a repository on the Hugging Face hub that holds one. Default: the small model that comes
                with mige-rt.
            engine: `onnxruntime`, `pytorch`, `tensorrt` or `tensorrt-rtx`; `auto`: the fastest that works here.
            device: `cpu`, `cuda` or `cuda:N`; `auto`: cuda where there is one.
            precision: `fp32`, `fp16`, `bf16`, `int8`, `fp8` or `int8-sq`; `auto`: a bundle's own, but with the engine
                pytorch fp32 on the CPU and fp16 on CUDA, where T5 computes in bf16.
            local_files_only: Do not download; a repository must have been downloaded before.
            low_memory: The image encoders, the text encoder, the denoiser and the decoder are loaded when they are
                needed and released before the next, which costs the time of loading them for every image.
            cuda_graphs: On CUDA, a step of the loop is captured as a CUDA graph (engines pytorch and tensorrt).
            compile: The layers of the denoiser and the encoders go through `torch.compile` (engine pytorch): a minute
                or more at the first image.
            attention: PyTorch's implementation of attention on CUDA (engine pytorch): `cudnn`, `flash`, `efficient` or
                `math`; `auto`: the fastest, measured at opening.
            cfg_parallel: Divide the guidance branches of every step between the processes that `torchrun` started, a
                device each. Every process gets the same arguments, with a seed, and gives the images.
            memory_limit: Refuse what would need more bytes of memory than this. Default: on the CPU what is free, else
                no limit.
            trust: Run a bundle's graphs and plans that were not made on this machine without trying them first.

        Returns:
            The pipeline.

        Raises:
            InputError: The folder holds no model, or a damaged one.
            NotAvailableError: The engine, the device or the precision is not to be had here; an InputError, too.
        """
        if cfg_parallel:
            from mige_rt.cfg_parallel import join_processes  # needs torch

            device = join_processes(device)
        model = open_model(local_folder(name_or_path, local_files_only=local_files_only))
        on_cpu = device == "cpu" or (device == "auto" and not has_nvidia_driver())
        weights = model.weights_bytes(largest=low_memory)
        memory = MemoryBudget(model.config, weights, memory_limit, enforced=on_cpu, low_memory=low_memory)
        memory.check_model()
        tokenize = load_tokenizer(model.folder / TOKENIZER_FILE, known=model.known)
        options = EngineOptions(
            device=device,
            precision=precision,
            low_memory=low_memory,
            compile=compile,
            attention=attention,
            trust=trust,
        )
        name = model.config.name if model.folder == DEFAULT_MODEL else str(name_or_path)
        pipe = cls(
            model.config,
            tokenize,
            open_engine(model, engine, options),
            model_name=name,
            low_memory=low_memory,
            cuda_graphs=cuda_graphs,
            cfg_parallel=cfg_parallel,
            memory=memory,
        )
        pipe.folder = model.folder
        return pipe

    @_in_turn
    def __call__(  # noqa: PLR0913, diffusers' way to sample
        self,
        prompt: str | Sequence[str],
        images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None = None,
        source: Image.Image | Sequence[Image.Image | None] | None = None,
        *,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: "np.random.Generator | torch.Generator | Sequence[torch.Generator] | None" = None,
        width: int | None = None,
        height: int | None = None,
        fit: Fit | None = None,
        scheduler: SchedulerName | None = None,
        guidance_range: tuple[float, float] | None = None,
        reuse: float | None = None,
        paste_back: bool = False,
        edit_scope: EditScope = "local",
        task: Task | None = None,
        callback_on_step_end: CallbackOnStepEnd | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> MigePipelineOutput:
        """Make images. An image depends on its own arguments and seed alone, never on the batch that it was made in.

        Args:
            prompt: What to make, or how to edit. `<imagehere>` stands for an image, in the order of `images`. A list of
                prompts makes a batch, of one task; then `images`, `source` and `seed` are lists with one entry for
                each.
            images: What the placeholders stand for, as Pillow images of any mode and size. May be left out where each
                placeholder can only be the source.
            source: The image to edit, which may also be one of `images`. None (the default): a new image is made.
            guidance_scale: How strongly the text counts; 1 is no guidance. Default: the model's for the task
                (published: 7.0 without a source, 5.0 with one).
            image_guidance_scale: How strongly the source counts. Default: the model's for the task (published: 1.0).
            num_inference_steps: Steps of the scheduler, 2 to 1000. Default: the model's for the task (published: 50
                without a source, 60 with one).
            num_images_per_prompt: How many images of each prompt. Default: 1.
            seed: 0 or more. The i-th image of a prompt gets the prompt's seed plus i; with one seed for a batch, the
                next prompt goes on from there. Default: drawn, see the output's `seeds`.
            generator: Instead of `seed`: the seed of each image is drawn from it (NumPy's or PyTorch's), or from a list
                with one for each image.
            width: Of the images in pixels, a multiple of `config.multiple`. Default: the trained size, `config.size`.
            height: The same.
            fit: How images of another shape are fitted: `crop` cuts them, `pad` puts them on black, `aspect` makes the
                result in the source's shape. Default: crop; references of a new image are padded, as published.
            scheduler: `dpm_solver_pp_2m` (default, the published one) or `ddim`.
            guidance_range: Compute guidance in this part of the steps alone, as (0.1, 0.8): faster, a little different.
                Default: all steps.
            reuse: Skip the model while the latents have changed by less than this share, 0 to below 1, since it last
                ran: faster, a little different. Default: 0, never.
            paste_back: Put the source's own pixels where an edit has changed nothing. Default: the whole image is the
                model's.
            edit_scope: How an edit's prompt without `<imagehere>` is completed: `local` (in the image) or `global` (of
                it). Default: local.
            task: `subject`, `edit` or `compose`. Default: the one that the images imply.
            callback_on_step_end: Called after each step with the pipeline, the index of the step, its timestep (999
                down to 0) and `{"latents": latents}`, scaled latents [B,c,h,w] on the engine's device, which the next
                step may overwrite. If it returns a dict with `latents`, sampling goes on with those.
            on_warning: Gets a sentence when a prompt is cut or much of an image is cropped. Default: it is logged.

        Returns:
            The images and their seeds.

        Raises:
            InputError: An argument cannot be used; the message says what was given, what is expected and what to do.
            NotFiniteError: The model overflowed; an InputError, too.
        """
        if self._is_parallel and seed is None and generator is None:
            raise InputError("with cfg_parallel all processes start from one noise, and no seed was given; give one")
        requests = resolve_call(
            prompt,
            images,
            source,
            seed=seed,
            generator=generator,
            num_images_per_prompt=num_images_per_prompt,
            task=task,
            edit_scope=edit_scope,
        )
        if fit not in (None, *get_args(Fit)):
            raise InputError(f"fit is {fit!r}; it is one of {', '.join(get_args(Fit))}")
        params = SamplingParams(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            width=width,
            height=height,
            fit=fit,
            scheduler=scheduler,
            guidance_range=guidance_range,
            reuse=reuse,
            paste_back=paste_back,
        )
        images_of: list[list[Image.Image]] = [[] for _ in requests]
        at_once = max(1, self.max_batch_size // len(requests))  # images of each prompt
        for first in range(0, num_images_per_prompt, at_once):
            chunk = [of_prompt[first : first + at_once] for of_prompt in requests]
            made = self.generate(
                [request for part in chunk for request in part],
                params,
                callback_on_step_end=callback_on_step_end,
                on_warning=on_warning,
            )
            count = len(chunk[0])
            for i in range(len(requests)):
                images_of[i] += made[i * count : (i + 1) * count]
        return MigePipelineOutput(
            [image for images in images_of for image in images],
            [request.seed for of_prompt in requests for request in of_prompt],
        )

    @_in_turn
    def generate(
        self,
        requests: Sequence[ResolvedRequest],
        params: SamplingParams,
        *,
        callback_on_step_end: CallbackOnStepEnd | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> list[Image.Image]:
        """Like `__call__`, for resolved requests, which must all be of one task; an image each.

        Args:
            requests: At most `max_batch_size`.
            params: How to sample.
            callback_on_step_end: See `__call__`.
            on_warning: See `__call__`.

        Raises:
            InputError: A request or a parameter cannot be used with this model or on this engine.
            NotFiniteError: The model overflowed.
        """
        warnings: set[str] = set()

        def warn(sentence: str) -> None:
            if sentence not in warnings:
                warnings.add(sentence)
                (on_warning or _log.warning)(sentence)

        plan = self.plan(requests, params)
        for sentence in plan.warnings:
            warn(sentence)
        conditioning = self.encode_conditioning(requests, plan, warn)

        def on_step_end(index: int, latents: Array) -> Array | None:
            if callback_on_step_end is None:
                return None
            changes = callback_on_step_end(self, index, plan.schedule[index].timestep, {"latents": latents})
            return None if changes is None else changes.get("latents")

        if callback_on_step_end is not None:  # it may use the pipeline
            conditioning = conditioning.with_own_cross_kv()
        noise = self.engine.array(plan.noise)
        with self._denoising():
            latents = denoise(
                self._step,
                noise,
                conditioning,
                plan.branches,
                self.schedule_rows(plan, noise),
                approximations=plan.approximations,
                on_step_end=on_step_end,
            )
        images = self.decode(latents)
        if not params.paste_back or conditioning.source is None:
            return images
        sources = [
            to_image(vae_pixels(request.source, plan.width, plan.height, plan.source_fit))
            for request in requests
            if request.source is not None
        ]
        return [
            put_source_back(source, reconstruction, image)
            for source, reconstruction, image in zip(sources, self.decode(conditioning.source), images, strict=True)
        ]

    @contextmanager
    def _denoising(self) -> Generator[None]:
        """Keeps the tensors of captured steps apart from those of the call whose callback this one is made in."""
        is_nested, self._is_denoising = self._is_denoising, True
        if is_nested and self._cuda_graphs is not None:
            self._cuda_graphs.clear()
        try:
            yield
        finally:
            self._is_denoising = is_nested

    def plan(self, requests: Sequence[ResolvedRequest], params: SamplingParams) -> SamplingPlan:
        """What it takes to make a batch of requests.

        Args:
            requests: All of one task.
            params: How to sample.

        Raises:
            InputError: A request or a parameter cannot be used with this model, on this engine, or in this memory.
        """
        plan = plan_sampling(requests, params, self.config, self.engine.limits, self.engine.precision)
        if self.memory is not None:
            self.memory.check_run(_sizes(requests, plan, self.config))
        return plan

    def encode_conditioning(
        self, requests: Sequence[ResolvedRequest], plan: SamplingPlan, warn: Callable[[str], None]
    ) -> Conditioning:
        """What a batch of requests is conditioned on; encoded prompts and images are taken from the cache.

        Args:
            requests: The batch.
            plan: Theirs.
            warn: Gets a sentence for each prompt that was cut.

        Raises:
            InputError: The tokenizer is not the model's.
        """
        source = None if plan.task == "subject" else self.condition_encoder.encode_sources(requests, plan)
        prompts = self.condition_encoder.encode_prompts(requests, plan, warn)
        has_text = np.repeat([branch.text for branch in plan.branches], len(requests))  # [R], branch-major
        text_states = array_namespace(prompts.text_states).concat([prompts.text_states] * len(plan.branches))
        return Conditioning(
            source=source,
            cross_kv=self.runner.run("conditioner", text_states=text_states, has_text=self.engine.array(has_text)),
            text_mask=self.engine.array(np.tile(prompts.text_mask, (len(plan.branches), 1))),
        )

    def schedule_rows(self, plan: SamplingPlan, like: Array) -> Array:
        """A plan's schedule with timesteps as the engine takes them, float32 [steps,6+E] on the device of `like`."""
        return schedule_rows(plan.schedule, like, self.runner.embed_timesteps)

    def decode(self, latents: Array) -> list[Image.Image]:
        """Images of scaled latents, float32 [B,c,h,w].

        Raises:
            NotFiniteError: The model overflowed.
        """
        pixels = self.runner.run("vae_decoder", latents=latents / self.config.vae.scale)
        return [to_image(image) for image in to_numpy(pixels)]

    def captured(self, function: C) -> C:
        """The same function, captured as CUDA graphs where the pipeline does that; see `CudaGraphRunner.captured`.

        Args:
            function: Runs the denoiser, and no other graph.
        """
        return function if self._cuda_graphs is None else cast("C", self._cuda_graphs.captured(function))

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs that are merged into the weights."""
        return tuple(self._loras)

    @_in_turn
    def load_lora_weights(self, path: str | Path, *, scale: float = 1.0) -> None:
        """Merge a LoRA into the weights, beside those that were loaded before (engine pytorch).

        Examples:
            >>> pipe = MigePipeline.from_pretrained(engine="pytorch")
            >>> pipe.load_lora_weights("my-frog", scale=0.8)

        Args:
            path: The file that `mige-rt train-lora` wrote, or its folder.
            scale: What the LoRA's change of the weights is multiplied by.

        Raises:
            NotAvailableError: The engine is another one, whose weights are fixed.
            InputError: The LoRA cannot be read, or is of another model; nothing is changed then.
        """
        self._set_loras([*self._loras, Lora(Path(path), scale)])

    @_in_turn
    def unload_lora_weights(self) -> None:
        """Take all LoRAs out of the weights again."""
        if self._loras:
            self._set_loras([])

    def _set_loras(self, loras: list[Lora]) -> None:
        engine = lora_engine(self.engine)
        self.clear_cache()  # first, since captured steps read the weights where they lie
        engine.set_loras(loras)
        self._loras = loras

    @property
    def max_batch_size(self) -> int:
        """How many images `generate` makes at once at most."""
        limit = self.engine.limits.get("B")
        return sys.maxsize if limit is None else limit.max

    @_in_turn
    def clear_cache(self) -> None:
        """Drop the encoded prompts and images that are cached, and captured CUDA graphs."""
        self.condition_encoder.clear_cache()
        if self._cuda_graphs is not None:
            self._cuda_graphs.clear()


def resolve_call(  # noqa: PLR0913, the arguments of a call
    prompt: object,
    images: object,
    source: object,
    *,
    seed: object = None,
    generator: object = None,
    num_images_per_prompt: int = 1,
    task: Task | None = None,
    edit_scope: EditScope = "local",
) -> list[list[ResolvedRequest]]:
    """The requests that the arguments of `MigePipeline.__call__` come to: for each prompt one for each image.

    Args:
        prompt: See there.
        images: See there.
        source: See there.
        seed: See there.
        generator: See there.
        num_images_per_prompt: See there.
        task: See there.
        edit_scope: See there.

    Raises:
        InputError: They do not fit together, or one cannot be used.
    """
    batch = _Batch.of(prompt, images, source)
    if edit_scope not in get_args(EditScope):
        raise InputError(f"edit_scope is {edit_scope!r}; it is one of {', '.join(get_args(EditScope))}")
    if num_images_per_prompt < 1:
        raise InputError(f"num_images_per_prompt is {num_images_per_prompt}; 1 or more is expected")
    seeds = _seeds(seed, generator, len(batch.prompts), num_images_per_prompt)
    requests = [resolve(request, edit_scope) for request in batch.requests(task)]
    return [
        [replace(request, seed=image_seed) for image_seed in row] for request, row in zip(requests, seeds, strict=True)
    ]


def _sizes(requests: Sequence[ResolvedRequest], plan: SamplingPlan, config: ModelConfig) -> dict[str, int]:
    """The sizes of the axes that a batch has."""
    factor = config.vae.factor
    return {
        "B": len(requests),
        "R": len(plan.branches) * len(requests),
        "N": max(1, sum(len(request.used_images) for request in requests)),
        "h": plan.height // factor,
        "w": plan.width // factor,
    }


@dataclass(frozen=True)
class _Batch:
    """The arguments of a call, one entry for each prompt; images are normalized."""

    prompts: list[str]
    images: list[tuple[Image.Image, ...]]
    sources: list[Image.Image | None]

    @staticmethod
    def of(prompt: object, images: object, source: object) -> "_Batch":
        """Raises InputError when they are not as many as the prompts, or are no Pillow images."""
        if isinstance(prompt, str):
            prompts, per_prompt, sources = [prompt], [images or ()], [source]
        else:
            prompts = list(cast("Sequence[str]", prompt))
            per_prompt = list(cast("Sequence[object]", images or [()] * len(prompts)))
            is_one = source is None or isinstance(source, Image.Image)
            sources = [source] * len(prompts) if is_one else list(cast("Sequence[object]", source))
        if not prompts or not len(prompts) == len(per_prompt) == len(sources):
            raise InputError(
                f"{len(prompts)} prompts, {len(per_prompt)} lists of images and {len(sources)} sources were given; "
                "give one of each for every prompt"
            )
        normalized: dict[int, Image.Image] = {}  # an image object that is given twice is one image
        return _Batch(
            prompts,
            [tuple(_normalized(image, normalized) for image in _image_list(entry)) for entry in per_prompt],
            [None if entry is None else _normalized(entry, normalized) for entry in sources],
        )

    def requests(self, task: Task | None) -> list[Request]:
        """One for each prompt, with seeds that are still to be given."""
        return [
            Request(prompt, images, source, task=task)
            for prompt, images, source in zip(self.prompts, self.images, self.sources, strict=True)
        ]


def _image_list(entry: object) -> Sequence[object]:
    if isinstance(entry, (str, Path, Image.Image)) or not isinstance(entry, Sequence):
        raise InputError(f"images is a list of Pillow images for each prompt; a {type(entry).__name__} was given")
    return cast("Sequence[object]", entry)


def _normalized(image: object, normalized: dict[int, Image.Image]) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise InputError(f"an image is a {type(image).__name__}; a Pillow image is expected, not a path or an array")
    if id(image) not in normalized:
        normalized[id(image)] = normalize_image(image)
    return normalized[id(image)]


def _seeds(seed: object, generator: object, prompts: int, images: int) -> list[list[int]]:
    """A seed for each image of each prompt."""
    if generator is not None:
        if seed is not None:
            raise InputError("both seed and generator were given; give one of them")
        if isinstance(generator, Sequence):
            generators = list(cast("Sequence[object]", generator))
        else:
            generators = [generator] * (prompts * images)
        if len(generators) != prompts * images:
            raise InputError(
                f"{len(generators)} generators were given for {prompts * images} images; give one, or one for each"
            )
        return [[_draw_seed(each) for each in generators[i * images : (i + 1) * images]] for i in range(prompts)]
    if seed is None:
        seed = secrets.randbelow(2**31)
    if isinstance(seed, Integral):
        return [[int(seed) + i * images + j for j in range(images)] for i in range(prompts)]
    firsts = list(cast("Sequence[int]", seed))
    if len(firsts) != prompts:
        raise InputError(f"{prompts} prompts and {len(firsts)} seeds were given; give one of each for every prompt")
    return [[int(first) + j for j in range(images)] for first in firsts]


def _draw_seed(generator: Any) -> int:
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(2**31))
    torch: Any = sys.modules.get("torch")  # whoever has such a generator has imported it
    if torch is None or not isinstance(generator, torch.Generator):
        raise InputError(f"generator is a {type(generator).__name__}; one of NumPy or of PyTorch is expected")
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))
