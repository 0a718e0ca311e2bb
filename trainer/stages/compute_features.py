"""Stage 3: latents and ViT features of many scenes, computed once, since both image encoders stay frozen.

A shard is a folder of .npy files over S samples, P pictures, V pictures that prompts refer to:
latents [P,c,h,w] and vit [V,1+patches,width], float16; target, source [S] and images [S,MAX_IMAGES], rows of latents
(-1: none); images_vit [S,MAX_IMAGES], rows of vit; token_ids and slot_index [S,L], padded (slots count from the
sample's first image token); length [S]; kind [S], index in KINDS.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from safetensors.torch import load_model
from tokenizers import Tokenizer
from torch import Tensor

from mige_rt.bundle import TOKENIZER_FILE
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.instruction import PLACEHOLDER, compose_prompt
from mige_rt.preprocessing import vae_pixels, vit_pixels
from mige_rt.prompt_tokens import tokenize_prompt
from mige_rt.tokenizer import Tokenize, load_tokenizer
from trainer.checkpoints.model_folder import load_model as load_model_folder
from trainer.model.encoders import ImageEncoder
from trainer.model.mige import Mige
from trainer.model.vae import VAEEncoder
from trainer.settings import FeatureSettings, StageSettings
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import KINDS, Sample, make_sample
from trainer.tokenizer import train_tokenizer

MAX_IMAGES = 3
TOKENIZER_SAMPLES = 4000
CHUNK = 64  # pictures encoded at a time


def world_tokenizer(concepts: list[Concept], settings: FeatureSettings, vocabulary: int) -> Tokenizer:
    """A tokenizer of the words that the world's instructions use, and of every printable character."""

    def texts() -> Iterator[str]:
        for concept in concepts:
            yield concept.name
        for index in range(TOKENIZER_SAMPLES):
            sample = make_sample(settings.seed + 1, index, concepts, 16)
            yield from compose_prompt(sample.task, sample.prompt).split(PLACEHOLDER)

    return train_tokenizer(texts(), vocabulary)


@torch.no_grad()
def _encode(
    encoder: VAEEncoder, vision: ImageEncoder, pictures: list[NDArray[np.uint8]], vit_rows: list[int], side: int
):
    """Latents of every picture and ViT features of those at vit_rows, as float16 arrays."""
    opened = [Image.fromarray(picture) for picture in pictures]
    latents, features = [], []
    for i in range(0, len(opened), CHUNK):
        pixels = np.stack([vae_pixels(p, p.width, p.height, "crop") for p in opened[i : i + CHUNK]])
        latents.append(encoder(torch.from_numpy(pixels).to(memory_format=torch.channels_last))[0].half().numpy())
    for i in range(0, len(vit_rows), CHUNK):
        pixels = np.stack([vit_pixels(opened[row], side) for row in vit_rows[i : i + CHUNK]])
        features.append(vision.vit(torch.from_numpy(pixels)).half().numpy())
    return np.concatenate(latents), np.concatenate(features)


def _shard(
    samples: list[Sample], config: ModelConfig, tokenize: Tokenize
) -> tuple[dict[str, NDArray], list, list[int]]:
    """A shard's index arrays, its pictures, and which of them the ViT sees."""
    queries = config.qformer.queries
    pictures: list[NDArray[np.uint8]] = []
    vit_rows: list[int] = []
    prompts = []
    number = len(samples)
    target, source, length, kind = (np.full(number, -1, np.int32) for _ in range(4))
    images, images_vit = (np.full((number, MAX_IMAGES), -1, np.int32) for _ in range(2))
    for s, sample in enumerate(samples):
        rows: dict[int, int] = {}  # a picture that stands twice is encoded once

        def row_of(picture: NDArray[np.uint8], rows: dict[int, int] = rows) -> int:
            if id(picture) not in rows:
                rows[id(picture)] = len(pictures)
                pictures.append(picture)
            return rows[id(picture)]

        target[s] = row_of(sample.target)
        if sample.source is not None:
            source[s] = row_of(sample.source)
        seen: dict[int, int] = {}
        for k, image in enumerate(sample.images):
            images[s, k] = row_of(image)
            if images[s, k] not in seen:
                seen[images[s, k]] = len(vit_rows)
                vit_rows.append(int(images[s, k]))
            images_vit[s, k] = seen[images[s, k]]
        text = compose_prompt(sample.task, sample.prompt)
        prompt = tokenize_prompt(text, range(len(sample.images)), tokenize, queries, config.max_tokens)
        prompts.append(prompt)
        length[s], kind[s] = len(prompt.token_ids), list(KINDS).index(sample.kind)
    token_ids = np.zeros((number, int(length.max())), np.int16)
    slot_index = np.full_like(token_ids, -1)
    for s, prompt in enumerate(prompts):
        token_ids[s, : length[s]], slot_index[s, : length[s]] = prompt.token_ids, prompt.slot_index
    arrays = {"target": target, "source": source, "images": images, "images_vit": images_vit}
    arrays |= {"token_ids": token_ids, "slot_index": slot_index, "length": length, "kind": kind}
    return arrays, pictures, vit_rows


