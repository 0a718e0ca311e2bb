"""Request files: what is no file of requests is refused whole, a bad line alone, and nothing is read without end."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import Case, cases, check_answer, check_case, contents, given

from mige_rt.cli import main
from mige_rt.requests import MAX_LINE, read_lines

OUT = ("--out", "made.png", "--steps", "2", "--seed", "1")
BATCH = ("run", "--batch", "requests.jsonl", *OUT)
APPLE = '{"prompt": "a red apple"}'


def file_of(content: bytes | str) -> Callable[[Path], Sequence[str]]:
    """A run of a request file with this content."""

    def make(folder: Path) -> Sequence[str]:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (folder / "requests.jsonl").write_bytes(data)
        return BATCH

    return make


def sparse(size: int) -> Callable[[Path], Sequence[str]]:
    """A run of a request file of as many zeros, which take no room on the disk."""

    def make(folder: Path) -> Sequence[str]:
        with (folder / "requests.jsonl").open("wb") as file:
            file.truncate(size)
        return BATCH

    return make


def an_image(folder: Path) -> Sequence[str]:
    Image.effect_noise((64, 64), 90).save(folder / "requests.jsonl", format="PNG")
    return BATCH


def a_loop(folder: Path) -> Sequence[str]:
    (folder / "requests.jsonl").symlink_to("requests.jsonl")
    return BATCH


FILES = [
    Case("empty", file_of(""), "holds no line; one JSON object a line"),
    Case("blank", file_of(" \n\r\n\t\n\n"), "holds no line"),
    Case("a byte-order mark alone", file_of("\ufeff"), "holds no line"),
    Case("no UTF-8", file_of(b"\xff\xfe{\x00}\x00"), "line 1 is no UTF-8; save it as UTF-8"),
    Case("UTF-16", file_of(APPLE.encode("utf-16")), "line 1 is no UTF-8"),
    Case(
        "Latin-1 in the third line", file_of(f"{APPLE}\n\n".encode() + b'{"prompt": "caf\xe9"}'), "line 3 is no UTF-8"
    ),
    Case("surrogates as UTF-8", file_of('{"prompt": "a \ud800 cat"}'), "line 1 is no UTF-8"),
    Case("an image", an_image, "is no UTF-8"),
    Case("one long line", file_of("x" * (MAX_LINE + 1)), r"line 1 has more than 1,048,576 characters"),
    Case("a long second line", file_of(f"{APPLE}\n{' ' * MAX_LINE}{APPLE}"), "line 2 has more than 1,048,576"),
    Case("zeros without end", given("run", "--batch", "/dev/zero", *OUT), "/dev/zero line 1 has more than 1,048,576"),
    Case("random bytes without end", given("run", "--batch", "/dev/urandom", *OUT), "/dev/urandom (cannot|line)"),
    Case("nothing", given("run", "--batch", "/dev/null", *OUT), "/dev/null holds no line"),
    Case("4 GB of zeros", sparse(4 * 2**30), "line 1 has more than 1,048,576"),
    Case("100,001 requests", file_of(f"{APPLE}\n" * 100_001), "too large: at most 100,000 requests"),
    Case(
        "300 MB of blank lines",
        file_of((b" " * 1023 + b"\n") * 300_000),
        "too large: .*268,435,456 characters",
        long=True,
    ),
    Case("a folder", lambda folder: (folder / "requests.jsonl").mkdir() or BATCH, "is a directory"),
    Case("a link to itself", a_loop, "cannot be read .*symbolic links"),
    Case("--source besides", given(*BATCH, "--source", "x.png"), "stand in the lines of the --batch file"),
    Case("--image besides", given(*BATCH, "--image", "x.png"), "stand in the lines of the --batch file"),
    Case("--prompt besides", given(*BATCH, "--prompt", "x"), "either --prompt or --batch"),
]
LINES = {  # none of them makes an image, and the next line does
    "no JSON": ("red apple", "it is no JSON"),
    "a comment": ("# a red apple", "it is no JSON"),
    "single quotes": ("{'prompt': 'x'}", "it is no JSON"),
    "a trailing comma": ('{"prompt": "x",}', "it is no JSON"),
    "cut": ('{"prompt": "x"', "it is no JSON"),
    "two objects": (APPLE + APPLE, "it is no JSON .*Extra data"),
    "a zero byte": ("\0", "it is no JSON"),
    "escapes": ("\x1b[2J", "it is no JSON"),
    "brackets within brackets": ("[" * 100_000, "nested too deeply"),
    "objects within objects": ('{"truth":' * 50_000, "nested too deeply"),
    "a number of 5,000 digits": (f'{{"prompt": "x", "seed": {"9" * 5_000}}}', "numbers are too long"),
    "a list": ("[]", "it is a list; write an object"),
    "a string": ('"a red apple"', "it is a str; write an object"),
    "a number": ("1", "it is a int; write an object"),
    "null": ("null", "it is a NoneType; write an object"),
    "an empty object": ("{}", "missing prompt"),
    "no prompt": ('{"seed": 1}', "missing prompt"),
    "a prompt of null": ('{"prompt": null}', "missing prompt"),
    "an empty prompt": ('{"prompt": ""}', "the prompt is empty"),
    "a number as prompt": ('{"prompt": 1}', "prompt is 1, expected a string"),
    "a list as prompt": ('{"prompt": ["x"]}', "prompt is .*expected a string"),
    "half a character": (r'{"prompt": "a \ud800 cat"}', "half a character|UTF-8|surrogate"),
    "two prompts": ('{"prompt": "x", "prompt": "y"}', "it has 'prompt' 2 times"),
    "a misspelt field": ('{"prompt": "x", "imges": []}', "unknown imges, did you mean images"),
    "an unknown field": ('{"prompt": "x", "__class__": "y"}', "unknown __class__, known are"),
    "an unknown field with escapes": (r'{"prompt": "x", "\u001b[2J": 1}', r"unknown \\x1b\[2J"),
    "an unknown field with markup": ('{"prompt": "x", "[/x]": 1}', r"unknown \[/x\]"),
    "an empty field": ('{"prompt": "x", "": 1}', "unknown"),
    "a text as images": ('{"prompt": "x", "images": "a.png"}', "images is 'a.png', expected a list"),
    "an object as images": ('{"prompt": "x", "images": {}}', "images is {}, expected a list"),
    "a number among the images": ('{"prompt": "a <imagehere>", "images": [1]}', r"images\[0\] is 1, expected a string"),
    "null among the images": (
        '{"prompt": "a <imagehere>", "images": [null]}',
        r"images\[0\] is None, expected a string",
    ),
    "a missing image": ('{"prompt": "a <imagehere>", "images": ["none.png"]}', "no image file at .*none.png"),
    "an empty name of an image": ('{"prompt": "a <imagehere>", "images": [""]}', "no image file"),
    "an image with a zero byte": (r'{"prompt": "a <imagehere>", "images": ["a\u0000b"]}', "no image file"),
    "an image with escapes": (r'{"prompt": "a <imagehere>", "images": ["\u001b[2J"]}', r"no image file at .*\\x1b\[2J"),
    "an image without end": (
        '{"prompt": "a <imagehere>", "images": ["/dev/zero"]}',
        "/dev/zero, it is no regular file",
    ),
    "an image of 5,000 characters": (json.dumps({"prompt": "a <imagehere>", "images": ["x" * 5000]}), "no image file"),
    "the request file as image": ('{"prompt": "a <imagehere>", "images": ["requests.jsonl"]}', "is not an image"),
    "900 images": (json.dumps({"prompt": "x", "images": ["none.png"] * 900}), "no image file"),
    "a folder as source": ('{"prompt": "x", "source": "."}', "no image file at .*folder"),
    "a list as source": ('{"prompt": "x", "source": []}', r"source is \[\], expected a string"),
    "a seed below 0": ('{"prompt": "x", "seed": -1}', "seed is -1; 0 or more"),
    "half a seed": ('{"prompt": "x", "seed": 0.5}', "seed is 0.5, expected an integer"),
    "a seed of 1.0": ('{"prompt": "x", "seed": 1.0}', "seed is 1.0, expected an integer"),
    "a text as seed": ('{"prompt": "x", "seed": "1"}', "seed is '1', expected an integer"),
    "true as seed": ('{"prompt": "x", "seed": true}', "seed is True, expected an integer"),
    "no number as seed": ('{"prompt": "x", "seed": NaN}', "cannot be used|no JSON"),
    "an infinite seed": ('{"prompt": "x", "seed": Infinity}', "cannot be used|no JSON"),
    "an unknown task": ('{"prompt": "x", "task": "paint"}', "task is 'paint', expected 'subject', 'edit' or 'compose'"),
    "a task without source": ('{"prompt": "x", "task": "edit"}', "'edit' needs a source image"),
    "an id that leaves the folder": (
        '{"prompt": "x", "id": "../x"}',
        r"id is '\.\./x'; it becomes part of a file name",
    ),
    "an absolute id": ('{"prompt": "x", "id": "/x"}', "id is '/x'"),
    "an empty id": ('{"prompt": "x", "id": ""}', "id is ''"),
    "an id with spaces": ('{"prompt": "x", "id": "a b"}', "id is 'a b'"),
    "an id with a line break": (r'{"prompt": "x", "id": "a\n"}', "id is "),
    "an id with escapes": (r'{"prompt": "x", "id": "\u001b[2J"}', r"id is '\\x1b\[2J'"),
    "an id of 101 characters": (json.dumps({"prompt": "x", "id": "x" * 101}), "id is 'xxx"),
    "an id in another script": ('{"prompt": "x", "id": "é"}', "id is 'é'"),
    "the id of an earlier line": ('{"prompt": "x", "id": "0"}', "the id '0' stands in an earlier line"),
    "half an id": ('{"prompt": "x", "id": 1.5}', "id is 1.5, expected a string"),
    "a list as truth": ('{"prompt": "x", "truth": []}', r"truth is \[\], expected an object"),
}


@cases(FILES)
def test_request_files(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(case, tmp_path, monkeypatch)


def test_every_bad_line_is_said_and_the_good_ones_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of LINES in one file, between two good lines: a run for each would cost minutes."""
    monkeypatch.chdir(tmp_path)
    first, last = '{"prompt": "x", "id": "0"}', '{"prompt": "x", "id": "last"}'
    Path("requests.jsonl").write_text("\n".join([first, *(line for line, _ in LINES.values()), last]))
    result = CliRunner().invoke(main, BATCH)
    assert result.exit_code == 1 and result.stdout == "made-0.png\nmade-last.png\n"
    assert set(contents(tmp_path)) == {"requests.jsonl", "made-0.png", "made-last.png"}
    answers = [line for line in result.stderr.splitlines() if line.startswith("requests.jsonl line ")]
    assert len(answers) == len(LINES)


@pytest.mark.parametrize("name", LINES)
def test_bad_lines(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line, says = LINES[name]
    first = '{"prompt": "", "id": "0"}'  # cannot be used itself, so that no model is opened
    case = Case(name, file_of(f"{first}\n{line}\n"), f"requests.jsonl line 2: .*{says}", 1)
    check_case(case, tmp_path, monkeypatch)
    assert set(contents(tmp_path)) == {"requests.jsonl"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CR LF", "CR"])
def test_lines_end_in_every_way(end: str, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(end.join(["\ufeff{1}", "", "{3}", "{4}"]).encode())
    assert [(number, line.strip()) for number, line in read_lines(path)] == [(1, "{1}"), (3, "{3}"), (4, "{4}")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_is_a_request_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `--batch <(make-requests)`."""
    reader, writer = os.pipe()
    os.write(writer, APPLE.encode())
    os.close(writer)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["run", "--batch", f"/dev/fd/{reader}", *OUT])
    os.close(reader)
    check_answer(result, "", 0)
    assert result.stdout == "made-1.png\n"
