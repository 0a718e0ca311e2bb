"""A multimodal instruction as the text encoder takes it: token ids, slot index, mask.

Shapes: B prompts, L tokens, Q query tokens an image, N images in the whole batch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mige_rt.errors import InputError
from mige_rt.instruction import PLACEHOLDER, PLACEHOLDER_PATTERN, last_words
from mige_rt.tokenizer import END_ID, Tokenize


@dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """One prompt as the text encoder takes it.

    Attributes:
        token_ids: int64 [L], 0 where an image stands.
        slot_index: int64 [L], the row of the N*Q image tokens at each position, -1 for text.
        cut_after: The last words before the cut of a prompt that was too long; None when nothing was cut.
    """

    token_ids: NDArray[np.int64]
    slot_index: NDArray[np.int64]
    cut_after: str | None


def tokenize_prompt(
    text: str, images: Sequence[int], tokenize: Tokenize, query_tokens: int, max_tokens: int = 256
) -> TokenizedPrompt:
    """Tokenize the text segments one by one, with Q slots for each placeholder and an end-of-sequence id at the end.

    Args:
        text: With placeholders.
        images: Which of the batch's N images stands at each placeholder, in their order.
        tokenize: See `tokenizer.load_tokenizer`.
        query_tokens: Q.
        max_tokens: A longer sequence is cut at its end, as published: the end-of-sequence id goes with it, and the cut
            may pass through an image's slots.

    Raises:
        InputError: The text is blank, or its placeholders are not as many as the images.
    """
    if not text.strip():
        raise InputError(f"the prompt is empty ({text!r}); say in words what the image should be")
    segments = PLACEHOLDER_PATTERN.split(text)
    if len(segments) - 1 != len(images):
        raise InputError(
            f"the number of {PLACEHOLDER} in the prompt is {len(segments) - 1} and the number of images is "
            f"{len(images)}; give one image for each placeholder, in their order"
        )
    token_ids = tokenize(segments[0])
    slot_index = [-1] * len(token_ids)
    for image, segment in zip(images, segments[1:], strict=True):
        ids = tokenize(segment)
        token_ids = token_ids + [0] * query_tokens + ids
        slot_index += [*range(image * query_tokens, (image + 1) * query_tokens), *([-1] * len(ids))]
    token_ids = [*token_ids, END_ID]
    slot_index.append(-1)
    too_long = len(token_ids) > max_tokens
    return TokenizedPrompt(
        token_ids=np.array(token_ids[:max_tokens], dtype=np.int64),
        slot_index=np.array(slot_index[:max_tokens], dtype=np.int64),
        cut_after=_before_cut(segments, tokenize, query_tokens, max_tokens) if too_long else None,
    )


def collate(
    prompts: Sequence[TokenizedPrompt], length: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Pad prompts to one length.

    Args:
        prompts: One or more.
        length: L, at least the longest prompt's; None: that one's.

    Returns:
        token_ids int64 [B,L] (padding 0), slot_index int64 [B,L] (padding -1), text_mask bool [B,L] (True on tokens).
    """
    shape = (len(prompts), length or max(len(prompt.token_ids) for prompt in prompts))
    token_ids = np.zeros(shape, dtype=np.int64)
    slot_index = np.full(shape, -1, dtype=np.int64)
    text_mask = np.zeros(shape, dtype=np.bool_)
    for i, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        token_ids[i, :length] = prompt.token_ids
        slot_index[i, :length] = prompt.slot_index
        text_mask[i, :length] = True
    return token_ids, slot_index, text_mask


def _before_cut(segments: Sequence[str], tokenize: Tokenize, query_tokens: int, max_tokens: int) -> str:
    """The last whole words and placeholders among the first `max_tokens` tokens.

    The tokenizer gives ids alone, so the cut word is found by tokenizing the segment's beginnings.
    """
    text, room = "", max_tokens
    for number, segment in enumerate(segments):
        if number > 0:
            if room < query_tokens:
                break
            text += PLACEHOLDER
            room -= query_tokens
        length = len(tokenize(segment))
        if length > room:
            words = segment.split()
            fitting = bisect_right(range(len(words) + 1), room, key=lambda n: len(tokenize(" ".join(words[:n])))) - 1
            text += " " + " ".join(words[:fitting])
            break
        text += segment
        room -= length
    return last_words(text)
