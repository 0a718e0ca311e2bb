"""What the loop is conditioned on: text states of prompts with images, and source latents, each made once.

B images to make, N different images that prompts refer to, L tokens, D text width.
"""

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray
from PIL.Image import Image

from engines.interface import Array, array_namespace, device
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.graph_runner import GraphRunner
from mige_rt.image_size import Fit
from mige_rt.preprocessing import vae_pixels, vit_pixels
from mige_rt.prompt_tokens import TokenizedPrompt, collate, tokenize_prompt
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_plan import SamplingPlan
from mige_rt.tokenizer import Tokenize

CACHED_PROMPTS = 32  # text states
CACHED_LATENTS = 64  # of sources and references
LENGTH_MULTIPLE = 32  # tokens; on a GPU each length is captured, compiled or planned for by itself

Warn = Callable[[str], None]


@dataclass(frozen=True)
class PromptStates:
    """The text encoder's output for a batch of prompts.

    Attributes:
        text_states: [B,L,D]
        text_mask: bool [B,L], true on tokens.
    """

    text_states: Array
    text_mask: NDArray[np.bool_]


class ConditionEncoder:
    """Encodes prompts and sources with an engine's graphs, and caches the last ones by their content."""

    def __init__(self, config: ModelConfig, tokenize: Tokenize, runner: GraphRunner) -> None:
        """Prepare to encode.

        Args:
            config: The model's.
            tokenize: Its tokenizer.
            runner: Of its graphs.
        """
        self.config, self.tokenize, self.runner = config, tokenize, runner
        self.length_multiple = 1 if runner.engine.device == "cpu" else LENGTH_MULTIPLE
        self._prompts: LRUCache[Hashable, Array] = LRUCache(CACHED_PROMPTS)  # [length,D] each
        self._latents: LRUCache[Hashable, Array] = LRUCache(CACHED_LATENTS)  # [c,h,w] each

    def clear_cache(self) -> None:
        """Drop all that is cached."""
        self._prompts.clear()
        self._latents.clear()

    def encode_sources(self, requests: Sequence[ResolvedRequest], plan: SamplingPlan) -> Array:
        """The sources' scaled latents, [B,c,h,w]."""
        sources = [request.source for request in requests if request.source is not None]
        return self._encode_images(sources, plan.width, plan.height, plan.source_fit) * self.config.vae.scale

    def encode_prompts(self, requests: Sequence[ResolvedRequest], plan: SamplingPlan, warn: Warn) -> PromptStates:
        """The prompts' text states; only those that are not cached are encoded, each different image once.

        Args:
            requests: The batch.
            plan: Says how references are fitted.
            warn: Gets a sentence for each prompt that was cut.

        Raises:
            InputError: The tokenizer is not the model's.
        """
        prompts = [self._tokenize(request, warn) for request in requests]
        keys: list[Hashable] = [
            (request.text, plan.reference_fit, *map(_digest, request.used_images)) for request in requests
        ]
        states: dict[Hashable, Array] = {key: self._prompts[key] for key in keys if key in self._prompts}
        missing = {
            key: (request, prompt)
            for key, request, prompt in zip(keys, requests, prompts, strict=True)
            if key not in states
        }
        if missing:
            encoded = self._encode(list(missing.values()), plan.reference_fit)
            for i, (key, (_, prompt)) in enumerate(missing.items()):
                states[key] = _copy(encoded[i, : len(prompt.token_ids)])  # an engine may overwrite its output
        self._prompts.update(states)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        length = self._padded_length(prompts)
        text_mask = np.arange(length)[None, :] < np.array(lengths)[:, None]
        return PromptStates(_padded([states[key] for key in keys], length), text_mask)

    def _array(self, values: NDArray[Any]) -> Array:
        return self.runner.engine.array(values)

    def _encode_images(self, images: Sequence[Image], width: int, height: int, fit: Fit) -> Array:
        """The VAE's unscaled latents, [N,c,h,w]; each different image that is not cached is encoded once."""
        keys: list[Hashable] = [(_digest(image), width, height, fit == "pad") for image in images]
        latents: dict[Hashable, Array] = {key: self._latents[key] for key in keys if key in self._latents}
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in latents}
        if missing:
            pixels = [vae_pixels(image, width, height, fit) for image in missing.values()]
            encoded = self.runner.run("vae_encoder", pixels_vae=self._array(np.stack(pixels)))
            latents |= {key: _copy(encoded[i]) for i, key in enumerate(missing)}  # an engine may overwrite its output
        self._latents.update(latents)
        return array_namespace(*latents.values()).stack([latents[key] for key in keys])

    def _padded_length(self, prompts: Sequence[TokenizedPrompt]) -> int:
        """L of these prompts: the longest one's, or the next multiple, as far as model and graphs take it."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        limit = self.runner.engine.limits.get("L")
        most = self.config.max_tokens if limit is None else min(limit.max, self.config.max_tokens)
        return max(longest, min(-(-longest // self.length_multiple) * self.length_multiple, most))

    def _tokenize(self, request: ResolvedRequest, warn: Warn) -> TokenizedPrompt:
        """The prompt as tokens, whose slots count its own images alone."""
        config = self.config
        images = range(len(request.used_images))
        prompt = tokenize_prompt(request.text, images, self.tokenize, config.qformer.queries, config.max_tokens)
        if prompt.token_ids.max() >= config.text.vocabulary:
            raise InputError(
                f"the prompt has the token {prompt.token_ids.max()} and the model knows {config.text.vocabulary}: "
                "the tokenizer is another model's; convert the model again with its own"
            )
        cut_after = prompt.cut_after or request.cut_after
        if cut_after is not None:
            warn(f"the prompt is too long and was cut after: ...{cut_after}")
        return prompt

    def _encode(self, prompts: Sequence[tuple[ResolvedRequest, TokenizedPrompt]], fit: Fit) -> Array:
        """text_states [B,L,D] of prompts; each different image that they refer to is encoded once."""
        config, queries = self.config, self.config.qformer.queries
        images: dict[bytes, Image] = {}
        for request, prompt in prompts:
            slots = prompt.slot_index.max(initial=-1) // queries + 1  # a cut may have left fewer than there are images
            images |= {_digest(image): image for image in request.used_images[:slots]}
        index = {digest: i for i, digest in enumerate(images)}
        token_ids, slot_index, text_mask = collate(
            [replace(prompt, slot_index=_batch_slots(request, prompt, index, queries)) for request, prompt in prompts],
            self._padded_length([prompt for _, prompt in prompts]),
        )
        if images:
            ref_latents = self._encode_images([*images.values()], config.size, config.size, fit)
            pixels = [vit_pixels(image, config.vision.side) for image in images.values()]
            image_tokens = self.runner.run(
                "image_encoder", pixels_vit=self._array(np.stack(pixels)), ref_latents=ref_latents
            )
        else:
            image_tokens = self._array(np.zeros((1, queries, config.text.width), np.float32))
        return self.runner.run(
            "text_encoder",
            token_ids=self._array(token_ids),
            image_tokens=image_tokens,
            slot_index=self._array(slot_index),
            text_mask=self._array(text_mask),
        )


def _batch_slots(
    request: ResolvedRequest, prompt: TokenizedPrompt, index: Mapping[bytes, int], queries: int
) -> NDArray[np.int64]:
    """A prompt's slot index with slots of the whole batch's images. index: an image's place in the batch, by digest."""
    slots = prompt.slot_index
    places = np.array([*(index.get(_digest(image), 0) for image in request.used_images), 0])
    return np.where(slots >= 0, places[slots // queries] * queries + slots % queries, -1)


def _padded(states: Sequence[Array], length: int) -> Array:
    """[length,D] of several lengths -> [B,length,D], with zeros at the end."""
    xp = array_namespace(*states)
    padded: list[Array] = []
    for state in states:
        zeros = xp.zeros((length - state.shape[0], state.shape[1]), dtype=state.dtype, device=device(state))
        padded.append(xp.concat([state, zeros]))
    return xp.stack(padded)


def _digest(image: Image) -> bytes:
    return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).digest()


def _copy(values: Array) -> Array:
    return array_namespace(values).asarray(values, copy=True)
