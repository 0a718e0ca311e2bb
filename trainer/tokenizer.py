"""Tokenizers with T5's conventions, as `tokenizers.Tokenizer`: read from a sentencepiece model, or trained.

Saved as tokenizer.json, they are all that inference needs; sentencepiece is not.
"""

import io
import string
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram

from mige_rt.errors import InputError
from mige_rt.instruction import split_segments

SPECIALS = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2
LONGEST_PIECE = 16  # characters, sentencepiece's own limit
EXTRA_IDS = 100  # T5's sentinels, behind the pieces, the highest number first


def from_spiece(path: str | Path) -> Tokenizer:
    """The tokenizer of T5's spiece.model: its pieces, then `<extra_id_99>` to `<extra_id_0>`.

    It gives the ids of T5TokenizerFast in transformers 4, which include a segment's trailing space.

    Args:
        path: T5's spiece.model.

    Raises:
        InputError: The file is missing, is not a sentencepiece model, or does not follow T5's conventions.
    """
    path = Path(path)
    try:
        model = ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error}); T5's sentencepiece model (spiece.model) is expected"
        ) from error
    except DecodeError as error:
        raise InputError(
            f"{path} is not a sentencepiece model, or is incomplete; download T5's spiece.model again"
        ) from error
    first_pieces = tuple(piece.piece for piece in model.pieces[: len(SPECIALS)])
    if first_pieces != SPECIALS or model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        raise InputError(
            f"{path} is not T5's: a unigram model that begins with {', '.join(SPECIALS)} is expected, "
            f"this one begins with {', '.join(first_pieces) or 'nothing'}; use the spiece.model that belongs to the "
            "checkpoint"
        )
    return _tokenizer(model, EXTRA_IDS)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a unigram tokenizer for a small model.

    Conventions are T5's (`<pad>` 0, `</s>` 1, `<unk>` 2), without the sentinels, which nothing here uses. Every
    printable ASCII character has a piece, so that no English text is unknown. The same texts give the same tokenizer.

    Args:
        texts: Instructions, with `<imagehere>` where an image stands.
        vocab_size: The most pieces; there are fewer when the texts do not hold as many.

    Raises:
        ValueError: `vocab_size` is too small for the characters.
    """
    segments = [segment for text in texts for segment in split_segments(text)]
    model = io.BytesIO()
    try:
        with tempfile.TemporaryDirectory() as folder:
            seeds = Path(folder) / "seeds.tsv"
            seeds.write_text(_seed_pieces(segments), encoding="utf-8", newline="\n")
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(segments),
                model_writer=model,
                seed_sentencepieces_file=str(seeds),
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=1.0,
                required_chars=string.digits + string.ascii_letters + string.punctuation,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                num_threads=1,  # a sum in another order could give another vocabulary
                minloglevel=2,
            )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces can be trained on these texts: {error}") from error
    return _tokenizer(ModelProto.FromString(model.getvalue()), extra_ids=0)


def _seed_pieces(segments: Iterable[str]) -> str:
    """Candidates for pieces: each part of a word that occurs twice or more, and its count; one a line.

    Sentencepiece's own candidates count each distinct word once, however often it occurs, so that a small vocabulary
    would hold no whole words.
    """
    words = Counter("▁" + word for segment in segments for word in unicodedata.normalize("NFKC", segment).split())
    counts = Counter[str]()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 2, min(start + LONGEST_PIECE, len(word)) + 1):
                counts[word[start:end]] += count
    return "".join(f"{piece}\t{count}\n" for piece, count in counts.items() if count > 1)


def _tokenizer(model: ModelProto, extra_ids: int) -> Tokenizer:
    """The tokenizer of a sentencepiece model with so many sentinels."""
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(extra_ids))]
    tokenizer = Tokenizer(Unigram([*pieces, *((name, 0.0) for name in sentinels)], unk_id=SPECIALS.index("<unk>")))
    # Spaces are collapsed but not stripped: the published model was trained with the piece of a trailing space.
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    # "first", since the text behind a special token gets no space of its own ("a</s>b" -> "▁a", "</s>", "b").
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (*SPECIALS, *sentinels)])
    return tokenizer