def _image_encoders(config: ModelConfig, state: Path) -> tuple[VAEEncoder, ImageEncoder]:
    """The trained VAE's encoder, and an image encoder with the trained ViT, of a state folder."""
    trained = (state / "vae" / "trained", state / "vit" / "trained.safetensors")
    for path in trained:
        if not path.exists():
            raise InputError(f"{path} is not there; run the stages vae and vit first")
    vision = Mige(config).image_encoder
    load_model(vision.vision, trained[1])
    return VAEEncoder(AutoencoderKL.from_pretrained(trained[0])), vision


def compute_features(
    config: ModelConfig, settings: FeatureSettings, concepts: list[Concept], state: Path, start: Path | None = None
) -> Path:
    """Write the shards that are missing, and the tokenizer; returns their folder, state/features. start: the model
    folder or bundle whose VAE, ViT and tokenizer are taken, rather than those that the earlier stages made.

    Raises InputError when the VAE or the ViT has not been trained yet, or `start` is no such folder.
    """
    if start is None:
        encoder, vision = _image_encoders(config, state)
    else:
        model = load_model_folder(start, only=("vae_encoder", "image_encoder"))
        encoder, vision = model.vae_encoder, model.image_encoder
    folder = state / "features"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_path = folder / "tokenizer.json"
    if not tokenizer_path.is_file():
        if start is not None:
            tokenizer = Tokenizer.from_file(str(start / TOKENIZER_FILE))
        else:
            tokenizer = world_tokenizer(concepts, settings, config.text.vocabulary)
        tokenizer.save(str(tokenizer_path))
    tokenize = load_tokenizer(tokenizer_path)
    encoder = encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for number in track(range(settings.shards), "features"):
        shard = folder / f"shard-{number:03d}"
        if shard.is_dir():
            continue
        first = number * settings.shard_samples
        indices = range(first, first + settings.shard_samples)
        samples = [make_sample(settings.seed, index, concepts, config.size) for index in indices]
        arrays, pictures, vit_rows = _shard(samples, config, tokenize)
        arrays["latents"], arrays["vit"] = _encode(encoder, vision, pictures, vit_rows, config.vision.side)
        partial = shard.with_name(f"partial-{shard.name}-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        os.replace(partial, shard)
    return folder


@dataclass(frozen=True)
class Batch:
    """B samples that refer to N pictures; latents are scaled, but for ref_latents."""

    kinds: NDArray[np.int32]  # [B], index in KINDS
    target: Tensor  # [B,c,h,w]
    source: Tensor  # [B,c,h,w], zero where there is none
    vit: Tensor  # [N,1+patches,width]
    ref_latents: Tensor  # [N,c,h,w]
    token_ids: Tensor  # int64 [B,L]
    slot_index: Tensor  # int64 [B,L]
    text_mask: Tensor  # bool [B,L]

    def to(self, device: torch.device) -> "Batch":
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


class FeatureStore:
    """The shards of a folder, memory-mapped, read a batch at a time."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Raises InputError when there is no shard."""
        shards = sorted(folder.glob("shard-*"))
        if not shards:
            raise InputError(f"{folder} holds no shards; run the stage features first")
        self.config = config
        self.shards = [{f.stem: np.load(f, mmap_mode="r") for f in shard.glob("*.npy")} for shard in shards]
        self.ends = np.cumsum([len(shard["target"]) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        scale, queries = self.config.vae.scale, self.config.qformer.queries
        where = np.searchsorted(self.ends, indices, side="right")
        offsets = indices - np.concatenate([[0], self.ends])[where]
        picked = [(self.shards[w], int(o)) for w, o in zip(where, offsets, strict=True)]
        length = max(int(shard["length"][o]) for shard, o in picked)
        target, source, vit, ref_latents = [], [], [], []
        token_ids = np.zeros((len(picked), length), np.int64)
        slot_index, text_mask = np.full_like(token_ids, -1), np.zeros_like(token_ids, bool)
        for b, (shard, o) in enumerate(picked):
            target.append(shard["latents"][shard["target"][o]])
            source.append(
                shard["latents"][shard["source"][o]] if shard["source"][o] >= 0 else np.zeros_like(target[-1])
            )
            own = int(shard["length"][o])
            token_ids[b, :own], text_mask[b, :own] = shard["token_ids"][o, :own], True
            slots = shard["slot_index"][o, :own].astype(np.int64)
            slot_index[b, :own] = np.where(slots >= 0, slots + len(vit) * queries, -1)
            for k in range(MAX_IMAGES):
                if shard["images"][o, k] >= 0:
                    vit.append(shard["vit"][shard["images_vit"][o, k]])
                    ref_latents.append(shard["latents"][shard["images"][o, k]])
        stacked = [torch.from_numpy(np.stack(a)).float() for a in (target, source, vit, ref_latents)]
        return Batch(
            kinds=np.array([shard["kind"][o] for shard, o in picked]),
            target=stacked[0] * scale,
            source=stacked[1] * scale,
            vit=stacked[2],
            ref_latents=stacked[3],
            token_ids=torch.from_numpy(token_ids),
            slot_index=torch.from_numpy(slot_index),
            text_mask=torch.from_numpy(text_mask),
        )


def batches(store: FeatureStore, settings: StageSettings, step: int, rank: int, ranks: int) -> Iterator[Batch]:
    """The batches of one process from a step on: the same ones whenever it is asked."""
    while True:
        rng = np.random.default_rng([settings.seed, step, rank])
        yield store.batch(rng.integers(len(store), size=settings.batch))
        step += 1
