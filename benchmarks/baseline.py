"""The baselines: the same images, made by a slower schedule from the same modules.

**As published** is what the authors' code does: the encoder runs again at every step, on four images and 256 tokens a
prompt, and every guidance branch is computed, also where its weight is zero. The VAE runs once on the source and once
on the references, also where they are the same. **Encode once** is ours, but no branch is left out.

B samples, N images, R rows = B x guidance branches, L tokens, Q image tokens an image.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray
from PIL.Image import Image

from engines.interface import Array, Engine, to_numpy
from engines.wrapper import EngineWrapper
from mige_rt.conditioning import ConditionEncoder
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GraphName
from mige_rt.guidance import Branch, branches
from mige_rt.instruction import Task
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams
from mige_rt.sampling_plan import SamplingPlan

IMAGE_SLOTS = 4  # images a prompt that the published code encodes, always


def all_branches(task: Task) -> list[Branch]:
    """The task's guidance branches, as at scales that leave none out; their weights are those scales'."""
    return branches(3.0, None if task == "subject" else 2.0)


class AsPublished:
    """A pipeline's model run by the published schedule, or by ours with all branches (`encode_once`).

    The same code, with the schedule between it and its engine.
    """

    def __init__(self, pipe: MigePipeline, encode_once: bool = False) -> None:
        self.pipe, self.encode_once = pipe, encode_once

    def generate(self, requests: Sequence[ResolvedRequest], params: SamplingParams) -> list[Image]:
        """The pipeline's images but for rounding. Raises InputError as it does, and when there are too many images."""
        task, config, tokenize = requests[0].task, self.pipe.config, self.pipe.condition_encoder.tokenize
        complete = params.with_defaults(config, task)
        needed = branches(complete.guidance_scale, None if task == "subject" else complete.image_guidance_scale)
        schedule = _EncodeOnce if self.encode_once else _Published
        engine = schedule(self.pipe.engine, config, len(requests), needed, all_branches(task))
        pipe = MigePipeline(config, tokenize, engine)  # of its own, so that nothing is remembered between images
        if not self.encode_once:
            pipe.condition_encoder = _EncodeSeparately(config, tokenize, pipe.runner)
        return pipe.generate(requests, params)


class _EncodeSeparately(ConditionEncoder):
    """Encodes a source again where it is a reference, too."""

    def encode_sources(self, requests: Sequence[ResolvedRequest], plan: SamplingPlan) -> Array:
        latents = super().encode_sources(requests, plan)
        self.clear_cache()
        return latents


class _EncodeOnce(EngineWrapper):
    """An engine that computes every branch, though it is asked for those that count."""

    def __init__(
        self, engine: Engine, config: ModelConfig, samples: int, needed: Sequence[Branch], every: Sequence[Branch]
    ) -> None:
        super().__init__(engine)
        self.config, self.samples, self.every = config, samples, every
        conditions = [(branch.text, branch.source) for branch in every]
        self._needed = [conditions.index((branch.text, branch.source)) for branch in needed]
        self._source = next((i for i, branch in enumerate(needed) if branch.source), None)
        self._cross_kv: Array | None = None  # of every branch

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if graph == "conditioner":
            self._condition(inputs["text_states"])
            assert self._cross_kv is not None
            rows = np.arange(len(self.every) * self.samples).reshape(len(self.every), -1)[self._needed].flatten()
            return {"cross_kv": array_namespace(self._cross_kv).take(self._cross_kv, self.array(rows), axis=2)}
        if graph == "denoiser":
            return {"prediction": self._denoise(inputs)}
        return self.engine.run(graph, inputs)

    def _branch(self, values: Array, number: int) -> Array:
        """The rows of one branch; rows are branch-major."""
        return values[number * self.samples : (number + 1) * self.samples]

    def _repeat(self, values: Array) -> Array:
        """The first branch's rows, for every branch."""
        return array_namespace(values).concat([self._branch(values, 0)] * len(self.every))

    def _condition(self, text_states: Array) -> None:
        """Keep the conditioner's cross_kv of every branch, from text_states [R,L,D] of which the first B count."""
        has_text = np.repeat([branch.text for branch in self.every], self.samples)
        inputs = {"text_states": self._repeat(text_states), "has_text": self.array(has_text)}
        self._cross_kv = self.engine.run("conditioner", inputs)["cross_kv"]

    def _denoise(self, inputs: Mapping[str, Array]) -> Array:
        """The prediction of the branches that count, from their inputs, but the kept cross_kv of every one."""
        assert self._cross_kv is not None
        xp = array_namespace(inputs["latents"])
        blank = xp.zeros_like(self._branch(inputs["latents"], 0))
        # Where no branch that counts sees the source, what the others see does not matter.
        source = blank if self._source is None else self._branch(inputs["source"], self._source)
        same = {name: self._repeat(inputs[name]) for name in ("latents", "timestep", "text_mask")}
        sources = xp.concat([source if branch.source else blank for branch in self.every])
        prediction = self.engine.run("denoiser", {**inputs, **same, "source": sources, "cross_kv": self._cross_kv})[
            "prediction"
        ]
        return xp.concat([self._branch(prediction, number) for number in self._needed])


