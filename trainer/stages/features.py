"""Samples as training reads them: latents and ViT features, which both image encoders, being frozen, give once.

A shard is a folder of .npy files over S samples, P images, V images that prompts refer to: latents [P,c,h,w] and vit
[V,1+patches,width], float16; target, source [S] and images [S,MAX_IMAGES], rows of latents (-1: none); images_vit
[S,MAX_IMAGES], rows of vit; asked [S,h,w], how much of each latent pixel belongs to what the instruction brings in or
changes, in 255ths; origin_image [S,gh,gw], which of the sample's images shows what is in a patch of the DiT (-1: none),
and origin [S,gh,gw,3], where it does: x and y in patches of the ViT, and how many of them a patch of the DiT is high;
token_ids and slot_index [S,L], padded (slots count from the sample's first image token); length [S]; kind [S], index in
ALL_KINDS.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mige_rt.atomic import atomic_folder
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.instruction import compose_prompt
from mige_rt.preprocessing import vae_pixels, vit_pixels
from mige_rt.prompt_tokens import tokenize_prompt
from mige_rt.tokenizer import Tokenize
from trainer.data.encode import fingerprint
from trainer.model.encoders import ImageEncoder
from trainer.model.vae import VAEEncoder
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import ALL_KINDS, Sample, make_sample

MAX_IMAGES = 3
CHUNK = 64  # images encoded at a time
LEAST_FILLED = 0.25  # share of a patch that a subject fills, if the patch is to be read from that subject's image
KIND_NAMES = list(ALL_KINDS)

Shard = Mapping[str, NDArray]


@dataclass(frozen=True)
class FeatureMaker:
    """Makes shards of a model's own features."""

    config: ModelConfig
    vae: VAEEncoder
    encoder: ImageEncoder
    tokenize: Tokenize

    def plan(self) -> dict[str, Any]:
        """What the bytes of a shard depend on, beside its samples."""
        vision = self.encoder.vision
        encoders = fingerprint(self.vae, vision.embeddings, vision.encoder)
        return {"model": self.config.name, "queries": self.config.qformer.queries, "encoders": encoders}

    def shard(self, samples: Sequence[Sample]) -> dict[str, NDArray]:
        """The arrays of some samples."""
        arrays, images, vit_rows = self._index(samples)
        arrays["latents"], arrays["vit"] = self._encode(images, vit_rows)
        return arrays

    @torch.no_grad()
    def _encode(self, images: list[NDArray[np.uint8]], vit_rows: list[int]) -> tuple[NDArray, NDArray]:
        """Latents of every image and ViT features of those at vit_rows, as float16 arrays."""
        opened = [Image.fromarray(image) for image in images]
        latents, features = [], [np.empty((0, *self._vit_shape()), np.float16)]
        for i in range(0, len(opened), CHUNK):
            pixels = np.stack([vae_pixels(image, image.width, image.height, "crop") for image in opened[i : i + CHUNK]])
            batch = torch.from_numpy(pixels).to(memory_format=torch.channels_last)
            latents.append(self.vae(batch)[0].half().numpy())
        for i in range(0, len(vit_rows), CHUNK):
            side = self.config.vision.side
            pixels = np.stack([vit_pixels(opened[row], side) for row in vit_rows[i : i + CHUNK]])
            features.append(self.encoder.vit(torch.from_numpy(pixels)).half().numpy())
        return np.concatenate(latents), np.concatenate(features)

    def _vit_shape(self) -> tuple[int, int]:
        """Of one image's features."""
        vision = self.config.vision
        return 1 + (vision.side // vision.patch) ** 2, vision.width

    def _index(self, samples: Sequence[Sample]) -> tuple[dict[str, NDArray], list[NDArray[np.uint8]], list[int]]:
        """A shard's index arrays, its images, and which of them the ViT sees."""
        config, number = self.config, len(samples)
        images: list[NDArray[np.uint8]] = []
        vit_rows: list[int] = []
        prompts = []
        target, source, length, kind = (np.full(number, -1, np.int32) for _ in range(4))
        latent_rows, vit_index = (np.full((number, MAX_IMAGES), -1, np.int32) for _ in range(2))
        side = config.size // config.vae.factor
        grid = side // config.dit.patch
        asked, origin_image = np.zeros((number, side, side), np.uint8), np.full((number, grid, grid), -1, np.int8)
        origin = np.zeros((number, grid, grid, 3), np.float16)
        for s, sample in enumerate(samples):
            rows: dict[int, int] = {}  # an image that is used twice is encoded once

            def row_of(image: NDArray[np.uint8], rows: dict[int, int] = rows) -> int:
                if id(image) not in rows:
                    rows[id(image)] = len(images)
                    images.append(image)
                return rows[id(image)]

            target[s] = row_of(sample.target)
            if sample.source is not None:
                source[s] = row_of(sample.source)
            by_row: dict[int, int] = {}
            for k, image in enumerate(sample.images):
                latent_rows[s, k] = row_of(image)
                if latent_rows[s, k] not in by_row:
                    by_row[latent_rows[s, k]] = len(vit_rows)
                    vit_rows.append(int(latent_rows[s, k]))
                vit_index[s, k] = by_row[latent_rows[s, k]]
            text = compose_prompt(sample.task, sample.prompt)
            queries = config.qformer.queries
            prompt = tokenize_prompt(text, range(len(sample.images)), self.tokenize, queries, config.max_tokens)
            prompts.append(prompt)
            length[s], kind[s] = len(prompt.token_ids), KIND_NAMES.index(sample.kind)
            asked[s] = _asked(sample, config.vae.factor)
            origin_image[s], origin[s] = _origins(sample, grid, config.vision.side // config.vision.patch)
        token_ids = np.zeros((number, int(length.max())), np.int16)
        slot_index = np.full_like(token_ids, -1)
        for s, prompt in enumerate(prompts):
            token_ids[s, : length[s]], slot_index[s, : length[s]] = prompt.token_ids, prompt.slot_index
        arrays = {"target": target, "source": source, "images": latent_rows, "images_vit": vit_index, "asked": asked}
        arrays |= {"origin_image": origin_image, "origin": origin}
        arrays |= {"token_ids": token_ids, "slot_index": slot_index, "length": length, "kind": kind}
        return arrays, images, vit_rows


def _asked(sample: Sample, factor: int) -> NDArray[np.uint8]:
    """How much of each latent pixel shows what is asked for, in 255ths; what changes, where nothing is."""
    masks = [sample.after[i].mask for i in sample.asked]
    mask = np.logical_or.reduce(masks) if masks else sample.changed
    return np.rint(255 * _shares(mask, len(mask) // factor)).astype(np.uint8)


def _origins(sample: Sample, grid: int, patches: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Which image shows what is in each patch of the DiT, [grid,grid], and where, [grid,grid,3].

    It is that of the subject that fills most of the patch. patches: of the ViT, along a side.
    """
    filled = np.full((grid, grid), LEAST_FILLED)
    image, where = np.full((grid, grid), -1, np.int8), np.zeros((grid, grid, 3), np.float16)
    centres = (np.arange(grid) + 0.5) / grid
    for mark in sample.after:
        if mark.origin is None:
            continue
        share, scale = _shares(mark.mask, grid), mark.origin.scale
        here = share >= filled
        x, y = (np.clip(scale * centres + shift, 0, 1) * patches for shift in mark.origin.shift)
        there = np.stack([*np.meshgrid(x, y), np.full((grid, grid), scale * patches / grid)], axis=2)
        filled[here], image[here], where[here] = share[here], mark.origin.image, there[here]
    return image, where


def _shares(mask: NDArray[np.bool_], grid: int) -> NDArray[np.float64]:
    """How much of each cell of a grid a mask covers, 0 to 1, [grid,grid]."""
    cell = len(mask) // grid
    return mask.reshape(grid, cell, grid, cell).mean(axis=(1, 3))


@dataclass(frozen=True)
class Batch:
    """B samples that refer to N images; latents are scaled, but for ref_latents."""

    kinds: NDArray[np.int32]  # [B], index in KIND_NAMES
    target: Tensor  # [B,c,h,w]
    source: Tensor  # [B,c,h,w], zero where there is none
    asked: Tensor  # [B,1,h,w], the share of each latent pixel that is asked for
    origin_image: Tensor  # int64 [B,gh,gw], index among the N images; -1 where none shows what is in a patch
    origin: Tensor  # [B,gh,gw,3], where in it: x, y and the patch's height, in patches of the ViT
    vit: Tensor  # [N,1+patches,width]
    ref_latents: Tensor  # [N,c,h,w]
    token_ids: Tensor  # int64 [B,L]
    slot_index: Tensor  # int64 [B,L]
    text_mask: Tensor  # bool [B,L]

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def collate(chosen: Sequence[tuple[Shard, int]], config: ModelConfig) -> Batch:
    """The batch of some samples, each a shard and a number in it."""
    scale, queries = config.vae.scale, config.qformer.queries
    length = max(int(shard["length"][o]) for shard, o in chosen)
    target, source, asked, vit, ref_latents = [], [], [], [], []
    origin_image, origin = [], []
    token_ids = np.zeros((len(chosen), length), np.int64)
    slot_index, text_mask = np.full_like(token_ids, -1), np.zeros_like(token_ids, bool)
    for b, (shard, o) in enumerate(chosen):
        latents = shard["latents"]
        target.append(latents[shard["target"][o]])
        source.append(latents[shard["source"][o]] if shard["source"][o] >= 0 else np.zeros_like(target[-1]))
        asked.append(shard["asked"][o][None])
        image = shard["origin_image"][o].astype(np.int64)
        origin_image.append(np.where(image >= 0, image + len(vit), -1))
        origin.append(shard["origin"][o])
        tokens = int(shard["length"][o])
        token_ids[b, :tokens], text_mask[b, :tokens] = shard["token_ids"][o, :tokens], True
        slots = shard["slot_index"][o, :tokens].astype(np.int64)
        slot_index[b, :tokens] = np.where(slots >= 0, slots + len(vit) * queries, -1)
        for k in range(MAX_IMAGES):
            if shard["images"][o, k] >= 0:
                vit.append(shard["vit"][shard["images_vit"][o, k]])
                ref_latents.append(latents[shard["images"][o, k]])
    if not vit:  # no prompt refers to an image
        vit.append(np.zeros(chosen[0][0]["vit"].shape[1:]))
        ref_latents.append(np.zeros_like(target[0]))
    stacked = [torch.from_numpy(np.stack(a)).float() for a in (target, source, asked, origin, vit, ref_latents)]
    return Batch(
        kinds=np.array([shard["kind"][o] for shard, o in chosen]),
        target=stacked[0] * scale,
        source=stacked[1] * scale,
        asked=stacked[2] / 255,
        origin_image=torch.from_numpy(np.stack(origin_image)),
        origin=stacked[3],
        vit=stacked[4],
        ref_latents=stacked[5],
        token_ids=torch.from_numpy(token_ids),
        slot_index=torch.from_numpy(slot_index),
        text_mask=torch.from_numpy(text_mask),
    )


@dataclass(frozen=True)
class RollingShards:
    """An unlimited series of samples in shards, of which the newest few are kept in a folder."""

    folder: Path
    maker: FeatureMaker
    concepts: Sequence[Concept]
    shares: Mapping[str, float]  # how often each kind is drawn
    seed: int
    samples: int  # a shard
    kept: int  # shards
    varied: float  # share of the things
    change: Callable[[Sample], Sample] | None = None  # of each sample, before it is encoded
    _open: dict[int, Shard] = field(default_factory=dict)  # by number

    def draw(self, rng: np.random.Generator, number: int, before: int, uses: int) -> list[tuple[Shard, int]]:
        """Some samples, each a shard and a number in it.

        Args:
            rng: Chooses among the samples that are kept.
            number: How many.
            before: How many were drawn before; as their number grows, newer samples take the place of older ones.
            uses: How often a sample is drawn, on average.
        """
        shards = self.read(self.newest(before, uses))
        indices = rng.integers(len(shards) * self.samples, size=number).tolist()
        return [(shards[index // self.samples], index % self.samples) for index in indices]

    def newest(self, before: int, uses: int) -> int:
        """The number of the newest shard, where `before` samples were drawn before; see `draw`."""
        return 1 + before // (self.samples * uses)

    def read(self, newest: int) -> list[Shard]:
        """The shards up to number `newest`, at most `kept`, memory-mapped; those missing are made, older ones removed.

        They are the same whenever they are asked for.
        """
        numbers = range(max(0, newest + 1 - self.kept), newest + 1)
        if all(number in self._open for number in numbers):
            return [self._open[number] for number in numbers]
        for path in self.folder.glob("shard-??????"):
            if int(path.name.removeprefix("shard-")) < numbers.start:
                shutil.rmtree(path, ignore_errors=True)
        shards = {number: self._open.get(number) or self._opened(number) for number in numbers}
        self._open.clear()
        self._open.update(shards)
        return list(shards.values())

    def _opened(self, number: int) -> Shard:
        return {file.stem: np.load(file, mmap_mode="r") for file in self.make(number).glob("*.npy")}

    def make(self, number: int) -> Path:
        """Make a shard where it is missing; returns its folder."""
        path = self.folder / f"shard-{number:06d}"
        if path.is_dir():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.maker.config
        indices = range(number * self.samples, (number + 1) * self.samples)
        samples = [
            make_sample(self.seed, index, self.concepts, config.size, self.shares, varied=self.varied)
            for index in indices
        ]
        if self.change is not None:
            samples = [self.change(sample) for sample in samples]
        shard = self.maker.shard(samples)
        try:
            with atomic_folder(path) as folder:
                for name, array in shard.items():
                    np.save(folder / f"{name}.npy", array)
        except (InputError, OSError):
            if not path.is_dir():  # else another process has made the same shard meanwhile
                raise
        return path
