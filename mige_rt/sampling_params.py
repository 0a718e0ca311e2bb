"""How images are sampled: what the user asked for."""

from dataclasses import dataclass

from mige_rt.config import ModelConfig, SchedulerName, TaskDefaults
from mige_rt.errors import InputError
from mige_rt.image_size import Fit
from mige_rt.instruction import Task

DEFAULT_SCHEDULER: SchedulerName = "dpm_solver_pp_2m"  # the published one


@dataclass(frozen=True)
class Approximations:
    """What saves time and changes the image a little; by default nothing does.

    Attributes:
        guidance_range: Guidance is computed in this part of the steps alone, from a first to a last share of them
            (Kynkaanniemi et al., 2024); in the others the most conditioned branch counts alone.
        reuse: The data predicted at the last step that ran the model serve on until the latents have changed by this
            share of their mean magnitude (TeaCache, Liu et al., 2024, on the denoiser as a whole).
    """

    guidance_range: tuple[float, float] = (0.0, 1.0)
    reuse: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How images are sampled. None is the model's default for the task, unless another one is named.

    Attributes:
        num_inference_steps: Of the scheduler, 2 to 1000.
        guidance_scale: How strongly the text counts; 1 is no guidance.
        image_guidance_scale: How strongly the source counts; without a source it has no effect.
        width: Of the image in pixels, a multiple of `ModelConfig.multiple`; None: the trained size.
        height: The same.
        fit: How images of another shape are fitted, see `preprocessing.vae_pixels`. aspect: the image takes the
            source's shape, and no width or height may be given. None is the published way: crop, but references of
            generation are padded.
        scheduler: None: the published one, dpm_solver_pp_2m.
        guidance_range: See `Approximations`; None: all steps.
        reuse: See `Approximations`; None: never.
        paste_back: Put the source's own pixels where an edit has changed nothing (`mige_rt.paste_back`); without a
            source it has no effect.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    fit: Fit | None = None
    scheduler: SchedulerName | None = None
    guidance_range: tuple[float, float] | None = None
    reuse: float | None = None
    paste_back: bool = False

    def approximations(self) -> Approximations:
        """What saves time.

        Raises:
            InputError: The range is no part of 0 to 1, or the threshold is not from 0 to below 1.
        """
        first, last = self.guidance_range or (0.0, 1.0)
        if not 0 <= first < last <= 1:
            raise InputError(
                f"the guidance range is {first} to {last}; a part of 0 to 1 is expected, such as 0.1 to 0.8"
            )
        reuse = 0.0 if self.reuse is None else self.reuse
        if not 0 <= reuse < 1:
            raise InputError(f"the threshold of reuse is {reuse}; 0 (none) to 1 is expected, such as 0.05")
        return Approximations((first, last), reuse)

    def with_defaults(self, config: ModelConfig, task: Task) -> "ResolvedParams":
        """What the model and the task decide is filled in."""
        of_task: dict[Task, TaskDefaults] = {
            "subject": config.defaults.subject,
            "edit": config.defaults.edit,
            "compose": config.defaults.compose,
        }
        defaults, steps = of_task[task], self.num_inference_steps
        text, image = self.guidance_scale, self.image_guidance_scale
        return ResolvedParams(
            num_inference_steps=defaults.num_inference_steps if steps is None else steps,
            guidance_scale=defaults.guidance_scale if text is None else text,
            image_guidance_scale=defaults.image_guidance_scale if image is None else image,
            scheduler=self.scheduler or DEFAULT_SCHEDULER,
            width=self.width,
            height=self.height,
            fit=self.fit,
            guidance_range=self.guidance_range,
            reuse=self.reuse,
            paste_back=self.paste_back or None,
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedParams:
    """`SamplingParams` of which the model and the task have decided what was left open; None: as published."""

    num_inference_steps: int
    guidance_scale: float
    image_guidance_scale: float
    scheduler: SchedulerName
    width: int | None
    height: int | None
    fit: Fit | None
    guidance_range: tuple[float, float] | None
    reuse: float | None
    paste_back: bool | None
