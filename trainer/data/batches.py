"""Prepared samples as a batch of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mige_rt.config import ModelConfig
from mige_rt.instruction import Task, compose_prompt, count_placeholders
from mige_rt.prompt_tokens import collate as collate_prompts
from mige_rt.prompt_tokens import tokenize_prompt
from mige_rt.tokenizer import Tokenize
from trainer.data.prepared import PreparedSample


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """B samples that refer to N images; latents are scaled, but for ref_latents.

    Attributes:
        ids: The manifests'.
        tasks: Of each sample.
        target: [B,c,h,w].
        source: [B,c,h,w], zero where there is none.
        vit: [N,1+patches,width]; one image of zeros where no sample refers to any.
        ref_latents: [N,c,h,w], likewise.
        token_ids: int64 [B,L].
        slot_index: int64 [B,L].
        text_mask: bool [B,L].
    """

    ids: tuple[str, ...]
    tasks: tuple[Task, ...]
    target: Tensor
    source: Tensor
    vit: Tensor
    ref_latents: Tensor
    token_ids: Tensor
    slot_index: Tensor
    text_mask: Tensor

    def to(self, device: torch.device) -> "TrainingBatch":
        """The same on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def collate(
    samples: Sequence[PreparedSample], config: ModelConfig, tokenize: Tokenize, generator: np.random.Generator
) -> TrainingBatch:
    """Draw each latent from its posterior, and tokenize the prompts.

    Args:
        samples: At least one.
        config: The model's sizes.
        tokenize: Its tokenizer.
        generator: For the draws: those of each sample's target, then its source, then its images.

    Returns:
        The batch, float32.
    """
    target, source, vit, ref_latents, prompts = [], [], [], [], []
    for sample in samples:
        target.append(sample.draw(sample.target, generator))
        no_source = np.zeros_like(target[-1])
        source.append(no_source if sample.source is None else sample.draw(sample.source, generator))
        text = compose_prompt(sample.task, sample.prompt)
        used = count_placeholders(text)  # of a prompt that is too long, the clean-up leaves fewer
        images = range(len(vit), len(vit) + used)
        vit += [sample.vit[row].astype(np.float32) for row in sample.images_vit[:used]]
        ref_latents += [sample.draw(row, generator) for row in sample.images[:used]]
        queries = config.qformer.queries
        prompts.append(tokenize_prompt(text, images, tokenize, queries, config.max_tokens))
    if not vit:
        vision = config.vision
        vit.append(np.zeros((1 + (vision.side // vision.patch) ** 2, vision.width), np.float32))
        ref_latents.append(np.zeros_like(target[0]))
    token_ids, slot_index, text_mask = collate_prompts(prompts)
    scale = config.vae.scale
    return TrainingBatch(
        ids=tuple(sample.id for sample in samples),
        tasks=tuple(sample.task for sample in samples),
        target=torch.from_numpy(np.stack(target) * scale),
        source=torch.from_numpy(np.stack(source) * scale),
        vit=torch.from_numpy(np.stack(vit)),
        ref_latents=torch.from_numpy(np.stack(ref_latents)),
        token_ids=torch.from_numpy(token_ids),
        slot_index=torch.from_numpy(slot_index),
        text_mask=torch.from_numpy(text_mask),
    )
