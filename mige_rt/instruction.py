"""A multimodal instruction: text segments and picture slots -> token ids, slot index, mask.

Shapes: B prompts, L tokens, Q query tokens a picture, N pictures in the whole batch. The rules are the paper's
training form (MIGE, multimodal instructions), which is used for training and for inference alike.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mige_rt.errors import InputError

PLACEHOLDER = "<imagehere>"
MAX_WORDS = 88  # of a cleaned caption, as published
END_OF_SEQUENCE = "</s>"
END_ID = 1

Task = Literal["subject", "edit", "compose"]

PREFIXES: dict[Task, str] = {
    "subject": (
        "Follow the text instruction to generate an image with the given objects, preserving the subject's identity:"
    ),
    "edit": "Follow the instruction to edit the image:",
    "compose": "Subject-driven editing:",
}

Tokenize = Callable[[str], list[int]]  # one text segment -> its ids, without special tokens

_ANY_CASE_PLACEHOLDER = re.compile(re.escape(PLACEHOLDER), re.IGNORECASE)
_BLANKED = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_PICTURE_NAMES = ("the image", "this image", "this photo", "the photo", "the picture", "this picture")
_WORDS_SHOWN = 6  # at the end of what a cut left


def count_placeholders(text: str) -> int:
    """How many pictures the text asks for; a placeholder counts in any case, as in `<ImageHere>`."""
    return len(split_segments(text)) - 1


def split_segments(text: str) -> list[str]:
    """The text before, between and behind the placeholders, spaces and all: one more than there are placeholders."""
    return _ANY_CASE_PLACEHOLDER.split(text)


def clean_caption(text: str) -> str:
    """The published caption clean-up: lower case, punctuation to spaces, spaces collapsed, at most 88 words.

    Placeholders come out in lower case. One behind the 88th word is lost with the words: see `words_kept`.
    """
    return " ".join(_clean_words(text)[:MAX_WORDS])


def words_kept(text: str) -> str | None:
    """The last words that `clean_caption` leaves of a caption too long for it; None when it cuts nothing."""
    words = _clean_words(text)
    return _last_words(" ".join(words[:MAX_WORDS])) if len(words) > MAX_WORDS else None


def rewrite_instruction(text: str, scope: Literal["local", "global"]) -> str:
    """The published rewriting of a plain edit instruction into a multimodal one, to be cleaned afterwards.

    Every mention of "the image", "this photo" and the like becomes a placeholder; an instruction without one gets it
    at its end: ` in<imagehere>` for a local edit, ` of<imagehere>` for a global one. The result may hold several
    placeholders: all of them are the source picture.
    """
    text = _ANY_CASE_PLACEHOLDER.sub(PLACEHOLDER, text)
    for name in _PICTURE_NAMES:
        text = re.sub(rf"\s*{name}\s*", f" {PLACEHOLDER} ", text, flags=re.IGNORECASE)
    if PLACEHOLDER in text:
        return text
    return text.rstrip(".") + (" of" if scope == "global" else " in") + PLACEHOLDER


def compose_prompt(task: Task, caption: str) -> str:
    """The task's prefix, a line break and a space, then the cleaned caption (the prefix itself stays as it is).

    Raises InputError when nothing is left of the caption.
    """
    cleaned = clean_caption(caption)
    if not cleaned.strip():
        raise InputError(f"the prompt is empty ({caption!r}); say in words what the picture should be")
    return f"{PREFIXES[task]}\n {cleaned}"


def load_tokenizer(path: str | Path) -> Tokenize:
    """Reads a `tokenizer.json`; the function returned gives a text segment's ids without special tokens.

    Raises InputError when the file is missing, is no tokenizer, or does not end a sequence as T5 does (`</s>` = 1).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"no tokenizer at {path}: a tokenizer.json is expected there; give a whole model folder or bundle"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(
            f"{path} is not a readable tokenizer.json ({error}); make or download the model again"
        ) from error
    if tokenizer.token_to_id(END_OF_SEQUENCE) != END_ID:
        found = tokenizer.token_to_id(END_OF_SEQUENCE)
        raise InputError(
            f"{path} is the tokenizer of another model: its {END_OF_SEQUENCE} has the id {found}, "
            f"{END_ID} is expected; use the tokenizer that belongs to the model"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """One prompt as the text encoder takes it."""

    token_ids: NDArray[np.int64]  # [L], 0 where a picture stands
    slot_index: NDArray[np.int64]  # [L], row of the N*Q image tokens at each position, -1 for text
    kept: str | None  # None when nothing was cut, otherwise the last words before the cut


def encode_prompt(
    text: str, pictures: Sequence[int], tokenize: Tokenize, query_tokens: int, max_tokens: int = 256
) -> EncodedPrompt:
    """Text segments tokenised one by one, Q slots for each placeholder, one end-of-sequence id at the end.

    `pictures[k]` says which of the batch's N pictures stands at the text's k-th placeholder. A sequence of more than
    `max_tokens` is cut at its end, as published: the end-of-sequence id goes with it, and the cut may pass through a
    picture.

    Raises InputError when the text is blank or its placeholders are not as many as the pictures.
    """
    if not text.strip():
        raise InputError(f"the prompt is empty ({text!r}); say in words what the picture should be")
    segments = split_segments(text)
    if len(segments) - 1 != len(pictures):
        raise InputError(
            f"the number of {PLACEHOLDER} in the prompt is {len(segments) - 1} and the number of pictures is "
            f"{len(pictures)}; give one picture for each placeholder, in their order"
        )
    token_ids = tokenize(segments[0])
    slot_index = [-1] * len(token_ids)
    for picture, segment in zip(pictures, segments[1:], strict=True):
        ids = tokenize(segment)
        token_ids = token_ids + [0] * query_tokens + ids
        slot_index += [*range(picture * query_tokens, (picture + 1) * query_tokens), *([-1] * len(ids))]
    token_ids = [*token_ids, END_ID]
    slot_index.append(-1)
    return EncodedPrompt(
        token_ids=np.array(token_ids[:max_tokens], dtype=np.int64),
        slot_index=np.array(slot_index[:max_tokens], dtype=np.int64),
        kept=_before_cut(segments, tokenize, query_tokens, max_tokens) if len(token_ids) > max_tokens else None,
    )


def collate(
    prompts: Sequence[EncodedPrompt],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """token_ids [B,L] (padding 0), slot_index [B,L] (padding -1), text_mask [B,L] (True on real tokens).

    L is the longest prompt's length: nothing is padded further.
    """
    shape = (len(prompts), max(len(prompt.token_ids) for prompt in prompts))
    token_ids = np.zeros(shape, dtype=np.int64)
    slot_index = np.full(shape, -1, dtype=np.int64)
    text_mask = np.zeros(shape, dtype=np.bool_)
    for row, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        token_ids[row, :length] = prompt.token_ids
        slot_index[row, :length] = prompt.slot_index
        text_mask[row, :length] = True
    return token_ids, slot_index, text_mask


def _clean_words(text: str) -> list[str]:
    spaced = re.sub(r"\s{2,}", " ", text.lower().translate(_BLANKED))
    return spaced.rstrip("\n").strip(" ").split(" ")


def _last_words(text: str) -> str:
    return " ".join(text.split()[-_WORDS_SHOWN:])


def _before_cut(segments: Sequence[str], tokenize: Tokenize, query_tokens: int, room: int) -> str:
    """The last whole words and placeholders among the first `room` tokens.

    The tokenizer gives ids alone, so the cut word is found by tokenising the segment's beginnings.
    """
    kept = ""
    for number, segment in enumerate(segments):
        if number > 0:
            if room < query_tokens:
                break
            kept += PLACEHOLDER
            room -= query_tokens
        length = len(tokenize(segment))
        if length > room:
            words = segment.split()
            fitting = bisect_right(range(len(words) + 1), room, key=lambda n: len(tokenize(" ".join(words[:n])))) - 1
            kept += " " + " ".join(words[:fitting])
            break
        kept += segment
        room -= length
    return _last_words(kept)
