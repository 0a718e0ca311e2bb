"""Inputs that exported graphs are validated with, at shapes from the smallest to the largest.

They are random tensors, and what the project's samples give when the preceding graphs have run on them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from export.reference import Feed, run_reference
from mige_rt.config import ModelConfig
from mige_rt.graphs import GRAPHS, AxisRange, GraphName, axis_size, resolved_axes, split_axis
from mige_rt.instruction import compose_prompt
from mige_rt.preprocessing import vae_pixels, vit_pixels
from mige_rt.prompt_tokens import TokenizedPrompt, collate, tokenize_prompt
from mige_rt.requests import ResolvedRequest, read_requests
from mige_rt.scheduler import ALPHAS, SIGMAS, draw_noise
from mige_rt.tokenizer import Tokenize
from trainer.checkpoints.weights import Checkpoint

SAMPLES = Path(__file__).parent / "samples"  # requests.jsonl and its images
TIMESTEP = 600  # at which the real latents are noisy
SMALL_LENGTH = 48  # tokens of the larger of two small shapes: words and a part of an image

Sizes = dict[str, int]  # of the named axes


def sample_requests() -> list[ResolvedRequest]:
    """The requests that come with the project, two of each task."""
    return list(read_requests(SAMPLES / "requests.jsonl").values())


def shapes_of(
    graph: GraphName, config: ModelConfig, ranges: Mapping[str, AxisRange], *, small: bool
) -> dict[str, Sizes]:
    """The shapes that a graph is tried at, by what they are called; each is given by its named axes' sizes.

    Without `small` two: the smallest, and the next above it in every axis, but for text, which has SMALL_LENGTH
    tokens. Equal shapes are left out.
    """
    axes = resolved_axes(config)[graph]
    names = dict.fromkeys(split_axis(axis)[1] for spec in axes.values() for axis in spec if isinstance(axis, str))
    spans = {name: ranges[name] for name in names}
    steps = {name: config.dit.patch if name in ("h", "w", "eh", "ew") else 1 for name in names}

    def within(name: str, size: int) -> int:
        return max(spans[name].min, min(size // steps[name] * steps[name], spans[name].max))

    smallest = {name: span.min for name, span in spans.items()}
    if small:
        # A third and two thirds of the way: height and width differ.
        shares = {name: (1 + number % 2) / 3 for number, name in enumerate(names)}
        shapes = {
            "min": smallest,
            "opt": {name: span.opt for name, span in spans.items()},
            "max": {name: span.max for name, span in spans.items()},
            "between": {
                name: within(name, span.min + round((span.max - span.min) * shares[name]))
                for name, span in spans.items()
            },
        }
    else:
        above = {n: SMALL_LENGTH if n == "L" else span.min + steps[n] for n, span in spans.items()}
        shapes = {"min": smallest, "next": {n: within(n, above[n]) for n in spans}}
    return {name: sizes for i, (name, sizes) in enumerate(shapes.items()) if sizes not in list(shapes.values())[:i]}


def random_feed(graph: GraphName, config: ModelConfig, sizes: Sizes, seed: int = 0) -> Feed:
    """Random tensors of the graph's types, about as large as real ones.

    Floats are normal numbers, latents are scaled as the VAE's, pixels are from -1 to 1, timesteps have fractions, and
    text masks keep the first token.

    Args:
        graph: the graph that takes them.
        config: the model's sizes.
        sizes: the named axes' sizes.
        seed: the same seed gives the same tensors.

    Returns:
        An array for each input, by its name.
    """
    rng = np.random.default_rng(seed)
    axes = resolved_axes(config)[graph]
    feed: dict[str, NDArray[Any]] = {}
    for spec in GRAPHS[graph].inputs:
        shape = [axis_size(axis, sizes) for axis in axes[spec.name]]
        if spec.name == "token_ids":
            feed[spec.name] = rng.integers(0, config.text.vocabulary, shape)
        elif spec.name == "slot_index":
            tokens = sizes["N"] * config.qformer.queries
            feed[spec.name] = rng.integers(-tokens, tokens, shape).clip(-1)
        elif spec.name == "text_mask":
            feed[spec.name] = rng.random(shape) < 0.8
            feed[spec.name][:, 0] = True
        elif spec.dtype == "bool":
            feed[spec.name] = rng.random(shape) < 0.5
        elif spec.name == "pixels_vae":
            feed[spec.name] = rng.uniform(-1, 1, shape).astype(np.float32)
        elif spec.name == "timestep":
            feed[spec.name] = rng.uniform(0, 999, shape).astype(np.float32)
        else:
            # What the VAE gives and takes is unscaled.
            unscaled = spec.name == "ref_latents" or graph == "vae_decoder"
            scale = np.float32(1 / config.vae.scale if unscaled else 1)
            feed[spec.name] = scale * rng.standard_normal(shape, dtype=np.float32)
    return feed


LatentShape = tuple[int, int, int]  # how many images, and their latents' height and width


class RealInputs:
    """The samples' images and prompts, prepared as the pipeline does, in any shape.

    Images beyond the samples' are turned and mirrored ones; a prompt too short for L tokens is repeated, one too long
    cut. What graphs hand to each other comes from the model's own modules in float32, each of which is loaded once.
    """

    def __init__(self, checkpoint: Checkpoint, tokenize: Tokenize) -> None:
        self.checkpoint, self.config, self.tokenize = checkpoint, checkpoint.config, tokenize
        self.requests = sample_requests()

    def feeds(self, graph: GraphName, shapes: Sequence[Sizes]) -> list[Feed]:
        """What the graph is given, once for each shape."""
        feeds: dict[GraphName, Callable[[Sequence[Sizes]], list[Feed]]] = {
            "vae_encoder": self._vae_encoder,
            "image_encoder": self._image_encoder,
            "text_encoder": self._text_encoder,
            "conditioner": self._conditioner,
            "denoiser": self._denoiser,
            "vae_decoder": self._vae_decoder,
        }
        return feeds[graph](shapes)

    def _vae_encoder(self, shapes: Sequence[Sizes]) -> list[Feed]:
        return [{"pixels_vae": self._pixels(sizes["M"], sizes["eh"], sizes["ew"])} for sizes in shapes]

    def _vae_decoder(self, shapes: Sequence[Sizes]) -> list[Feed]:
        return [{"latents": latents} for latents in self._latents([(s["B"], s["h"], s["w"]) for s in shapes])]

    def _image_encoder(self, shapes: Sequence[Sizes]) -> list[Feed]:
        return self._references(shapes, self._latents(self._reference_shapes(shapes)))

    def _text_encoder(self, shapes: Sequence[Sizes]) -> list[Feed]:
        return self._prompts(shapes, self._image_encoder(shapes))

    def _conditioner(self, shapes: Sequence[Sizes]) -> list[Feed]:
        prompts = self._text_encoder(_samples(shapes))
        return [{name: feed[name] for name in ("text_states", "has_text")} for feed in self._texts(shapes, prompts)]

    def _denoiser(self, shapes: Sequence[Sizes]) -> list[Feed]:
        samples = _samples(shapes)
        source_shapes = [(ceil(sizes["R"] / 2), sizes["h"], sizes["w"]) for sizes in shapes]
        latents = self._latents([*self._reference_shapes(samples), *source_shapes])
        references, sources = latents[: len(shapes)], latents[len(shapes) :]
        texts = self._texts(shapes, self._prompts(samples, self._references(samples, references)))
        cross_kv = run_reference(self.checkpoint, "conditioner", [_only(feed, "conditioner") for feed in texts])
        return [
            {**cached, **self._noisy(sizes["R"], text, clean)}
            for sizes, text, cached, clean in zip(shapes, texts, cross_kv, sources, strict=True)
        ]

    def _reference_shapes(self, shapes: Sequence[Sizes]) -> list[LatentShape]:
        side = self.config.dit.trained_grid * self.config.dit.patch
        return [(sizes["N"], side, side) for sizes in shapes]

    def _references(self, shapes: Sequence[Sizes], latents: Sequence[NDArray[Any]]) -> list[Feed]:
        """pixels_vit and ref_latents."""
        side = self.config.vision.side
        return [
            {"pixels_vit": np.stack([vit_pixels(self._image(i), side) for i in range(sizes["N"])]), "ref_latents": refs}
            for sizes, refs in zip(shapes, latents, strict=True)
        ]

    def _prompts(self, shapes: Sequence[Sizes], references: Sequence[Feed]) -> list[Feed]:
        """The text encoder's inputs."""
        image_tokens = run_reference(self.checkpoint, "image_encoder", references)
        return [{**self._words(sizes), **tokens} for sizes, tokens in zip(shapes, image_tokens, strict=True)]

    def _words(self, sizes: Sizes) -> Feed:
        """token_ids, slot_index, text_mask [B,L]; the first prompt has L tokens, the others may have fewer."""
        queries, first_image = self.config.qformer.queries, 0
        prompts: list[TokenizedPrompt] = []
        for number in range(sizes["B"]):
            request = self.requests[number % len(self.requests)]
            text, images = compose_prompt(request.task, request.prompt), len(request.images)
            if number == 0:
                repeats = 1 + sizes["L"] // len(self.tokenize(text))
                text, images = " ".join([text] * repeats), images * repeats
            slots = [(first_image + k) % sizes["N"] for k in range(images)]
            first_image += images
            prompts.append(tokenize_prompt(text, slots, self.tokenize, queries, sizes["L"]))
        token_ids, slot_index, text_mask = collate(prompts)
        return {"token_ids": token_ids, "slot_index": slot_index, "text_mask": text_mask}

    def _texts(self, shapes: Sequence[Sizes], prompts: Sequence[Feed]) -> list[Feed]:
        """Encoded prompts as guidance arranges them: text_states [R,L,D], has_text [R], text_mask [R,L].

        There are two branches, the first without text; a batch of one sees its text.
        """
        encoded = run_reference(self.checkpoint, "text_encoder", prompts)
        feeds: list[Feed] = []
        for sizes, prompt, output in zip(shapes, prompts, encoded, strict=True):
            count, batch = len(prompt["text_mask"]), np.arange(sizes["R"])
            feeds.append(
                {
                    "text_states": output["text_states"][batch % count],
                    "has_text": batch >= sizes["R"] - count,
                    "text_mask": prompt["text_mask"][batch % count],
                }
            )
        return feeds

    def _noisy(self, batch: int, text: Feed, clean: NDArray[Any]) -> Feed:
        """The rest of the denoiser's inputs, from unscaled latents without noise."""
        samples = np.arange(batch) % len(clean)
        source = (clean * self.config.vae.scale)[samples]
        noise = draw_noise(range(len(clean)), clean.shape[1:])[samples]
        return {
            "latents": np.float32(ALPHAS[TIMESTEP]) * source + np.float32(SIGMAS[TIMESTEP]) * noise,
            "source": source * text["has_text"][:, None, None, None],
            "timestep": np.full(batch, TIMESTEP, np.float32),
            "text_mask": text["text_mask"],
        }

    def _latents(self, shapes: Sequence[LatentShape]) -> list[NDArray[Any]]:
        """Unscaled latents, [count,c,h,w], for each (count, h, w).

        Images are encoded one at a time, which does not change a VAE's outputs and needs the least memory.
        """
        feeds = [{"pixels_vae": pixels[None]} for shape in shapes for pixels in self._pixels(*shape)]
        outputs = iter(run_reference(self.checkpoint, "vae_encoder", feeds))
        return [np.concatenate([next(outputs)["latent_mean"] for _ in range(count)]) for count, _, _ in shapes]

    def _pixels(self, count: int, h: int, w: int) -> NDArray[np.float32]:
        """The first images, cropped to the size of h x w latents: [count,3,f*h,f*w], from -1 to 1."""
        factor = self.config.vae.factor
        return np.stack([vae_pixels(self._image(i), w * factor, h * factor, "crop") for i in range(count)])

    def _image(self, number: int) -> Image.Image:
        turn, index = divmod(number, len(self._images))
        image = self._images[index].rotate(90 * (turn // 2))
        return ImageOps.mirror(image) if turn % 2 else image

    @cached_property
    def _images(self) -> list[Image.Image]:
        images = [image for request in self.requests for image in (*request.images, request.source)]
        return list({image.tobytes(): image for image in images if image is not None}.values())


def _samples(shapes: Sequence[Sizes]) -> list[Sizes]:
    """The text encoder's sizes behind a batch of R: two guidance branches a sample, and two images."""
    return [{"B": ceil(sizes["R"] / 2), "N": 2, "L": sizes["L"]} for sizes in shapes]


def _only(feed: Feed, graph: GraphName) -> Feed:
    """What the graph takes of a feed."""
    return {spec.name: feed[spec.name] for spec in GRAPHS[graph].inputs}
