"""The baselines: the same pictures, made by a slower schedule from the same modules.

**As published** is what the authors' code does: the encoder runs again at every step, on four pictures a prompt whether
there are as many or not, and on 256 tokens; so do the projections of the text for cross-attention; and every guidance
branch is computed, also where its weight is zero. Cross-attention sees the real tokens alone, there as here. The VAE
runs once. **Encode once** is ours but for the branches, of which none is left out.

B samples, N pictures, R rows = B x guidance branches, L tokens, Q image tokens a picture.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray
from PIL.Image import Image as Picture

from engines.interface import Array, Engine, to_numpy
from engines.wrapper import EngineWrapper
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.guidance import Branch, branches
from mige_rt.instruction import Task
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams

PICTURE_SLOTS = 4  # pictures a prompt that the published code encodes, always


def all_branches(task: Task) -> list[Branch]:
    """The task's guidance branches, as at scales that leave none out; their weights are those scales'."""
    return branches(3.0, None if task == "subject" else 2.0)


class CountingEngine(EngineWrapper):
    """An engine, and how often each of its graphs was run."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.calls: Counter[str] = Counter()

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.calls[graph] += 1
        return self.engine.run(graph, inputs)


class AsPublished:
    """A pipeline's model run by the published schedule, or by ours with all branches (`encode_once`).

    `make` is the pipeline's own: words, pictures, noise, solver and guidance are prepared by the same code, and the
    schedule stands between it and its engine. calls: how often the last `make` ran each graph.
    """

    def __init__(self, pipe: MigePipeline, encode_once: bool = False) -> None:
        self.pipe, self.encode_once = pipe, encode_once
        self.calls: Counter[str] = Counter()

    def make(
        self,
        batch: Sequence[ResolvedRequest],
        settings: SamplingParams,
        on_step: Callable[[int, int], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> list[Picture]:
        """The pipeline's pictures but for rounding.

        Raises InputError as the pipeline does, and as published when a prompt has more than four pictures.
        """
        task = batch[0].task
        complete = self.pipe.complete(settings, task)
        assert complete.guidance_scale is not None
        kept = branches(complete.guidance_scale, None if task == "subject" else complete.image_guidance_scale)
        engine = CountingEngine(self.pipe.engine)
        self.calls = engine.calls
        schedule = _EncodeOnce if self.encode_once else _Published
        # A pipeline of its own, so that nothing is remembered from one picture to the next.
        pipe = MigePipeline(
            self.pipe.config,
            self.pipe.encoder.tokenize,
            schedule(engine, self.pipe.config, len(batch), kept, all_branches(task)),
            self.pipe.model_name,
        )
        return pipe.make(batch, settings, on_step, on_warning)


class _EncodeOnce(EngineWrapper):
    """An engine that computes every branch, though it is asked for those that count."""

    def __init__(
        self, engine: Engine, config: ModelConfig, samples: int, kept: Sequence[Branch], every: Sequence[Branch]
    ) -> None:
        super().__init__(engine)
        self.config, self.samples, self.every = config, samples, every
        conditions = [(row.text, row.source) for row in every]
        self._kept = [conditions.index((row.text, row.source)) for row in kept]
        self._source = next((i for i, row in enumerate(kept) if row.source), None)

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if graph == "conditioner":
            return {"cross_kv": self._condition(inputs["text_states"])}
        if graph == "denoiser":
            return {"prediction": self._denoise(inputs)}
        return self.engine.run(graph, inputs)

    def _branch(self, values: Array, number: int) -> Array:
        """The rows of one branch; rows are branch-major."""
        return values[number * self.samples : (number + 1) * self.samples]

    def _repeat(self, values: Array) -> Array:
        """The first branch's rows, for every branch."""
        return array_namespace(values).concat([self._branch(values, 0)] * len(self.every))

    def _condition(self, text_states: Array) -> Array:
        """text_states [R,L,D], or more rows, of which the first B count -> cross_kv of every branch"""
        has_text = np.repeat([row.text for row in self.every], self.samples)
        inputs = {"text_states": self._repeat(text_states), "has_text": self.array(has_text)}
        return self.engine.run("conditioner", inputs)["cross_kv"]

    def _denoise(self, inputs: Mapping[str, Array]) -> Array:
        """The denoiser's inputs for the branches that count, but cross_kv for every one -> the prediction of those"""
        xp = array_namespace(inputs["latents"])
        blank = xp.zeros_like(self._branch(inputs["latents"], 0))
        # Where no branch that counts sees the source, what the others see does not matter.
        source = blank if self._source is None else self._branch(inputs["source"], self._source)
        same = {name: self._repeat(inputs[name]) for name in ("latents", "timestep", "text_mask")}
        sources = xp.concat([source if row.source else blank for row in self.every])
        prediction = self.engine.run("denoiser", {**inputs, **same, "source": sources})["prediction"]
        return xp.concat([self._branch(prediction, number) for number in self._kept])


class _Published(_EncodeOnce):
    """An engine that puts the encoder off until the denoiser is asked for, and then runs it every time.

    What the pipeline is given for the encoder's outputs are zeros, which go nowhere.
    """

    _pictures: Mapping[str, Array] | None = None  # of the image encoder, N real ones
    _words: Mapping[str, Array] | None = None  # of the text encoder

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        text, dit = self.config.text, self.config.dit
        if graph == "image_encoder":
            self._pictures = inputs
            shape = (len(inputs["pixels_vit"]), self.config.qformer.queries, text.width)
            return {"image_tokens": self._zeros(shape)}
        if graph == "text_encoder":
            if (given := len(inputs["token_ids"])) != self.samples:
                raise InputError(
                    f"the batch of {self.samples} has {given} different prompts, and the published schedule encodes "
                    "each by itself: give prompts that differ"
                )
            self._words = self._pad(inputs)
            return {"text_states": self._zeros((*inputs["token_ids"].shape, text.width))}
        if graph == "conditioner":
            rows, length, _ = inputs["text_states"].shape
            return {"cross_kv": self._zeros((2, dit.depth, rows, dit.heads, length, dit.width // dit.heads))}
        if graph == "denoiser":
            assert self._words is not None
            words = dict(self._words)
            if self._pictures is not None:
                words["image_tokens"] = self.engine.run("image_encoder", self._pictures)["image_tokens"]
            text_states = self.engine.run("text_encoder", words)["text_states"]  # [B,256,D]
            cross_kv = self._condition(text_states[:, : inputs["text_mask"].shape[1]])
            return {"prediction": self._denoise({**inputs, "cross_kv": cross_kv})}
        return self.engine.run(graph, inputs)

    def _zeros(self, shape: tuple[int, ...]) -> Array:
        return self.array(np.zeros(shape, np.float32))

    def _pad(self, words: Mapping[str, Array]) -> dict[str, Array]:
        """The text encoder's inputs with as many tokens as the model has; four slots a prompt in place of the pictures.

        Every placeholder has a slot of its own, in the prompt's order; the others stand for blank pictures.
        """
        short = self.config.max_tokens - words["token_ids"].shape[1]
        token_ids, slot_index, text_mask = (to_numpy(words[name]) for name in ("token_ids", "slot_index", "text_mask"))
        if self._pictures is not None:
            slot_index, order = self._slots(slot_index)
            self._pictures = {name: self._with_blanks(values, order) for name, values in self._pictures.items()}
        pad = ((0, 0), (0, short))
        return {
            **words,
            "token_ids": self.array(np.pad(token_ids, pad)),
            "slot_index": self.array(np.pad(slot_index, pad, constant_values=-1)),
            "text_mask": self.array(np.pad(text_mask, pad)),
        }

    def _slots(self, slot_index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """slot_index [B,L] into N pictures -> the same into 4 B slots; and which picture each slot has, -1 for none."""
        queries = self.config.qformer.queries
        picture, token = np.divmod(slot_index, queries)  # of text: -1 and Q - 1
        starts = (slot_index >= 0) & (token == 0)
        slot = np.cumsum(starts, axis=1) - 1
        if (most := int(slot.max()) + 1) > PICTURE_SLOTS:
            raise InputError(
                f"a prompt has {most} pictures, and the published code takes at most {PICTURE_SLOTS}: give fewer, or "
                "leave the baseline out"
            )
        slot += PICTURE_SLOTS * np.arange(self.samples)[:, None]
        order = np.full(PICTURE_SLOTS * self.samples, -1, np.int64)
        order[slot[starts]] = picture[starts]
        return np.where(slot_index >= 0, slot * queries + token, -1), order

    def _with_blanks(self, values: Array, order: NDArray[np.int64]) -> Array:
        """values [N,...] in the order of the slots [4B,...]; a blank picture is zeros."""
        xp = array_namespace(values)
        extended = xp.concat([values, xp.zeros_like(values[:1])])
        return xp.take(extended, self.array(np.where(order < 0, len(values), order)), axis=0)
