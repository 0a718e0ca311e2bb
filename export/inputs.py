"""What exported graphs are tried with: shapes from the smallest to the largest, filled with random tensors, and with
what the samples that come with the project give when the graphs before have run on them."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from export.reference import run_reference
from mige_rt.bundle import TOKENIZER_FILE, read_config
from mige_rt.config import ModelConfig
from mige_rt.graphs import GRAPHS, AxisRange, axis_size, resolved_axes, split_axis
from mige_rt.instruction import compose_prompt
from mige_rt.preprocessing import vae_pixels, vit_pixels
from mige_rt.prompt_tokens import collate, tokenize_prompt
from mige_rt.requests import ResolvedRequest, read_requests
from mige_rt.scheduler import ALPHAS, SIGMAS, draw_noise
from mige_rt.tokenizer import load_tokenizer

SAMPLES = Path(__file__).parent / "samples"  # requests.jsonl and its pictures
TIMESTEP = 600  # at which the real latents are noisy
SMALL_LENGTH = 48  # tokens of the larger of two small shapes: words and a part of a picture

Sizes = dict[str, int]
Feed = dict[str, NDArray]


def sample_requests() -> list[ResolvedRequest]:
    """The requests that come with the project, two of each task."""
    return list(read_requests(SAMPLES / "requests.jsonl").values())


def shapes_of(graph: str, config: ModelConfig, ranges: Mapping[str, AxisRange], small: bool) -> dict[str, Sizes]:
    """The shapes that a graph is tried at, by what they are called; each is given by its named axes' sizes.

    Without `small` two: the smallest, and the next above it in every axis, but for text, which has SMALL_LENGTH
    tokens. Equal shapes are left out.
    """
    axes = resolved_axes(config)[graph]
    names = dict.fromkeys(split_axis(axis)[1] for port in axes.values() for axis in port if isinstance(axis, str))
    spans = {name: ranges[name] for name in names}
    steps = {name: config.dit.patch if name in ("h", "w", "eh", "ew") else 1 for name in names}

    def within(name: str, size: int) -> int:
        return min(size // steps[name] * steps[name], spans[name].max)

    smallest = {name: span.min for name, span in spans.items()}
    if small:
        # A third and two thirds of the way: rows and columns differ.
        shares = {name: (1 + number % 2) / 3 for number, name in enumerate(names)}
        found = {
            "min": smallest,
            "opt": {name: span.opt for name, span in spans.items()},
            "max": {name: span.max for name, span in spans.items()},
            "between": {
                name: max(span.min, within(name, span.min + round((span.max - span.min) * shares[name])))
                for name, span in spans.items()
            },
        }
    else:
        above = {n: SMALL_LENGTH if n == "L" else span.min + steps[n] for n, span in spans.items()}
        found = {
            "min": smallest,
            "next": {n: max(span.min, within(n, above[n])) for n, span in spans.items()},
        }
    return {what: sizes for i, (what, sizes) in enumerate(found.items()) if sizes not in list(found.values())[:i]}


def random_feed(graph: str, config: ModelConfig, sizes: Sizes, seed: int = 0) -> Feed:
    """Random tensors of the graph's types and about the sizes of real ones: normal numbers, latents as large as the
    VAE's, pixels from -1 to 1, timesteps with fractions, and masks that keep the first token."""
    rng = np.random.default_rng(seed)
    axes = resolved_axes(config)[graph]
    feed: Feed = {}
    for port in GRAPHS[graph].inputs:
        shape = [axis_size(axis, sizes) for axis in axes[port.name]]
        if port.name == "token_ids":
            feed[port.name] = rng.integers(0, config.text.vocabulary, shape)
        elif port.name == "slot_index":
            rows = sizes["N"] * config.qformer.queries
            feed[port.name] = rng.integers(-rows, rows, shape).clip(-1)
        elif port.name == "text_mask":
            feed[port.name] = rng.random(shape) < 0.8
            feed[port.name][:, 0] = True
        elif port.dtype == "bool":
            feed[port.name] = rng.random(shape) < 0.5
        elif port.name == "pixels_vae":
            feed[port.name] = rng.uniform(-1, 1, shape).astype(np.float32)
        elif port.name == "timestep":
            feed[port.name] = rng.uniform(0, 999, shape).astype(np.float32)
        else:
            # What the VAE gives and takes is unscaled.
            unscaled = port.name == "ref_latents" or graph == "vae_decoder"
            scale = np.float32(1 / config.vae.scale if unscaled else 1)
            feed[port.name] = scale * rng.standard_normal(shape, dtype=np.float32)
    return feed


