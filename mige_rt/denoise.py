"""The denoising loop, for NumPy and torch arrays alike.

B images, R batch = guidance branches x B, branch-major (entry = branch * B + image); c, h, w the latents' shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from engines.interface import Array, array_namespace, device
from mige_rt.guidance import Branch
from mige_rt.sampling_params import Approximations
from mige_rt.scheduler import SchedulerStep


class Denoiser(Protocol):
    """The graph `denoiser`, whichever engine runs it."""

    def __call__(
        self,
        *,
        latents: Array,  # float32 [R,c,h,w]
        source: Array,  # float32 [R,c,h,w], scaled; zeros where there is no source
        timestep: Array,  # float32 [R], or [R,E] as `Engine.embed_timesteps` gives it; expanded where all have the same
        cross_kv: Array,  # [2,depth,R,heads,L,head_dim]
        text_mask: Array,  # bool [R,L]
    ) -> Array:  # float32 [R,c,h,w]
        """One prediction."""
        ...


@dataclass(frozen=True)
class Conditioning:
    """What the images are conditioned on.

    Attributes:
        source: float32 [B,c,h,w], scaled latents; None where there is no source.
        cross_kv: [2,depth,R,heads,L,head_dim], the conditioner's.
        text_mask: bool [R,L]
    """

    source: Array | None
    cross_kv: Array
    text_mask: Array

    def with_own_cross_kv(self) -> "Conditioning":
        """The same with a copy of cross_kv, which an engine's next run may overwrite where it lies."""
        return replace(self, cross_kv=array_namespace(self.cross_kv).asarray(self.cross_kv, copy=True))


class LoopInputs(NamedTuple):
    """What does not change between steps: the conditions of each entry of the batch, and the weight of each branch."""

    source: Array  # float32 [R,c,h,w]
    cross_kv: Array  # [2,depth,R,heads,L,head_dim]
    text_mask: Array  # bool [R,L]
    weights: Array  # float32 [branches,1,1,1,1]

    def most_conditioned(self) -> "LoopInputs":
        """Those of the last branch alone, which has the most conditions, as the whole prediction."""
        xp, images = array_namespace(self.source), self.source.shape[0] // self.weights.shape[0]
        return LoopInputs(
            self.source[-images:],
            xp.concat([self.cross_kv[:, :, -images:]]),  # a contiguous copy
            self.text_mask[-images:],
            xp.ones_like(self.weights[-1:]),
        )


# (inputs, latents [B,c,h,w], data predicted at the step before [B,c,h,w], a schedule's row) -> (latents, data)
Step = Callable[[LoopInputs, Array, Array, Array], tuple[Array, Array]]

# (index of the step, latents after it) -> latents to go on with, or None for the same
OnStepEnd = Callable[[int, Array], Array | None]


def denoising_step(denoiser: Denoiser) -> Step:
    """One step of the loop as a function of arrays, all of which lie on the engine's device."""

    def step(inputs: LoopInputs, latents: Array, data_before: Array, row: Array) -> tuple[Array, Array]:
        prediction = predict(denoiser, inputs, latents, timestep_of(row))
        return solver_step(prediction, inputs.weights, latents, data_before, row)

    return step


def predict(denoiser: Denoiser, inputs: LoopInputs, latents: Array, timestep: Array) -> Array:
    """What the model predicts for every branch of guidance.

    Args:
        denoiser: The graph.
        inputs: What the images are conditioned on.
        latents: float32 [B,c,h,w]
        timestep: float32 [], or [E] as the engine embeds it.

    Returns:
        float32 [R,c,h,w]
    """
    xp = array_namespace(latents)
    return denoiser(
        latents=xp.concat([latents] * inputs.weights.shape[0]),
        source=inputs.source,
        timestep=xp.broadcast_to(timestep, (inputs.source.shape[0], *timestep.shape)),
        cross_kv=inputs.cross_kv,
        text_mask=inputs.text_mask,
    )


