"""From requests to what the loop needs of them: encoded prompts and source latents, each made once.

B samples, N different pictures that prompts refer to, L tokens, D text width.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray
from PIL.Image import Image as Picture

from engines.interface import Array
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.images import Fit, cropped_share, vae_pixels, vit_pixels
from mige_rt.instruction import (
    EncodedPrompt,
    Tokenize,
    collate,
    compose_prompt,
    count_placeholders,
    encode_prompt,
    words_kept,
)
from mige_rt.requests import Resolved

KEPT = 32  # encoded prompts, and as many sources
CROP_WARNING = 0.1  # share of a picture cut away without a word

Run = Callable[..., Array]  # (graph, **inputs) -> the graph's first output
Warn = Callable[[str], None]


class Encoder:
    """Encodes prompts and sources with an engine's graphs, and remembers the last ones by their content."""

    def __init__(self, config: ModelConfig, tokenize: Tokenize, array: Callable[[NDArray], Array], run: Run) -> None:
        """array: `Engine.array`; run(graph, **inputs) gives the graph's first output."""
        self.config, self.tokenize, self.array, self.run = config, tokenize, array, run
        self._prompts: OrderedDict[tuple, Array] = OrderedDict()  # [length,D] each
        self._sources: OrderedDict[tuple, Array] = OrderedDict()  # [c,h,w] each

    def forget(self) -> None:
        """Drop all that is remembered."""
        self._prompts.clear()
        self._sources.clear()

    def prompts(self, batch: Sequence[Resolved], fit: Fit | None, warn: Warn) -> tuple[Array, NDArray[np.bool_]]:
        """text_states [B,L,D] and text_mask [B,L]; only prompts that are not remembered are encoded, and each different
        picture once. Raises InputError when the tokenizer is not the model's."""
        prepared = [self._prepare(request, fit, warn) for request in batch]
        keys = [key for key, _ in prepared]
        states = {key: self._prompts[key] for key in keys if key in self._prompts}
        missing = {
            key: (request, prompt)
            for request, (key, prompt) in zip(batch, prepared, strict=True)
            if key not in self._prompts
        }
        if missing:
            made = self._encode(list(missing.values()), fit)
            for i, (key, (_, prompt)) in enumerate(missing.items()):
                states[key] = _copy(made[i, : len(prompt.token_ids)])  # an engine may overwrite its output
        for key in keys:
            _remember(self._prompts, key, states[key])
        lengths = [len(prompt.token_ids) for _, prompt in prepared]
        mask = np.arange(max(lengths))[None, :] < np.array(lengths)[:, None]
        xp = array_namespace(*states.values())
        rows = []
        for key, length in zip(keys, lengths, strict=True):
            state = states[key]
            blank = xp.zeros((max(lengths) - length, state.shape[1]), dtype=state.dtype, device=device(state))
            rows.append(xp.concat([state, blank]))
        return xp.stack(rows), mask

    def sources(self, batch: Sequence[Resolved], width: int, height: int, fit: Fit | None) -> Array:
        """[B,c,h,w], scaled; only sources that are not remembered are encoded, and each different one once."""
        keys, missing = [], {}
        for request in batch:
            assert request.source is not None
            key = (_digest(request.source), width, height, fit or "crop")
            keys.append(key)
            if key not in self._sources:
                missing[key] = request.source
        found = {key: self._sources[key] for key in keys if key not in missing}
        if missing:
            pixels = [vae_pixels(source, width, height, fit or "crop") for source in missing.values()]
            latents = self.run("vae_encoder", pixels_vae=self.array(np.stack(pixels)))
            found |= {key: _copy(latents[i]) * self.config.vae.scale for i, key in enumerate(missing)}
        for key in keys:
            _remember(self._sources, key, found[key])
        return array_namespace(*found.values()).stack([found[key] for key in keys])

    def _prepare(self, request: Resolved, fit: Fit | None, warn: Warn) -> tuple[tuple, EncodedPrompt]:
        """What tells the prompt from others, and the prompt as tokens, whose slots count its own pictures alone."""
        config, how = self.config, _fit(request, fit)
        for image in request.images:
            if how == "crop":
                warn_of_crop(image, config.size, config.size, warn)
        text = compose_prompt(request.task, request.prompt)
        used = request.images[: count_placeholders(text)]  # the clean-up may cut some away with the words
        prompt = encode_prompt(text, range(len(used)), self.tokenize, config.qformer.queries, config.max_tokens)
        if prompt.token_ids.max() >= config.text.vocabulary:
            raise InputError(
                f"the prompt has the token {prompt.token_ids.max()} and the model knows {config.text.vocabulary}: "
                "the tokenizer is another model's; convert the model again with its own"
            )
        kept = prompt.kept or words_kept(request.prompt)
        if kept is not None:
            warn(f"the prompt is too long and was cut after: ...{kept}")
        return (text, how, *map(_digest, used)), prompt

    def _encode(self, missing: Sequence[tuple[Resolved, EncodedPrompt]], fit: Fit | None) -> Array:
        """text_states [B,L,D] of prompts; each different picture that they refer to is encoded once."""
        config, queries = self.config, self.config.qformer.queries
        index: dict[tuple[bytes, Fit], int] = {}
        vit: list[NDArray[np.float32]] = []
        vae: list[NDArray[np.float32]] = []
        placed = []
        for request, prompt in missing:
            how, rows = _fit(request, fit), []  # rows: of the batch's pictures, those that this prompt's slots speak of
            for image in request.images[: prompt.slot_index.max(initial=-1) // queries + 1]:
                key = (_digest(image), how)
                if key not in index:
                    index[key] = len(vit)
                    vit.append(vit_pixels(image, config.vision.side))
                    vae.append(vae_pixels(image, config.size, config.size, how))
                rows.append(index[key])
            own = prompt.slot_index
            slots = np.where(own >= 0, np.array([*rows, 0])[own // queries] * queries + own % queries, -1)
            placed.append(replace(prompt, slot_index=slots))
        token_ids, slot_index, text_mask = collate(placed)
        if vit:
            ref_latents = self.run("vae_encoder", pixels_vae=self.array(np.stack(vae)))
            image_tokens = self.run("image_encoder", pixels_vit=self.array(np.stack(vit)), ref_latents=ref_latents)
        else:
            image_tokens = self.array(np.zeros((1, queries, config.text.width), np.float32))
        return self.run(
            "text_encoder",
            token_ids=self.array(token_ids),
            image_tokens=image_tokens,
            slot_index=self.array(slot_index),
            text_mask=self.array(text_mask),
        )


def warn_of_crop(image: Picture, width: int, height: int, warn: Warn) -> None:
    """Say in one sentence that much of a picture is cut away, if so."""
    share = cropped_share(image.size, width, height)
    if share > CROP_WARNING:
        warn(
            f"{share:.0%} of a picture of {image.width}x{image.height} is cropped away for {width}x{height}; "
            "fit aspect keeps the source's shape, fit pad keeps all of every picture"
        )


def _fit(request: Resolved, fit: Fit | None) -> Fit:
    """How a request's references are fitted into the trained square."""
    return "crop" if fit == "crop" or (fit is None and request.task != "subject") else "pad"


def _digest(picture: Picture) -> bytes:
    return hashlib.sha256(repr((picture.mode, picture.size)).encode() + picture.tobytes()).digest()


def _copy(values: Array) -> Array:
    return array_namespace(values).asarray(values, copy=True)


def _remember(kept: OrderedDict[tuple, Array], key: tuple, value: Array) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > KEPT:
        kept.popitem(last=False)
