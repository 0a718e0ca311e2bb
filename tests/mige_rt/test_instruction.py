import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE
from mige_rt.errors import InputError
from mige_rt.instruction import (
    MAX_WORDS,
    PREFIXES,
    clean_caption,
    compose_prompt,
    count_placeholders,
    rewrite_instruction,
    words_before_cut,
)
from mige_rt.prompt_tokens import collate, tokenize_prompt
from mige_rt.tokenizer import load_tokenizer

CASES = json.loads((Path(__file__).parents[1] / "data" / "reference" / "text.json").read_text(encoding="utf-8"))


def by_word(text: str) -> list[int]:
    """One id a word, its length plus 10: easy to see through."""
    return [len(word) + 10 for word in text.split()]


@pytest.mark.parametrize(("text", "expected"), CASES["pre_caption"])
def test_captions_are_cleaned_as_published(text: str, expected: str) -> None:
    assert clean_caption(text) == expected


@pytest.mark.parametrize(("text", "scope", "expected"), CASES["update_instruction"])
def test_instructions_are_rewritten_as_published(text: str, scope, expected: str) -> None:
    assert rewrite_instruction(text, scope) == expected


@pytest.mark.parametrize("name", ["the image", "This Image", "this photo", "the PHOTO", "the picture", "this picture"])
def test_every_way_to_name_the_image_is_rewritten(name: str) -> None:
    assert rewrite_instruction(f"cut {name} in half", "local") == "cut <imagehere> in half"


def test_an_instruction_that_names_no_image_gets_it_in_place_of_its_full_stop() -> None:
    assert rewrite_instruction("add a hat.", "local") == "add a hat in<imagehere>"
    assert rewrite_instruction("make it a drawing.", "global") == "make it a drawing of<imagehere>"


def test_a_placeholder_in_any_case_counts_and_is_not_rewritten() -> None:
    assert count_placeholders("a <ImageHere> by <imagehere> on <IMAGEHERE>, no <image here>") == 3
    assert clean_caption("A <ImageHere>") == "a <imagehere>"
    assert rewrite_instruction("make <ImageHere> blue.", "local") == "make <imagehere> blue."


def test_the_prefix_keeps_its_punctuation_and_the_caption_loses_its_own() -> None:
    assert compose_prompt("edit", "Make it: RED!") == "Follow the instruction to edit the image:\n make it red"
    assert compose_prompt("compose", "<imagehere>") == "Subject-driven editing:\n <imagehere>"
    assert PREFIXES["subject"] == (
        "Follow the text instruction to generate an image with the given objects, preserving the subject's identity:"
    )


@pytest.mark.parametrize("caption", ["", " \n\t", "\t", "!!! ..."])
def test_a_caption_of_nothing_is_refused(caption: str) -> None:
    with pytest.raises(InputError, match="empty"):
        compose_prompt("subject", caption)


def test_a_caption_over_the_word_limit_says_where_it_is_cut() -> None:
    words = [f"w{number}" for number in range(MAX_WORDS + 2)]
    assert words_before_cut(" ".join(words[:MAX_WORDS])) is None
    assert words_before_cut(" ".join(words)) == "w82 w83 w84 w85 w86 w87"


def test_a_prompt_has_slots_where_its_images_stand_and_ends_with_the_end_of_sequence() -> None:
    prompt = tokenize_prompt("put <imagehere> beside <ImageHere> please", [3, 1], by_word, query_tokens=2)
    assert prompt.token_ids.tolist() == [13, 0, 0, 16, 0, 0, 16, 1]
    assert prompt.slot_index.tolist() == [-1, 6, 7, -1, 2, 3, -1, -1]
    assert prompt.token_ids.dtype == prompt.slot_index.dtype == np.int64
    assert prompt.cut_after is None


def test_segments_reach_the_tokenizer_with_their_spaces() -> None:
    seen: list[str] = []
    tokenize_prompt("put <imagehere> on<imagehere>", [0, 1], lambda text: seen.append(text) or [], query_tokens=1)
    assert seen == ["put ", " on", ""]


@pytest.mark.parametrize(
    ("limit", "ids", "slots", "kept"),
    [
        (9, [11, 11, 0, 0, 0, 11, 11, 11, 1], [-1, -1, 0, 1, 2, -1, -1, -1, -1], None),
        (8, [11, 11, 0, 0, 0, 11, 11, 11], [-1, -1, 0, 1, 2, -1, -1, -1], "a b <imagehere> c d e"),
        (7, [11, 11, 0, 0, 0, 11, 11], [-1, -1, 0, 1, 2, -1, -1], "a b <imagehere> c d"),
        (5, [11, 11, 0, 0, 0], [-1, -1, 0, 1, 2], "a b <imagehere>"),
        (4, [11, 11, 0, 0], [-1, -1, 0, 1], "a b"),
        (1, [11], [-1], "a"),
    ],
)
def test_a_long_prompt_is_cut_exactly_at_the_limit_and_says_where(limit: int, ids, slots, kept) -> None:
    prompt = tokenize_prompt("a b <imagehere> c d e", [0], by_word, query_tokens=3, max_tokens=limit)
    assert prompt.token_ids.tolist() == ids
    assert prompt.slot_index.tolist() == slots
    assert prompt.cut_after == kept


def test_a_cut_inside_a_word_names_the_last_whole_word() -> None:
    prompt = tokenize_prompt("aaa bbb ccc", [], lambda text: [5] * len(text.replace(" ", "")), 1, max_tokens=7)
    assert prompt.cut_after == "aaa bbb"


def test_the_limit_is_256_tokens() -> None:
    assert len(tokenize_prompt("a " * 300, [], by_word, query_tokens=32).token_ids) == 256


@pytest.mark.parametrize(
    ("text", "images"), [("a cat", [0]), ("<imagehere> and <imagehere>", [0]), ("<imagehere>", [])]
)
def test_placeholders_and_images_must_match_and_both_numbers_are_said(text: str, images: list[int]) -> None:
    with pytest.raises(InputError) as error:
        tokenize_prompt(text, images, by_word, query_tokens=2)
    assert f"is {count_placeholders(text)} and" in str(error.value)
    assert f"images is {len(images)};" in str(error.value)


def test_a_blank_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        tokenize_prompt(" \n", [], by_word, query_tokens=2)


def test_prompts_are_padded_on_the_right_to_the_longest() -> None:
    prompts = [tokenize_prompt(text, images, by_word, 2) for text, images in [("a", []), ("a <imagehere>", [0])]]
    token_ids, slot_index, text_mask = collate(prompts)
    assert token_ids.tolist() == [[11, 1, 0, 0], [11, 0, 0, 1]]
    assert slot_index.tolist() == [[-1, -1, -1, -1], [-1, 0, 1, -1]]
    assert text_mask.tolist() == [[True, True, False, False], [True, True, True, True]]
    assert (token_ids.dtype, slot_index.dtype, text_mask.dtype) == (np.int64, np.int64, np.bool_)


@pytest.mark.parametrize("content", [None, "", "{", '{"model": {"type": "Nothing"}}'])
def test_a_missing_or_corrupt_tokenizer_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:

    Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="another model"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_saved_with_truncation_and_a_template_still_gives_plain_segments(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(DEFAULT_MODEL / TOKENIZER_FILE))
    ids = tokenizer.encode("a cat and a dog", add_special_tokens=False).ids
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(ids) > 2 and load_tokenizer(tmp_path / "tokenizer.json")("a cat and a dog") == ids
