"""`MigePipeline` by the conventions of diffusers' `DiffusionPipeline`."""

# diffusers' types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image

from mige_rt.atomic import atomic_folder
from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.diffusers.model import MigeModel, default_scheduler, denoise
from mige_rt.errors import InputError, NotFiniteError
from mige_rt.hub import local_folder
from mige_rt.image_size import Fit
from mige_rt.instruction import EditScope, Task
from mige_rt.pipeline import resolve_call
from mige_rt.sampling_params import SamplingParams

OutputType = Literal["pil", "np", "pt", "latent"]
CallbackOnStepEnd = Callable[["MigePipeline", int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]

SCHEDULER = "scheduler"  # the folder of its config, as in diffusers' repositories


class MigePipeline(DiffusionPipeline):
    """MIGE with diffusers' schedulers, outputs and callbacks.

    Examples:
        >>> from diffusers import DDIMScheduler
        >>> from mige_rt.diffusers import MigePipeline
        >>> pipe = MigePipeline.from_pretrained().to("cpu")
        >>> pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        >>> image = pipe("a red apple", generator=torch.Generator().manual_seed(0)).images[0]

    Attributes:
        mige: The model on its engine.
        scheduler: Any scheduler of diffusers for noise or v prediction.
    """

    def __init__(self, mige: MigeModel, scheduler: SchedulerMixin) -> None:
        """Assemble a pipeline from components; `from_pretrained` opens them from a folder."""
        super().__init__()
        self.register_modules(mige=mige, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=mige.config.vae.factor)
        self._interrupt = False
        self._num_timesteps = 0
        self.mige: MigeModel
        self.scheduler: Any

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path = DEFAULT_MODEL,
        *,
        scheduler: SchedulerMixin | None = None,
        torch_dtype: torch.dtype | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> "MigePipeline":
        """Open a model on the CPU; `to` moves it.

        Args:
            pretrained_model_name_or_path: A bundle, a model folder, a folder that `save_pretrained` made, or a
                repository on the Hugging Face hub that holds one. Default: the small model that comes with mige-rt.
            scheduler: Instead of the one that the folder names, or `default_scheduler`.
            torch_dtype: What to compute in: float32, float16 or bfloat16; None: a bundle's own.
            local_files_only: Do not download.
            options: The other arguments of `mige_rt.MigePipeline.from_pretrained`: `engine`, `device`, `trust`, ...

        Raises:
            InputError: The folder holds no model, or names no scheduler of diffusers.
        """
        folder = local_folder(pretrained_model_name_or_path, local_files_only=local_files_only)
        mige = MigeModel.from_pretrained(folder, torch_dtype=torch_dtype, **options)
        return cls(mige, scheduler or _load_scheduler(folder) or default_scheduler(mige.config))

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, **kwargs: Any
    ) -> None:
        """Copy the model, and write the scheduler's config and `model_index.json` beside it, whole or not at all.

        What is written is a bundle or a model folder, too, which `mige-rt run --model` opens.

        Args:
            save_directory: The folder to make.
            kwargs: diffusers' further arguments; `push_to_hub` is refused, use `mige-rt push`.

        Raises:
            InputError: The folder exists, or cannot be written.
        """
        if kwargs.get("push_to_hub"):
            raise InputError("push_to_hub was given; push a bundle with: mige-rt push BUNDLE OWNER/NAME")
        with atomic_folder(Path(save_directory)) as folder:
            self.mige.copy_to(folder)
            self.scheduler.save_pretrained(folder / SCHEDULER)
            self.save_config(folder)

    def to(self, *args: Any, **kwargs: Any) -> "MigePipeline":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move the model: `to("cuda")`, `to(torch.float16)`, `to("cuda", torch.float16)`, `to(device=..., dtype=...)`.

        Raises:
            InputError: There is no such device, or precision.
        """
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for argument in args:
            if isinstance(argument, torch.dtype):
                dtype = argument
            else:
                device = argument
        self.mige.to(device, dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.mige.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.mige.dtype

    @property
    def interrupt(self) -> bool:
        """Whether the loop ends after the step that it is at; a callback sets `_interrupt`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """How many steps the last call took."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(  # noqa: PLR0913, diffusers' way to sample
        self,
        prompt: str | Sequence[str],
        images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None = None,
        source: Image.Image | Sequence[Image.Image | None] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: CallbackOnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        fit: Fit | None = None,
        edit_scope: EditScope = "local",
        task: Task | None = None,
    ) -> Any:
        """Make images; arguments that are not described here are those of `mige_rt.MigePipeline.__call__`.

        Args:
            prompt: See there; so `images` and `source`.
            images: The same.
            source: The same.
            height: In pixels.
            width: In pixels.
            num_inference_steps: Of the scheduler.
            guidance_scale: See there.
            image_guidance_scale: See there.
            num_images_per_prompt: How many images of each prompt.
            generator: The seed of each image is drawn from it, as in `mige_rt.MigePipeline`; or a list with one for
                each image.
            latents: float32 [images,c,h,w], standard normal, instead of the noise of the seeds.
            output_type: `pil`; `np`: float32 [images,H,W,3], 0 to 1; `pt`: [images,3,H,W], 0 to 1; `latent`: scaled
                latents [images,c,h,w].
            return_dict: False: a tuple with the images.
            callback_on_step_end: Called after each step with the pipeline, the index of the step, its timestep and the
                tensors named next; may return a dict with `latents` to go on with, and set `pipe._interrupt`.
            callback_on_step_end_tensor_inputs: `latents` is the only one.
            fit: See there.
            edit_scope: See there.
            task: See there.

        Returns:
            An `ImagePipelineOutput` with `images`; a tuple with them where `return_dict` is false.

        Raises:
            InputError: An argument cannot be used.
            NotFiniteError: The model overflowed.
        """
        if output_type not in get_args(OutputType):
            raise InputError(f"output_type is {output_type!r}; it is one of {', '.join(get_args(OutputType))}")
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise InputError(
                f"callback_on_step_end_tensor_inputs is {list(callback_on_step_end_tensor_inputs)}; ['latents'] is "
                "expected"
            )
        resolved = resolve_call(
            prompt,
            images,
            source,
            generator=generator,
            num_images_per_prompt=num_images_per_prompt,
            task=task,
            edit_scope=edit_scope,
        )
        requests = [request for of_prompt in resolved for request in of_prompt]
        params = SamplingParams(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            width=width,
            height=height,
            fit=fit,
        )
        if latents is not None and len(latents) != len(requests):
            raise InputError(f"latents for {len(latents)} images were given, and {len(requests)} are to be made")
        self._interrupt = False
        at_once = min(self.mige.engine_pipeline.max_batch_size, len(requests))
        parts: list[torch.Tensor] = []
        progress_bar: Any = self.progress_bar
        for first in range(0, len(requests), at_once):
            encoded = self.mige.encode(requests[first : first + at_once], params)
            start = None if latents is None else latents[first : first + at_once]
            with progress_bar(total=encoded.num_inference_steps) as bar:

                def on_step(
                    i: int, timestep: torch.Tensor, latents: torch.Tensor, bar: Any = bar
                ) -> torch.Tensor | None:
                    bar.update()
                    self._num_timesteps = i + 1
                    if callback_on_step_end is not None:
                        tensors = {name: latents for name in callback_on_step_end_tensor_inputs}
                        changes = callback_on_step_end(self, i, timestep, tensors) or {}
                        latents = changes.get("latents", latents)
                    return None if self._interrupt else latents

                result = denoise(self.mige, encoded, self.scheduler, start, on_step)
            parts.append(result if output_type == "latent" else self.mige.decode(result))
        values = torch.cat(parts)
        if not torch.isfinite(values).all():
            raise NotFiniteError("the model overflowed: there are NaN or infinite values; try smaller scales, or fp32")
        output: Any = values if output_type == "latent" else self.image_processor.postprocess(values, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=output) if return_dict else (output,)


def _load_scheduler(folder: Path) -> SchedulerMixin | None:
    """The scheduler whose config `save_pretrained` wrote; None where there is none. Only diffusers' own are opened."""
    path = folder / SCHEDULER / "scheduler_config.json"
    if not path.is_file():
        return None
    try:
        name = str(json.loads(path.read_text(encoding="utf-8")).get("_class_name"))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}); save the pipeline again") from error
    kind: Any = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise InputError(f"{path} names {name!r}, which is no scheduler of diffusers; give one as scheduler=")
    opened: Any = kind.from_pretrained(folder, subfolder=SCHEDULER)
    return opened
