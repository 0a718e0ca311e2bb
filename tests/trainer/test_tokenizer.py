"""Tokenizers read from T5's sentencepiece model give its ids; trained ones follow the same conventions."""

import json
import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mige_rt.errors import InputError
from mige_rt.tokenizer import load_tokenizer
from trainer.tokenizer import from_spiece, train_tokenizer

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
SEGMENTS = json.loads((REFERENCE / "tokens.json").read_text(encoding="utf-8"))["segments"]
THINGS = ("cat", "dog", "red fox", "blue cup", "pencil", "car", "tree", "violin", "lamp", "apple pie")
TEXTS = [
    f"{start} the {thing} {middle} the {other} in <imagehere>"
    for thing in THINGS
    for other in THINGS
    for start, middle in (("replace", "with"), ("add", "beside"), ("remove", "from"))
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


@pytest.mark.parametrize(("text", "ids", "pieces"), SEGMENTS)
def test_a_spiece_model_gives_the_published_ids_after_saving(
    tmp_path: Path, text: str, ids: list[int], pieces: list[str]
) -> None:
    tokenizer = from_spiece(REFERENCE / "spiece.model")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json")(text) == ids


def test_the_sentinels_stand_behind_the_pieces_in_reverse() -> None:
    tokenizer = from_spiece(REFERENCE / "spiece.model")
    assert tokenizer.get_vocab_size() == 1300
    assert [tokenizer.token_to_id(name) for name in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert [tokenizer.token_to_id(f"<extra_id_{n}>") for n in (0, 99)] == [1299, 1200]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"not a model at all", None]
)
def test_a_damaged_or_missing_spiece_model_is_refused_by_name(tmp_path: Path, damage) -> None:
    path = tmp_path / "spiece.model"
    if damage is not None:
        path.write_bytes(damage((REFERENCE / "spiece.model").read_bytes()))
    with pytest.raises(InputError, match=r"spiece\.model"):
        from_spiece(path)


def test_a_trained_tokenizer_follows_the_same_conventions(trained: Tokenizer) -> None:
    assert [trained.token_to_id(name) for name in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert trained.token_to_id("<extra_id_0>") is None
    assert trained.encode("replace the\n  dog in ").tokens[-1] == "▁"
    assert trained.encode("replace the\n  dog in ").ids == trained.encode("replace the dog in ").ids
    assert trained.encode("").ids == []


def test_a_trained_tokenizer_learns_words_and_knows_every_ascii_character(trained: Tokenizer) -> None:
    assert trained.encode("replace the violin").tokens == ["▁replace", "▁the", "▁violin"]
    for character in string.digits + string.ascii_letters + string.punctuation + string.whitespace:
        assert 2 not in trained.encode(character).ids, f"{character!r} is unknown"
    assert 2 in trained.encode("狐").ids


def test_the_same_texts_give_the_same_tokenizer(trained: Tokenizer) -> None:
    assert train_tokenizer(iter(TEXTS), 400).to_str() == trained.to_str()


def test_a_trained_tokenizer_survives_saving(tmp_path: Path, trained: Tokenizer) -> None:
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenize = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenize("add the cat in ") == trained.encode("add the cat in ").ids
    assert 1 not in tokenize("add the cat in ")


def test_a_vocabulary_too_small_for_the_characters_is_refused() -> None:
    with pytest.raises(ValueError, match="60"):
        train_tokenizer(TEXTS, 60)
