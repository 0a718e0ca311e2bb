"""A multimodal instruction in words: placeholders, the published clean-up and rewriting, the tasks' prefixes.

The rules are the paper's training form (MIGE, section 3.1), which is used for training and for inference alike.
"""

import re
from typing import Literal

from mige_rt.errors import InputError

PLACEHOLDER = "<imagehere>"
MAX_WORDS = 88  # of a cleaned caption, as published
MAX_CHARACTERS = 10_000  # of a prompt; far more than 88 words have

Task = Literal["subject", "edit", "compose"]
EditScope = Literal["local", "global"]

PREFIXES: dict[Task, str] = {
    "subject": (
        "Follow the text instruction to generate an image with the given objects, preserving the subject's identity:"
    ),
    "edit": "Follow the instruction to edit the image:",
    "compose": "Subject-driven editing:",
}

PLACEHOLDER_PATTERN = re.compile(re.escape(PLACEHOLDER), re.IGNORECASE)  # counts in any case, as in <ImageHere>
_BLANKED = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_IMAGE_NAMES = ("the image", "this image", "this photo", "the photo", "the picture", "this picture")
_WORDS_SHOWN = 6  # before a cut


def count_placeholders(text: str) -> int:
    """How many images the text refers to; a placeholder counts in any case, as in `<ImageHere>`."""
    return len(split_segments(text)) - 1


def split_segments(text: str) -> list[str]:
    """The text before, between and behind the placeholders, spaces and all: one more than there are placeholders."""
    return PLACEHOLDER_PATTERN.split(text)


def check_length(text: str) -> None:
    """Raises InputError when a prompt has more than MAX_CHARACTERS."""
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"the prompt has {len(text):,} characters; at most {MAX_CHARACTERS:,} are expected, of which {MAX_WORDS} "
            "words count; make it shorter"
        )


def clean_caption(text: str) -> str:
    """The published caption clean-up: lower case, punctuation to spaces, spaces collapsed, at most 88 words.

    Placeholders come out in lower case. One behind the 88th word is lost with the words: see `words_before_cut`.
    """
    return " ".join(_clean_words(text)[:MAX_WORDS])


def words_before_cut(text: str) -> str | None:
    """The last words that `clean_caption` leaves of a caption that is too long; None when it cuts nothing."""
    words = _clean_words(text)
    return last_words(" ".join(words[:MAX_WORDS])) if len(words) > MAX_WORDS else None


def rewrite_instruction(text: str, scope: EditScope) -> str:
    """The published rewriting of a plain edit instruction into a multimodal one, to be cleaned afterwards.

    Every mention of "the image", "this photo" and the like becomes a placeholder; an instruction without one gets it
    at its end: ` in<imagehere>` for a local edit, ` of<imagehere>` for a global one. The result may hold several
    placeholders: all of them are the source image.
    """
    text = PLACEHOLDER_PATTERN.sub(PLACEHOLDER, text)
    for name in _IMAGE_NAMES:
        text = _with_placeholders(text, name)
    if PLACEHOLDER in text:
        return text
    return text.rstrip(".") + (" of" if scope == "global" else " in") + PLACEHOLDER


def compose_prompt(task: Task, caption: str) -> str:
    """The task's prefix, a line break and a space, then the cleaned caption (the prefix itself stays as it is).

    Raises:
        InputError: Nothing is left of the caption.
    """
    cleaned = clean_caption(caption)
    if not cleaned.strip():
        raise InputError(f"the prompt is empty ({caption!r}); say in words what the image should be")
    return f"{PREFIXES[task]}\n {cleaned}"


def _clean_words(text: str) -> list[str]:
    spaced = re.sub(r"\s{2,}", " ", text.lower().translate(_BLANKED))
    return spaced.rstrip("\n").strip(" ").split(" ")


def _with_placeholders(text: str, name: str) -> str:
    """The text with a placeholder and one space on either side of it for each `name` and the spaces around that."""
    # Not a pattern with the spaces in it, which would try each of very many spaces anew.
    first, *segments = re.split(name, text, flags=re.IGNORECASE)
    if not segments:
        return text
    *middle, last = segments
    return f" {PLACEHOLDER} ".join([first.rstrip(), *(segment.strip() for segment in middle), last.lstrip()])


def last_words(text: str) -> str:
    """The end of a text, as a warning shows it."""
    return " ".join(text.split()[-_WORDS_SHOWN:])