class _Published(_EncodeOnce):
    """An engine that puts the encoder off until the denoiser is asked for, and then runs it every time.

    What the pipeline is given for the encoder's outputs are zeros, which go nowhere.
    """

    _image_inputs: Mapping[str, Array] | None = None  # of the image encoder
    _text_inputs: Mapping[str, Array] | None = None  # of the text encoder

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        text, dit = self.config.text, self.config.dit
        if graph == "image_encoder":
            self._image_inputs = inputs
            return {"image_tokens": self._zeros(inputs["pixels_vit"].shape[0], self.config.qformer.queries, text.width)}
        if graph == "text_encoder":
            if (prompts := inputs["token_ids"].shape[0]) != self.samples:
                raise InputError(f"the batch of {self.samples} has {prompts} different prompts: all must differ")
            self._text_inputs = self._pad(inputs)
            return {"text_states": self._zeros(*inputs["token_ids"].shape, text.width)}
        if graph == "conditioner":
            rows, length, _ = inputs["text_states"].shape
            return {"cross_kv": self._zeros(2, dit.depth, rows, dit.heads, length, dit.width // dit.heads)}
        if graph == "denoiser":
            assert self._text_inputs is not None
            text_inputs = dict(self._text_inputs)
            if self._image_inputs is not None:
                text_inputs["image_tokens"] = self.engine.run("image_encoder", self._image_inputs)["image_tokens"]
            text_states = self.engine.run("text_encoder", text_inputs)["text_states"]  # [B,256,D]
            self._condition(text_states[:, : inputs["text_mask"].shape[1]])
            return {"prediction": self._denoise(inputs)}
        return self.engine.run(graph, inputs)

    def _zeros(self, *shape: int) -> Array:
        return self.array(np.zeros(shape, np.float32))

    def _pad(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The text encoder's inputs with as many tokens as the model has, and four image slots a prompt.

        There is one for each placeholder, in the prompt's order; the others are for blank images.
        """
        token_ids, slot_index, text_mask = (to_numpy(inputs[name]) for name in ("token_ids", "slot_index", "text_mask"))
        pad = ((0, 0), (0, self.config.max_tokens - token_ids.shape[1]))
        if self._image_inputs is not None:
            slot_index, order = self._slots(slot_index)
            self._image_inputs = {name: self._with_blanks(values, order) for name, values in self._image_inputs.items()}
        padded = {"token_ids": np.pad(token_ids, pad), "text_mask": np.pad(text_mask, pad)}
        padded["slot_index"] = np.pad(slot_index, pad, constant_values=-1)
        return {**inputs, **{name: self.array(values) for name, values in padded.items()}}

    def _slots(self, slot_index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """slot_index [B,L] into N images -> the same into 4 B slots; and which image each slot has, -1 for none."""
        queries = self.config.qformer.queries
        image, token = np.divmod(slot_index, queries)  # of text: -1 and Q - 1
        starts = (slot_index >= 0) & (token == 0)
        slot = np.cumsum(starts, axis=1) - 1
        if (most := int(slot.max()) + 1) > IMAGE_SLOTS:
            raise InputError(f"a prompt has {most} images, and the published code takes at most {IMAGE_SLOTS}")
        slot += IMAGE_SLOTS * np.arange(self.samples)[:, None]
        order = np.full(IMAGE_SLOTS * self.samples, -1, np.int64)
        order[slot[starts]] = image[starts]
        return np.where(slot_index >= 0, slot * queries + token, -1), order

    def _with_blanks(self, values: Array, order: NDArray[np.int64]) -> Array:
        """Values [N,...] in the order of the slots [4B,...]; a blank image is zeros."""
        xp = array_namespace(values)
        extended = xp.concat([values, xp.zeros_like(values[:1])])
        return xp.take(extended, self.array(np.where(order < 0, values.shape[0], order)), axis=0)
