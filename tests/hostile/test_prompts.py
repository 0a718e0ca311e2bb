"""Prompts: refused where nothing can be made of them, linear in their length, and never a command to the terminal."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import Case, cases, check_case, given

from mige_rt.instruction import MAX_CHARACTERS, clean_caption, rewrite_instruction

SCENE = Path(__file__).parents[2] / "docs/scene.png"
OUT = ("--out", "made.png", "--steps", "2", "--seed", "1")


def prompt(text: str, *arguments: str | Path) -> Callable[[Path], Sequence[str | Path]]:
    return given("run", "--prompt", text, *arguments, *OUT)


LONG = {
    "spaces": " " * 120_000 + "x",
    "line breaks": "\n" * 120_000 + "x",
    "tabs and spaces": "\t " * 60_000 + "x",
    "no-break spaces": "\u00a0" * 120_000 + "x",
    "words": "a cat " * 20_000,
    "one word": "x" * 120_000,
    "full stops": "." * 120_000 + "x",
    "names of the image": "the image " * 12_000,
    "beginnings of a placeholder": "<" * 120_000,
    "placeholders": "<imagehere>" * 12_000,
    "emoji": "🐱" * 30_000,
    "combining marks": "a" + "\u0301" * 119_999,
    "one character too many": "x" * (MAX_CHARACTERS + 1),
}
REFUSED = [
    *(
        Case(f"{name}{suffix}", prompt(text, *arguments), r"the prompt has [0-9,]+ characters; at most 10,000")
        for name, text in LONG.items()
        for suffix, arguments in {"": (), " about a source": ("--source", SCENE)}.items()
    ),
    *(
        Case(f"empty: {name}", prompt(text, *arguments), "the prompt is empty")
        for name, text in {
            "": "",
            "spaces": "  ",
            "a line break": "\n",
            "full stops": "...",
            "marks": '!"()*#:;~',
        }.items()
        for arguments in ((),)
    ),
    Case("half a character", prompt("a \ud800 cat"), "half a character at position 2"),
    Case("undecodable bytes", prompt("a \udcff cat"), "half a character at position 2"),
    Case("a placeholder without an image", prompt("a <imagehere>"), "1 <imagehere> and 0 images"),
    Case("an image without a placeholder", prompt("a cat", "--image", SCENE), "0 <imagehere> and 1 images"),
    Case("900 placeholders", prompt("<imagehere>" * 900, "--image", SCENE), "900 <imagehere> and 1 images"),
    Case("placeholders of two sources", prompt("<imagehere> <imagehere>", "--source", SCENE), "2 <imagehere>"),
    Case("a task without its source", prompt("a cat", "--task", "edit"), "'edit' needs a source image"),
    Case("a task with a source too many", prompt("a cat", "--task", "subject", "--source", SCENE), "takes no source"),
]
ODD = {  # what a model can make nothing of, and does
    "escapes": ("a \x1b[2J cat", ""),
    "a title": ("\x1b]0;owned\x07", ""),
    "right to left": ("a \u202e cat", ""),
    "markup": ("a [/red] cat [link=x]", ""),
    "a zero-width joiner": ("\u200d", ""),
    "an unassigned character": ("\U000e0fff \uffff", ""),
    "a format": ("%s %n {0} {x!r} ${HOME} `id`", ""),
    "markers of the tokenizer": ("</s> <pad> <unk> <extra_id_0> \u2581", ""),
    "half a placeholder": ("a <imagehere or imagehere>", ""),
    "as many characters as are taken": ("x" * MAX_CHARACTERS, ""),
    "as many words": ("a " * (MAX_CHARACTERS // 2), "too long and was cut after"),
    "a cut with escapes": ("a " * 87 + "\x1b[2J" + " b" * 9, r"was cut after: .*\\x1b\[2j"),
    "a cut after a long word": ("x" * 9_000 + " b" * 400, "was cut after"),
    "many combining marks": ("a" + "\u0301" * 5_000, ""),
}


@cases(REFUSED)
def test_prompts(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(case, tmp_path, monkeypatch)


@cases([Case(name, prompt(text), says, 0) for name, (text, says) in ODD.items()])
def test_odd_prompts_make_an_image_that_repeats_them(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_case(case, tmp_path, monkeypatch)
    with Image.open(tmp_path / "made.png") as image:
        assert image.size == (64, 64)
        assert image.info["prompt"] == ODD[case.name][0]


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_the_clean_up_is_linear(text: str) -> None:
    """A pattern that tries each space anew would take an hour here, and the limit would only hide it."""
    text *= 10
    assert len(clean_caption(text).split()) <= 88
    assert "<imagehere>" in rewrite_instruction(text, "local")


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("make  the image  blue", "make <imagehere> blue"),
        ("the image\n", " <imagehere> "),
        ("put the image the image here", "put <imagehere>  <imagehere> here"),
        ("\u3000This Photo\u00a0and the picture.", " <imagehere> and <imagehere> ."),
        ("blue", "blue in<imagehere>"),
    ],
)
def test_spaces_around_a_name_of_the_image_become_one(text: str, rewritten: str) -> None:
    assert rewrite_instruction(text, "local") == rewritten


def test_a_long_prompt_of_a_batch_is_its_own_lines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(folder: Path) -> Sequence[str]:
        lines = [{"prompt": LONG["spaces"]}, {"prompt": "a red apple"}]
        (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return "run", "--batch", "requests.jsonl", *OUT

    check_case(Case("", make, "requests.jsonl line 1: the prompt has 120,001 characters", 1), tmp_path, monkeypatch)
    assert (tmp_path / "made-2.png").is_file()
