"""Hostile inputs as tables: each case has a name, a function that makes it, and the words that must answer it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mige_rt.cli import main

LONGEST_ANSWER = 1_500  # characters on stderr; usage lines and the warnings before the error included
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LARGE = 2**28  # bytes of a file that is not compared
# What libraries say to programmers: a user must never have to read it.
LIBRARY_TEXT = re.compile(
    r"Traceback|site-packages|ONNXRuntimeError|onnxruntime/|/onnxruntime_src|panicked|RUST_BACKTRACE|numpy\.|PIL\.|"
    r"pydantic|TypeError|ValueError|RuntimeError|KeyError|AttributeError|MemoryError|OSError|Errno|<class |object at 0x"
)


@dataclass(frozen=True)
class Case:
    """One hostile input to the command line, which runs in an empty folder of its own.

    Attributes:
        name: What is hostile about it; the test's id.
        make: Writes what the case needs into the folder, and gives the arguments of `mige-rt`.
        says: A regular expression that the answer on stderr must match, its line breaks and spaces taken as one.
        exit_code: 2: refused. 0: the input is odd, and good; what is written then is the case's own to check.
        long: Only with `-m long`.
    """

    name: str
    make: Callable[[Path], Sequence[str | Path]]
    says: str
    exit_code: int = 2
    long: bool = False


def given(*arguments: str | Path) -> Callable[[Path], Sequence[str | Path]]:
    """For a case that needs no files: makes nothing, gives these arguments."""
    return lambda folder: arguments


def cases(*tables: Sequence[Case]) -> pytest.MarkDecorator:
    """Runs a test once for each case of the tables, as its argument `case`; long ones carry the marker `long`."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=case.name, marks=[pytest.mark.long] if case.long else [])
            for table in tables
            for case in table
        ],
    )


def check_case(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """Run a case in `folder`, and assert what holds for all: its answer, and that nothing is lost or left behind.

    Returns:
        What the command printed, for assertions of the case's own.
    """
    monkeypatch.chdir(folder)
    arguments = [str(argument) for argument in case.make(folder)]
    before = contents(folder)
    result = CliRunner().invoke(main, arguments)
    check_answer(result, case.says, case.exit_code)
    after = contents(folder)
    if case.exit_code == 2:
        assert result.stdout == ""
        assert after == before, "a refused input changes no file and leaves none"
    else:
        assert {name: after.get(name) for name in before} == before, "no file that was there is changed"
    return result


def check_answer(result: Result, says: str, exit_code: int) -> None:
    """Assert that an answer is the expected one, short, without libraries' texts, and harmless to a terminal."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    answer = " ".join(result.stderr.split())
    assert result.exit_code == exit_code, answer[-LONGEST_ANSWER:]
    assert re.search(says, answer), answer[-LONGEST_ANSWER:]
    assert len(answer) <= LONGEST_ANSWER, f"{len(answer)} characters: {answer[:LONGEST_ANSWER]}"
    for text in (result.stdout, result.stderr):
        assert not CONTROL.search(text), f"control characters reach the terminal: {text!r}"
    assert not LIBRARY_TEXT.search(answer), f"a library's text reaches the user: {answer}"


def contents(folder: Path) -> dict[str, bytes | str]:
    """What a folder holds, by relative path: a file's bytes, or the size of a very large one, or what else it is."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*"))}


def same_image(a: Image.Image, b: Image.Image) -> bool:
    """Whether two images have the same pixels."""
    return (a.mode, a.size) == (b.mode, b.size) and a.tobytes() == b.tobytes()


def _content(path: Path) -> bytes | str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if not path.is_file():
        return "no file"
    size = path.stat().st_size
    return path.read_bytes() if size < LARGE else f"{size} bytes"
