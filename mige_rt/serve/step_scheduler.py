"""Continuous batching: images of different requests advance together, one step of the denoising loop at a time.

An image enters at the next step after it came, and leaves with its last. Images in one call of the denoiser may be at
different timesteps, and have different numbers of guidance branches and prompts of different lengths; only their size
is the same. What an image is made of never depends on the others: each has its own schedule, guidance and noise, and
the denoiser computes each entry of its batch by itself.

B images, R entries of the denoiser's batch (an image's guidance branches lie together), L tokens.
"""

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from engines.interface import Array, Engine, array_namespace, device
from mige_rt.denoise import LoopInputs, loop_inputs, solver_step, timestep_of
from mige_rt.errors import InputError, NotFiniteError
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_plan import SamplingPlan
from mige_rt.serve.options import Batching
from mige_rt.serve.protocol import (
    Failed,
    Finished,
    ImageTask,
    PartialImage,
    Progress,
    Started,
    StepReport,
    TaskEvent,
    TokenUsage,
)

GroupKey = tuple[tuple[int, ...], str]  # shape of the latents, and the task's id where each has a call of its own


@dataclass(eq=False)
class _RunningImage:
    """An image between its first step and its last.

    Attributes:
        task: What was asked for.
        inputs: Of the denoiser for this image alone: B = 1, R = branches.
        schedule: float32 [steps,6+E], see `schedule_rows`.
        latents: float32 [1,c,h,w]
        data: float32 [1,c,h,w], predicted at the step before.
        usage: For the answer.
        step: Index of the next one.
    """

    task: ImageTask
    inputs: LoopInputs
    schedule: Array
    latents: Array
    data: Array
    usage: TokenUsage
    step: int = 0

    @property
    def branches(self) -> int:
        """Entries in the denoiser's batch."""
        return self.inputs.weights.shape[0]

    @property
    def steps(self) -> int:
        """Of the schedule."""
        return self.schedule.shape[0]

    def timesteps(self) -> Array:
        """Of each entry, float32 [branches], or [branches,E] as the engine embeds them."""
        timestep = timestep_of(self.schedule[self.step])
        return array_namespace(timestep).broadcast_to(timestep, (self.branches, *timestep.shape))

    def advance(self, prediction: Array) -> None:
        """Make a step. prediction: the denoiser's, float32 [branches,c,h,w]."""
        row = self.schedule[self.step]
        self.latents, self.data = solver_step(prediction, self.inputs.weights, self.latents, self.data, row)
        self.step += 1


class _EntryInputs(NamedTuple):
    """What does not change between steps, of each entry of the denoiser's batch, by the denoiser's names."""

    source: Array  # float32 [R,c,h,w]
    cross_kv: Array  # [2,depth,R,heads,L,head_dim]
    text_mask: Array  # bool [R,L]


class _Group:
    """Running images of one size, which one call of the denoiser takes."""

    def __init__(self) -> None:
        self.images: list[_RunningImage] = []
        self._batched_images: list[_RunningImage] = []
        self._batched_inputs: _EntryInputs | None = None

    @property
    def entries(self) -> int:
        """The batch that they take of the denoiser."""
        return sum(image.branches for image in self.images)

    def fixed_inputs(self) -> _EntryInputs:
        """Of the images in the group; made again when they are others."""
        if self._batched_inputs is None or self._batched_images != self.images:
            inputs = [image.inputs for image in self.images]
            xp, length = array_namespace(inputs[0].source), max(image.text_mask.shape[1] for image in inputs)
            self._batched_inputs = _EntryInputs(
                source=xp.concat([image.source for image in inputs]),
                cross_kv=xp.concat([_padded(image.cross_kv, 4, length) for image in inputs], axis=2),
                text_mask=xp.concat([_padded(image.text_mask, 1, length) for image in inputs]),
            )
            self._batched_images = [*self.images]
        return self._batched_inputs