class RealInputs:
    """The samples' pictures and prompts, prepared as the pipeline does, in any shape.

    Pictures beyond the samples' are turned and mirrored ones; a prompt too short for L tokens is repeated, one too
    long cut. What graphs hand to each other comes from the model's own modules in float32.
    """

    def __init__(self, folder: Path) -> None:
        """folder: a model folder or a bundle."""
        self.folder, self.config = folder, read_config(folder)
        self.tokenize = load_tokenizer(folder / TOKENIZER_FILE)
        self.requests = sample_requests()

    def feeds(self, graph: str, shapes: Sequence[Sizes]) -> list[Feed]:
        """What the graph is given, once for each shape."""
        return getattr(self, f"_{graph}")(shapes)

    @cached_property
    def _pictures(self) -> list[Image.Image]:
        found = [picture for request in self.requests for picture in (*request.images, request.source)]
        return list({picture.tobytes(): picture for picture in found if picture is not None}.values())

    def _picture(self, number: int) -> Image.Image:
        turn, index = divmod(number, len(self._pictures))
        picture = self._pictures[index].rotate(90 * (turn // 2))
        return ImageOps.mirror(picture) if turn % 2 else picture

    def _pixels(self, count: int, h: int, w: int) -> NDArray[np.float32]:
        """[count,3,f*h,f*w]"""
        factor = self.config.vae.factor
        return np.stack([vae_pixels(self._picture(i), w * factor, h * factor, "crop") for i in range(count)])

    def _latents(self, counts: Sequence[tuple[int, int, int]]) -> list[NDArray]:
        """Unscaled, [count,c,h,w], for each (count, h, w); pictures pass one at a time, which is all the same to a VAE
        and needs the least memory."""
        feeds = [{"pixels_vae": pixels[None]} for count in counts for pixels in self._pixels(*count)]
        made = iter(run_reference(self.folder, "vae_encoder", feeds))
        return [np.concatenate([next(made)["latent_mean"] for _ in range(count)]) for count, _, _ in counts]

    def _vae_encoder(self, shapes: Sequence[Sizes]) -> list[Feed]:
        return [{"pixels_vae": self._pixels(sizes["M"], sizes["eh"], sizes["ew"])} for sizes in shapes]

    def _vae_decoder(self, shapes: Sequence[Sizes]) -> list[Feed]:
        return [{"latents": made} for made in self._latents([(s["B"], s["h"], s["w"]) for s in shapes])]

    def _image_encoder(self, shapes: Sequence[Sizes]) -> list[Feed]:
        side = self.config.dit.trained_grid * self.config.dit.patch
        latents = self._latents([(sizes["N"], side, side) for sizes in shapes])
        return [
            {
                "pixels_vit": np.stack(
                    [vit_pixels(self._picture(i), self.config.vision.side) for i in range(sizes["N"])]
                ),
                "ref_latents": made,
            }
            for sizes, made in zip(shapes, latents, strict=True)
        ]

    def _text_encoder(self, shapes: Sequence[Sizes]) -> list[Feed]:
        tokens = run_reference(self.folder, "image_encoder", self._image_encoder(shapes))
        return [{**self._words(sizes), **made} for sizes, made in zip(shapes, tokens, strict=True)]

    def _words(self, sizes: Sizes) -> Feed:
        """token_ids, slot_index, text_mask [B,L]; the first prompt has L tokens, the others may have fewer."""
        config, encoded, used = self.config, [], 0
        for row in range(sizes["B"]):
            request = self.requests[row % len(self.requests)]
            text, images = compose_prompt(request.task, request.prompt), len(request.images)
            if row == 0:
                repeats = 1 + sizes["L"] // len(self.tokenize(text))
                text, images = " ".join([text] * repeats), images * repeats
            slots = [(used + k) % sizes["N"] for k in range(images)]
            used += images
            encoded.append(tokenize_prompt(text, slots, self.tokenize, config.qformer.queries, sizes["L"]))
        token_ids, slot_index, text_mask = collate(encoded)
        return {"token_ids": token_ids, "slot_index": slot_index, "text_mask": text_mask}

    def _conditioner(self, shapes: Sequence[Sizes]) -> list[Feed]:
        return [{name: feed[name] for name in ("text_states", "has_text")} for feed in self._conditions(shapes)]

    def _conditions(self, shapes: Sequence[Sizes]) -> list[Feed]:
        """text_states [R,L,D], has_text [R], text_mask [R,L], as guidance arranges them: two branches, the first
        without text; one row alone sees its text."""
        samples = [{"B": ceil(sizes["R"] / 2), "N": 2, "L": sizes["L"]} for sizes in shapes]
        encoded = self._text_encoder(samples)
        made = run_reference(self.folder, "text_encoder", encoded)
        found = []
        for sizes, feed, output in zip(shapes, encoded, made, strict=True):
            rows = np.arange(sizes["R"]) % len(feed["text_mask"])
            has_text = np.arange(sizes["R"]) >= sizes["R"] - len(feed["text_mask"])
            found.append(
                {
                    "text_states": output["text_states"][rows],
                    "has_text": has_text,
                    "text_mask": feed["text_mask"][rows],
                }
            )
        return found

    def _denoiser(self, shapes: Sequence[Sizes]) -> list[Feed]:
        conditions = self._conditions(shapes)
        made = run_reference(self.folder, "conditioner", conditions)
        latents = self._latents([(ceil(sizes["R"] / 2), sizes["h"], sizes["w"]) for sizes in shapes])
        found = []
        for sizes, words, keys, clean in zip(shapes, conditions, made, latents, strict=True):
            rows = np.arange(sizes["R"]) % len(clean)
            source = (clean * self.config.vae.scale)[rows]
            noise = draw_noise(range(len(clean)), clean.shape[1:])[rows]
            found.append(
                {
                    "latents": np.float32(ALPHAS[TIMESTEP]) * source + np.float32(SIGMAS[TIMESTEP]) * noise,
                    "source": source * words["has_text"][:, None, None, None],
                    "timestep": np.full(sizes["R"], TIMESTEP, np.float32),
                    "text_mask": words["text_mask"],
                    **keys,
                }
            )
        return found
