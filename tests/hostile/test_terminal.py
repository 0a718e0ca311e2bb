"""What is printed: nothing from outside commands a terminal, and libraries' texts wait for --verbose."""

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import CONTROL, LIBRARY_TEXT

from mige_rt import cli, terminal
from mige_rt.bundle import DEFAULT_MODEL, describe, read_manifest
from mige_rt.cli.bundle_tables import bundle_tables
from mige_rt.cli.shared import progress
from mige_rt.errors import InputError

HOSTILE = {
    "clear the screen": ("\x1b[2J", r"\x1b[2J"),
    "a title": ("\x1b]0;x\x07", r"\x1b]0;x\x07"),
    "a link": ("\x1b]8;;file:x\x1b\\", r"\x1b]8;;file:x\x1b" + "\\"),
    "answer back": ("\x1b[6n", r"\x1b[6n"),
    "a C1 control": ("\x9b2J", r"\x9b2J"),
    "a line break": ("x\nError: y", r"x\nError: y"),
    "back to the line's start": ("x\ry", r"x\ry"),
    "a backspace": ("x\by", r"x\x08y"),
    "right to left": ("\u202egnp", r"\u202egnp"),
    "an isolate": ("\u2066x", r"\u2066x"),
    "a line separator": ("x\u2028y", r"x\u2028y"),
    "an invisible tag": ("\U000e0041", r"\U000e0041"),
    "a soft hyphen": ("x\u00ady", r"x\xady"),
    "half a character": ("\ud800", r"\ud800"),
    "markup": ("[red]x[/x]", "[red]x[/x]"),
    "a link in markup": ("[link=x]y", "[link=x]y"),
    "an emoji code": (":boom:", ":boom:"),
    "other scripts": ("näïve 🐱 خروج 日本", "näïve 🐱 خروج 日本"),
    "a family of joined emoji": ("👨\u200d👩\u200d👧", "👨\u200d👩\u200d👧"),
}


@pytest.fixture(params=HOSTILE)
def hostile(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A string, and how it may be printed."""
    return HOSTILE[request.param]


def test_lines_are_escaped(hostile: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    text, printed = hostile
    terminal.echo(Path(text))
    terminal.report(InputError(f"a {text}"))
    captured = capsys.readouterr()
    assert captured.out == f"{printed}\n" and captured.err == f"a {printed}\n"


def test_json_stays_json(hostile: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    terminal.echo_json({f"{hostile[0]}\x7f": 1})
    text = capsys.readouterr().out
    assert not CONTROL.search(text) and json.loads(text) == {f"{hostile[0]}\x7f": 1}


@pytest.mark.parametrize("length", [1_000, 1_001, 5_000, 10**7])
def test_messages_are_cut_in_the_middle(length: int) -> None:
    printed = terminal.message("a" + "x" * (length - 2) + "z")
    assert len(printed) == 1_000 and printed.startswith("axx") and printed.endswith("xxz")
    assert (" ... " in printed) == (length > 1_000)


def replace_strings(content: Any, text: str) -> Any:
    """A description whose strings, names of graphs and axes included, all have `text` in them."""
    if isinstance(content, dict):
        return {key if key in _KEYS else f"{key}{text}": replace_strings(value, text) for key, value in content.items()}
    if isinstance(content, list):
        return [replace_strings(value, text) for value in content]
    return f"{content}{text}" if isinstance(content, str) else content


_KEYS = {
    *("model", "name", "precision", "validated", "source", "ranges", "graphs", "checks", "plans", "versions", "axes"),
    *("min", "opt", "max", "onnx", "weights", "bytes", "parameters", "number", "rms", "limit", "verified"),
}


def test_tables_show_whatever_a_manifest_says(hostile: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`info` prints names, axes, precisions and versions as a bundle from anywhere has them."""
    content = describe(DEFAULT_MODEL, read_manifest(DEFAULT_MODEL)) | {"plans": []}
    text, printed = hostile
    console: Console = terminal.console()
    console.file, console.width = StringIO(), 10_000
    for part in bundle_tables(replace_strings(content, text)):
        console.print(part)
    output = console.file.getvalue()
    assert not CONTROL.search(output.replace("\n", ""))
    assert output.count(printed) > 20


def test_a_progress_bar_shows_whatever_it_is_told(hostile: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    stderr = StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("COLUMNS", "200")
    text, printed = hostile
    with progress(text) as advance:
        advance(f"graph {text}", 1, 2)
    output = stderr.getvalue()
    assert f"graph {printed}" in output and (text == printed or text not in output)


# Errors are one sentence


class LibraryError(Exception):
    pass


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """`mige-rt fail`, a command that raises what the test wants."""

    def add(error: BaseException) -> None:
        def fail() -> None:
            try:
                raise RuntimeError("the library's \x1b[2J text")
            except RuntimeError as cause:
                raise error from cause

        command = cli.verbose_option(click.command("fail")(fail))
        monkeypatch.setitem(cli.main.commands, "fail", command)

    return add


@pytest.mark.parametrize(
    ("error", "exit_code", "says"),
    [
        (InputError("the \x1b[2J input"), 2, r"Error: the \x1b[2J input"),
        (MemoryError(), 1, "Error: this takes more memory than there is"),
        (
            LibraryError("numbers \x1b[2J"),
            1,
            "Error: LibraryError: this is a bug in mige-rt; report it with what --verbose prints",
        ),
        (OSError(28, "No space left on device"), 1, "Error: OSError: this is a bug"),
        (click.ClickException("the \x1b[2J tool"), 1, r"Error: the \x1b[2J tool"),
        (click.UsageError("x" * 9_000), 2, "Error: xxx"),
    ],
)
def test_an_error_is_a_sentence_and_verbose_the_rest(failing, error, exit_code: int, says: str) -> None:
    failing(error)
    short, long = (CliRunner().invoke(cli.main, ["fail", *options]) for options in ([], ["--verbose"]))
    assert short.exit_code == long.exit_code == exit_code
    assert says in short.stderr and short.stderr.count("\n") <= 4
    assert "library" not in short.stderr and len(short.stderr) < 1_500
    assert not CONTROL.search(short.output + long.output)
    assert r"RuntimeError: the library's \x1b[2J text" in long.stderr and long.stderr.endswith(short.stderr)


def test_verbose_says_why_a_line_of_a_batch_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("requests.jsonl").write_text('{"prompt": "x", "source": "cut.png"}')
    Path("cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    short, long = (CliRunner().invoke(cli.main, ["run", "--batch", "requests.jsonl", *o]) for o in ([], ["--verbose"]))
    assert not LIBRARY_TEXT.search(short.stderr)
    assert "UnidentifiedImageError" in long.stderr and "requests.jsonl line 1: cut.png" in long.stderr


def test_what_reads_half_of_stdout_is_no_error(tmp_path: Path) -> None:
    """As in `mige-rt info BUNDLE | head -1`."""
    import subprocess

    command = [sys.executable, "-m", "mige_rt.cli", "info", str(DEFAULT_MODEL), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert "Error" not in process.stderr.read() and process.wait() in (0, 1)
    process.stderr.close()