class StepScheduler:
    """Advances the images of a pipeline's model together, first come first served.

    A waiting image starts at the next step when fewer than `max_batch` are running and its entries fit into the call
    for its size. None overtakes another. With static batching, it also waits until none is running that started before.
    Not safe for several threads.
    """

    def __init__(
        self,
        pipe: MigePipeline,
        max_batch: int,
        *,
        batching: Batching = "continuous",
        one_image_a_call: bool | None = None,
    ) -> None:
        """Prepare to make images.

        Args:
            pipe: Of the model.
            max_batch: How many images advance together at most; fewer where the engine's graphs take fewer.
            batching: `static`, as a server without steps would do it, is there to be measured; so is `none`, which is a
                `max_batch` of 1.
            one_image_a_call: Call the denoiser for each image by itself. None: where images in one call would change
                each other, and little is gained by it, see `images_change_each_other`.
        """
        self.pipe, self.max_batch = pipe, 1 if batching == "none" else max_batch
        self._static = batching == "static"
        limit = pipe.engine.limits.get("R")
        self._max_entries = sys.maxsize if limit is None else limit.max
        self._one_image_a_call = images_change_each_other(pipe.engine) if one_image_a_call is None else one_image_a_call
        self._waiting: deque[tuple[ImageTask, SamplingPlan]] = deque()
        self._groups: dict[GroupKey, _Group] = {}
        self._predict = pipe.captured(self._denoise)

    @property
    def running(self) -> int:
        """Images between their first step and their last."""
        return sum(len(group.images) for group in self._groups.values())

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self.running

    def submit(self, task: ImageTask) -> None:
        """Put an image at the end of the queue.

        Raises:
            InputError: It cannot be made with this model or on this engine.
        """
        plan = self.pipe.plan([task.request], task.params)
        if len(plan.branches) > self._max_entries:
            raise InputError(
                f"{len(plan.branches)} guidance branches are needed, and this model's graphs take {self._max_entries} "
                "entries; use guidance scales of 1"
            )
        self._waiting.append((task, plan))

    def cancel(self, task_id: str) -> None:
        """Drop an image, wherever it is; of one that is not there any more, nothing is done."""
        self._waiting = deque(entry for entry in self._waiting if entry[0].id != task_id)
        for group in self._groups.values():
            group.images = [image for image in group.images if image.task.id != task_id]

    def step(self) -> Iterator[TaskEvent | StepReport]:
        """Start what fits, and advance everything that is running by one step.

        Yields:
            What happens, when it happens: `Started` comes before any work on the image. The step goes on only as its
            events are taken; until they all are, nothing else may be called.
        """
        yield from self._start_waiting()
        self._groups = {key: group for key, group in self._groups.items() if group.images}
        batch_sizes = tuple(len(group.images) for group in self._groups.values())
        for group in self._groups.values():
            yield from self._advance(group)
        yield StepReport(batch_sizes)

    def _start_waiting(self) -> Iterator[TaskEvent]:
        if self._static and self.running:
            return
        while self._waiting and self.running < self.max_batch:
            task, plan = self._waiting[0]
            group = self._groups.setdefault((plan.noise.shape, task.id if self._one_image_a_call else ""), _Group())
            if group.entries + len(plan.branches) > self._max_entries:
                break
            self._waiting.popleft()
            yield Started(task.id)
            try:
                group.images.append(self._start(task, plan))
            except InputError as error:
                yield _failure(task, error)

    def _start(self, task: ImageTask, plan: SamplingPlan) -> _RunningImage:
        pipe = self.pipe
        noise = pipe.engine.array(plan.noise)
        xp = array_namespace(noise)
        conditioning = pipe.encode_conditioning([task.request], plan, _ignore).with_own_cross_kv()
        inputs = loop_inputs(conditioning, plan.branches, noise)
        patch = pipe.config.dit.patch
        tokens, image_tokens = inputs.text_mask.shape[1], len(task.request.used_images) * pipe.config.qformer.queries
        image_tokens = min(image_tokens, tokens)  # a prompt that is too long may be cut in an image
        usage = TokenUsage(tokens - image_tokens, image_tokens, (noise.shape[2] // patch) * (noise.shape[3] // patch))
        return _RunningImage(
            task, inputs, pipe.schedule_rows(plan, noise), noise, data=xp.zeros_like(noise), usage=usage
        )

    def _advance(self, group: _Group) -> list[TaskEvent]:
        """One step of a group in one call; images that end with it leave the group."""
        images, xp = group.images, array_namespace(group.images[0].latents)
        try:
            (prediction,) = self._predict(
                group.fixed_inputs(),
                xp.concat([image.latents for image in images for _ in range(image.branches)]),
                xp.concat([image.timesteps() for image in images]),
            )
        except InputError as error:
            group.images = []
            return [Failed(image.task.id, "server_error", str(error)) for image in images]
        events: list[TaskEvent] = []
        first = 0
        for image in images:
            image.advance(prediction[first : first + image.branches])
            first += image.branches
        group.images = []
        for image in images:
            if image.task.report_steps:
                events.append(Progress(image.task.id, image.step, image.steps))
            try:
                events += self._images_due(image)
            except InputError as error:
                events.append(_failure(image.task, error))
            else:
                group.images += [image] if image.step < image.steps else []
        return events

    def _denoise(self, inputs: _EntryInputs, latents: Array, timestep: Array) -> tuple[Array]:
        """The denoiser's prediction of each entry, float32 [R,c,h,w]."""
        return (self.pipe.runner.run("denoiser", latents=latents, timestep=timestep, **inputs._asdict()),)

    def _images_due(self, image: _RunningImage) -> list[TaskEvent]:
        """The last image, or a partial one, if the step just made calls for it.

        Raises:
            NotFiniteError: The model overflowed.
            InputError: The engine could not run the decoder.
        """
        if image.step == image.steps:
            return [Finished(image.task.id, self.pipe.decode(image.latents)[0], image.usage)]
        due = partial_image_steps(image.steps, image.task.partial_images)
        if image.step not in due:
            return []
        return [PartialImage(image.task.id, due.index(image.step), self.pipe.decode(image.data)[0])]


def images_change_each_other(engine: Engine) -> bool:
    """Whether an engine on the CPU computes an entry of the denoiser's batch differently beside others.

    In int8 the activations of a whole batch are scaled together; PyTorch chooses its kernels by the size of the batch.
    """
    return engine.precision == "int8" or (engine.name == "pytorch" and engine.device == "cpu")


def partial_image_steps(steps: int, partial_images: int) -> list[int]:
    """After how many steps each partial image is made: evenly spread, and fewer where there are too few steps."""
    due = {steps * (i + 1) // (partial_images + 1) for i in range(partial_images)}
    return sorted(due & set(range(1, steps)))


def _failure(task: ImageTask, error: InputError) -> Failed:
    """The client's fault if the model overflowed, as scales may be too large; `submit` has checked all the rest."""
    return Failed(task.id, "invalid_request" if isinstance(error, NotFiniteError) else "server_error", str(error))


def _padded(values: Array, axis: int, length: int) -> Array:
    """With zeros at the end of an axis up to a length; a mask's are false."""
    xp, shape = array_namespace(values), list(values.shape)
    shape[axis] = length - shape[axis]
    return xp.concat([values, xp.zeros(shape, dtype=values.dtype, device=device(values))], axis=axis)


def _ignore(sentence: str) -> None:
    """Warnings of a prompt that is cut would hold a part of it, and logs hold no prompts."""