def guide(prediction: Array, weights: Array) -> Array:
    """The weighted sum of the branches' predictions.

    Args:
        prediction: float32 [R,c,h,w]
        weights: Of the branches, float32 [branches,1,1,1,1].

    Returns:
        float32 [B,c,h,w]
    """
    xp, branches = array_namespace(prediction), weights.shape[0]
    shape = (branches, prediction.shape[0] // branches, *prediction.shape[1:])
    return xp.sum(weights * xp.reshape(prediction, shape), axis=0)


def solver_step(
    prediction: Array, weights: Array, latents: Array, data_before: Array, row: Array
) -> tuple[Array, Array]:
    """What follows the model in a step: guidance, and the solver's update to the next time.

    Args:
        prediction: The model's, float32 [R,c,h,w].
        weights: Of the branches of guidance, float32 [branches,1,1,1,1].
        latents: float32 [B,c,h,w]
        data_before: The data predicted at the step before, float32 [B,c,h,w].
        row: Of the schedule, float32 [6+E].

    Returns:
        The latents and the predicted data, float32 [B,c,h,w] each.
    """
    scheduler = _by_name(row)
    data = scheduler.data_from_latents * latents + scheduler.data_from_prediction * guide(prediction, weights)
    return _advance(latents, data, data_before, scheduler), data


def loop_inputs(conditioning: Conditioning, branches: Sequence[Branch], noise: Array) -> LoopInputs:
    """What the loop needs besides latents and coefficients.

    Args:
        conditioning: Of B images.
        branches: Of guidance, in the order of the batch.
        noise: float32 [B,c,h,w]

    Raises:
        ValueError: A branch is conditioned on a source and there is none.
    """
    xp, source = array_namespace(noise), conditioning.source
    if source is None and any(branch.source for branch in branches):
        raise ValueError("a guidance branch sees a source image, but source is None")
    blank = xp.zeros_like(noise)
    return LoopInputs(
        source=xp.concat([source if branch.source else blank for branch in branches]),
        cross_kv=conditioning.cross_kv,
        text_mask=conditioning.text_mask,
        weights=_on_device([branch.weight for branch in branches], noise)[:, None, None, None, None],
    )


def schedule_rows(
    schedule: Sequence[SchedulerStep], like: Array, embed_timesteps: Callable[[Array], Array] | None = None
) -> Array:
    """A schedule as one array, whose rows a step copies with all that it needs of its time.

    Args:
        schedule: A step each.
        like: Whose library and device to use.
        embed_timesteps: The engine's, see `Engine.embed_timesteps`; None: its denoiser embeds them itself, every step.

    Returns:
        float32 [steps,6+E]: the coefficients, then the timestep's embedding of E numbers, if it is embedded here.
    """
    coefficients = _on_device([tuple(step) for step in schedule], like)
    timesteps = coefficients[:, SchedulerStep._fields.index("timestep")]
    embedded = timesteps if embed_timesteps is None else embed_timesteps(timesteps)
    return coefficients if len(embedded.shape) == 1 else array_namespace(like).concat([coefficients, embedded], axis=1)


def timestep_of(row: Array) -> Array:
    """What a row [6+E] of `schedule_rows` gives the denoiser: the timestep, [], or its embedding, [E]."""
    coefficients = len(SchedulerStep._fields)
    return row[coefficients:] if row.shape[0] > coefficients else _by_name(row).timestep


def denoise(
    step: Step,
    noise: Array,
    conditioning: Conditioning,
    branches: Sequence[Branch],
    schedule: Array,
    *,
    approximations: Approximations | None = None,
    on_step_end: OnStepEnd | None = None,
) -> Array:
    """From noise to latents.

    Args:
        step: `denoising_step`'s, or a captured one.
        noise: float32 [B,c,h,w]
        conditioning: Of the batch.
        branches: Of guidance, in the order of the batch.
        schedule: float32 [steps,6+E], see `schedule_rows`.
        approximations: What saves time; None: nothing.
        on_step_end: Called after each step, which the device may still be at. The latents that it gets may be
            overwritten by the next step.

    Returns:
        float32 [B,c,h,w], scaled latents.

    Raises:
        ValueError: A branch is conditioned on a source and there is none.
    """
    xp, approximations = array_namespace(noise), approximations or Approximations()
    all_branches = loop_inputs(conditioning, branches, noise)
    steps = schedule.shape[0]
    first, last = (share * steps for share in approximations.guidance_range)
    everywhere = len(branches) == 1 or (first <= 0 and last >= steps)
    one_branch = all_branches if everywhere else all_branches.most_conditioned()

    latents, data, last_evaluated = noise, xp.zeros_like(noise), None
    for i in range(steps):
        is_last = i == steps - 1
        if last_evaluated is not None and not is_last and _change(latents, last_evaluated) < approximations.reuse:
            latents = _advance(latents, data, data, _by_name(schedule[i]))
        else:
            if approximations.reuse:
                last_evaluated = xp.asarray(latents, copy=True)
            inputs = all_branches if first <= i < last else one_branch
            latents, data = step(inputs, latents, data, schedule[i])
        if on_step_end is not None:
            replacement = on_step_end(i, latents)
            latents = latents if replacement is None else replacement
    return latents


def _on_device(values: Sequence[Any], like: Array) -> Array:
    xp = array_namespace(like)
    return xp.asarray(values, dtype=xp.float32, device=device(like))


def _by_name(row: Array) -> SchedulerStep:
    """The coefficients in a row [6+E] of the schedule on the device as scalars on the device, by name."""
    return SchedulerStep(*(row[i] for i in range(len(SchedulerStep._fields))))


def _advance(latents: Array, data: Array, data_before: Array, scheduler: SchedulerStep) -> Array:
    """The solver's update to the next time, from the data predicted now and at the step before."""
    return scheduler.keep * latents + scheduler.current * data + scheduler.previous * data_before


def _change(latents: Array, before: Array) -> float:
    """How far the latents are from what they were, relative to their mean magnitude. Waits for the device."""
    xp = array_namespace(latents)
    return float(xp.mean(xp.abs(latents - before)) / xp.mean(xp.abs(before)))
