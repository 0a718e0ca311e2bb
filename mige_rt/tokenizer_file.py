"""What a tokenizer.json may hold: the few components of T5's tokenizers, checked before the library reads it.

The library trusts its files: patterns that backtrack, replacements that multiply, and tables whose offsets lead outside
end in a panic, in an abort or in all of the memory. Allowed is what `trainer.tokenizer` and T5's own files hold.
"""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from annotated_types import Ge, Le, MaxLen, MinLen

from mige_rt.bundle import load_json
from mige_rt.errors import InputError
from mige_rt.validation import validate

LARGEST = 64 << 20  # bytes of the file; T5's has 2.4 million
LONGEST_PIECE = 128  # characters; sentencepiece's own limit is 16
LONGEST_REPLACEMENT = 64  # bytes that a character may be normalized to; NFKC's longest has 33
_UNUSED = ("padding", "post_processor", "truncation")  # a segment's plain ids are all that is asked for

Piece = Annotated[str, MinLen(1), MaxLen(LONGEST_PIECE)]
Id = Annotated[int, Ge(0), Le(2**20)]


@dataclass(frozen=True)
class _AddedToken:
    id: Id
    content: Piece
    single_word: Literal[False]
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


@dataclass(frozen=True)
class _Precompiled:
    type: Literal["Precompiled"]
    precompiled_charsmap: str


@dataclass(frozen=True)
class _Spaces:
    Regex: Literal[" {2,}"]


@dataclass(frozen=True)
class _Replace:
    type: Literal["Replace"]
    pattern: _Spaces
    content: Literal[" ", "▁"]


@dataclass(frozen=True)
class _Normalizers:
    type: Literal["Sequence"]
    normalizers: Annotated[list[_Precompiled | _Replace], MinLen(1), MaxLen(2)]


@dataclass(frozen=True)
class _Metaspace:
    type: Literal["Metaspace"]
    replacement: Literal["▁"]
    prepend_scheme: Literal["first", "always", "never"]
    split: bool


@dataclass(frozen=True)
class _OldMetaspace:
    """The same, as the library wrote it before version 0.15."""

    type: Literal["Metaspace"]
    replacement: Literal["▁"]
    add_prefix_space: bool
    str_rep: Literal["▁"] | None = None


@dataclass(frozen=True)
class _WhitespaceSplit:
    type: Literal["WhitespaceSplit"]


@dataclass(frozen=True)
class _PreTokenizers:
    type: Literal["Sequence"]
    pretokenizers: Annotated[list[_WhitespaceSplit | _Metaspace | _OldMetaspace], MinLen(1), MaxLen(2)]


@dataclass(frozen=True)
class _Unigram:
    type: Literal["Unigram"]
    unk_id: Literal[2]
    vocab: Annotated[list[tuple[Piece, float]], MinLen(3), MaxLen(2**20)]
    byte_fallback: Literal[False] | None = None


@dataclass(frozen=True)
class _TokenizerFile:
    """What tokenizer.json holds."""

    version: Literal["1.0"]
    added_tokens: Annotated[list[_AddedToken], MaxLen(1024)]
    normalizer: _Precompiled | _Normalizers
    pre_tokenizer: _Metaspace | _OldMetaspace | _PreTokenizers
    decoder: _Metaspace | _OldMetaspace | None
    model: _Unigram


def read_tokenizer_file(path: Path) -> str:
    """A tokenizer.json as the library is to read it, without the parts that are never used.

    Raises:
        InputError: It cannot be read, or holds other components than T5's tokenizers.
    """
    remedy = "it may be of another model; take the one that belongs to it, or convert or export the model again"
    try:
        content: Any = load_json(path, LARGEST)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable tokenizer.json ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a readable tokenizer.json (it holds no object); {remedy}")
    fields = cast("dict[str, Any]", content)
    fields = {name: value for name, value in fields.items() if name not in _UNUSED}
    try:
        tokenizer = validate(_TokenizerFile, fields, f"{path} is not a readable tokenizer.json of T5's kind")
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from error
    if problem := _problem(tokenizer):
        raise InputError(f"{path} is not a readable tokenizer.json of T5's kind: {problem}; {remedy}")
    return json.dumps(fields | dict.fromkeys(_UNUSED))


def _problem(tokenizer: _TokenizerFile) -> str | None:
    """What does not hold beyond the fields' types, if anything."""
    vocab = tokenizer.model.vocab
    if not all(math.isfinite(score) for _, score in vocab):
        return "a piece's score is not finite"
    for token in tokenizer.added_tokens:
        if token.id >= len(vocab) or vocab[token.id][0] != token.content:
            return f"the added token {token.content!r} has the id {token.id}, which is not that of such a piece"
    normalizer = tokenizer.normalizer
    parts: Sequence[object] = normalizer.normalizers if isinstance(normalizer, _Normalizers) else [normalizer]
    charsmaps = [part.precompiled_charsmap for part in parts if isinstance(part, _Precompiled)]
    if len(charsmaps) != 1:
        return f"it has {len(charsmaps)} normalizers of the type Precompiled, one is expected"
    return _charsmap_problem(charsmaps[0])


def _charsmap_problem(text: str) -> str | None:
    """What is wrong with sentencepiece's table of normalized characters, if anything.

    Its form: the bytes of a trie (32-bit little-endian), the trie (darts-clone's units of 32 bits), and the normalized
    strings, each ended by a zero byte. A unit's offset leads to a block of 256, and a leaf's value to a string.
    """
    try:
        data = base64.b64decode(text, validate=True)
        size = int.from_bytes(data[:4], "little")
        strings = data[4 + size :]
        strings.decode()
    except ValueError:
        return "its precompiled_charsmap is no table of characters"
    if size % 1024 or not 0 < size <= len(data) - 4 or not strings.endswith(b"\0"):
        return "its precompiled_charsmap is no table of characters"
    units = np.frombuffer(data, "<u4", size // 4, 4)
    places = np.flatnonzero(units >> 31 == 0).astype(np.uint32)  # of the units that are no leaves
    inner = units[places]
    targets = places ^ ((inner >> 10) << ((inner & 0x200) >> 6))
    if (targets >> 8).max(initial=0) >= len(units) // 256:
        return "its precompiled_charsmap leads outside of itself"
    values = units[targets[inner & 0x100 > 0]] & 0x7FFFFFFF
    if values.max(initial=0) >= len(strings):
        return "its precompiled_charsmap leads outside of itself"
    if ((np.frombuffer(strings, np.uint8)[values] & 0xC0) == 0x80).any():
        return "its precompiled_charsmap leads into a character"
    if max(map(len, strings.split(b"\0"))) > LONGEST_REPLACEMENT:
        return f"its precompiled_charsmap replaces a character by more than {LONGEST_REPLACEMENT} bytes"
    return None
