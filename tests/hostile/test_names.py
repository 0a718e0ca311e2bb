"""Names of files: odd ones, those that the system refuses, and those that lead to what is no file."""

import os
import shutil
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import Case, cases, check_answer, check_case, contents, given

import mige_rt.image_output
import mige_rt.requests
import mige_rt.validation  # noqa: F401, imported before rights are dropped, without which it could not be read
from mige_rt.cli import main

RUN = ("run", "--prompt", "a red apple", "--steps", "2")
SCENE = Path(__file__).parents[2] / "docs/scene.png"
LONG = "x" * 5_000
ODD_NAMES = {  # all of them good names of files
    "markup": "[red]x[@click=y].png",
    "opening markup": "[bold]made.png",
    "a link in markup": "[link=file:x]made.png",
    "an escape": "made\x1b[2J.png",
    "a title": "\x1b]0;owned\x07made.png",
    "a bell": "made\a.png",
    "a backspace": "made\b\b\bx.png",
    "a line break": "made\nError: owned.png",
    "a carriage return": "made\rowned.png",
    "a tab": "made\tx.png",
    "a C1 control": "made\x9b2J.png",
    "right to left": "made\u202egnp.png",
    "a line separator": "made\u2028x.png",
    "undecodable bytes": "made\udcff.png",
    "spaces": "  made  .png",
    "a leading dash": "-made.png",
    "two dots": "..made..png",
    "a percent sign": "%s%n%d.png",
    "braces": "{0}{x!r}.png",
    "a star": "*.png",
    "quotes": "'\"`$(x).png",
    "a backslash": "a\\b.png",
    "an emoji": "🐱.png",
    "another script": "خروج.png",
    "240 characters": "x" * 240 + ".png",
}
NO_IMAGES = {"empty": "", "a dot": ".", "two dots": "..", "the root": "/", "a slash at the end": "folder/"}


def batch_file(folder: Path, text: str = '{"prompt": "a red apple"}\n') -> Path:
    (folder / "requests.jsonl").write_text(text)
    return folder / "requests.jsonl"


def with_folder(*arguments: str) -> Callable[[Path], Sequence[str]]:
    """Arguments for a case with a folder named `folder`."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "folder").mkdir()
        return arguments

    return make


def outputs() -> list[Case]:
    """Names that no image can be written under, alone and as what several files are named after."""
    several: dict[str, Callable[[Path], Sequence[str]]] = {
        "": lambda folder: RUN,
        " of two": lambda folder: (*RUN, "--num-images", "2"),
        " of a batch": lambda folder: ("run", "--batch", str(batch_file(folder))),
    }

    def make(arguments: Callable[[Path], Sequence[str]], name: str) -> Callable[[Path], Sequence[str]]:
        def with_out(folder: Path) -> Sequence[str]:
            (folder / "folder").mkdir()
            (folder / "file.txt").write_text("a text")
            return *arguments(folder), "--out", name

        return with_out

    tables = {
        **{name: (text, "names no file|has the extension") for name, text in NO_IMAGES.items()},
        "no extension": ("made", "has the extension ''"),
        "another extension": ("made.bmp", "has the extension '.bmp'.*one of .png"),
        "an extension of its own": (".png", "has the extension ''"),
        "a missing folder": ("missing/made.png", "the folder missing does not exist"),
        "a file as folder": ("file.txt/made.png", "file.txt is no folder"),
        "below a file": ("file.txt/x/made.png", "cannot write .*not a directory"),
        "markup": ("[/red].png", r"the folder \[ does not exist"),
        "5,000 characters": (f"{LONG}.png", "cannot write .*name too long"),
        "a path of 5,000 characters": (f"{'y/' * 2500}made.png", "does not exist|cannot write .*too long"),
        "/proc": ("/proc/made.png", "cannot write /proc/made"),
    }
    return [
        Case(f"--out {name}{suffix}", make(arguments, text), says)
        for name, (text, says) in tables.items()
        for suffix, arguments in several.items()
    ]


INPUTS = [
    *(
        Case(
            f"{option} {name}", with_folder("run", "--prompt", "a <imagehere>", "--out", "made.png", option, text), says
        )
        for option in ("--image", "--source")
        for name, (text, says) in {
            **{name: (text, "no image file at .*folder") for name, text in NO_IMAGES.items()},
            "missing": ("none.png", "no image file at none.png"),
            "5,000 characters": (f"{LONG}.png", "no image file at x"),
            "endless zeros": ("/dev/zero", "no image file at /dev/zero.*no regular file"),
            "nothing": ("/dev/null", "no image file at /dev/null.*no regular file"),
            "random bytes": ("/dev/urandom", "no image file at /dev/urandom.*no regular file"),
            "a web address": ("https://example.com/cat.png", "no image file at https:"),
            "an escape": ("\x1b[2J.png", r"no image file at \\x1b\[2J"),
            "markup": ("[/x].png", r"no image file at \[/x\].png"),
        }.items()
    ),
    *(
        Case(f"--batch {name}", with_folder("run", "--out", "made.png", "--batch", text), says)
        for name, (text, says) in {
            **{name: (text, "cannot be read .*is a directory") for name, text in NO_IMAGES.items()},
            "missing": ("none.jsonl", "none.jsonl cannot be read .*no such file"),
            "5,000 characters": (LONG, "cannot be read .*name too long"),
            "an escape": ("\x1b[2J", r"\\x1b\[2J cannot be read"),
        }.items()
    ),
    Case("no prompt", given("run", "--out", "made.png"), "either --prompt or --batch"),
    Case("an unknown option with an escape", given("run", "--\x1b[2J"), r"\\x1b\[2J"),
    Case("an unknown command with an escape", given("\x1b[2J"), r"No such command '\\x1b\[2J'"),
    Case("an extra argument with an escape", given("run", "x\x1b[2J"), r"extra argument \(x\\x1b\[2J"),
    Case("a choice with an escape", given(*RUN, "--fit", "\x1b[2J"), r"\\x1b\[2J.*'crop', 'pad', 'aspect'"),
    Case("a device with an escape", given(*RUN, "--device", "\x1b[2J"), r"\\x1b\[2J"),
]


def folders() -> list[Case]:
    """Names that commands cannot make a folder under; none of them loads a model before it knows."""
    exists, no_folder = "exists already: give a path that does not", "cannot be written .*in an existing folder"
    names = {
        **{name: (text, exists) for name, text in NO_IMAGES.items()},
        "an existing folder": ("folder", exists),
        "a missing folder": ("missing/out", no_folder),
        "5,000 characters": (
            LONG,
            "cannot be written .*name too long.*in an existing folder|xxx.* in an existing folder",
        ),
        "300 characters": ("x" * 300, "cannot be written .*name too long"),
        "an escape": ("\x1b[2J/out", r"\\x1b\[2J/out cannot be written"),
        "/proc": ("/proc/out", no_folder),
    }
    commands = (("export",), ("convert", "--ckpt", "folder"), ("compare",), ("bench",))
    return [
        Case(f"{command[0]} --out {name}", with_folder(*command, "--out", text), says)
        for command in commands
        for name, (text, says) in names.items()
    ]


@cases(outputs(), INPUTS, folders())
def test_names(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(case, tmp_path, monkeypatch)


@cases(
    [
        Case(name, given("run", "--batch", "requests.jsonl", "--out", text, "--steps", "2", "--seed", "1"), "", 0)
        for name, text in ODD_NAMES.items()
    ]
)
def test_odd_names_are_written_under_and_printed_escaped(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_file(tmp_path)
    result = check_case(case, tmp_path, monkeypatch)
    (made,) = set(contents(tmp_path)) - {"requests.jsonl"}
    name = case.make(tmp_path)[4]
    assert made == f"{Path(name).stem}-1.png"
    with Image.open(tmp_path / made) as image:
        assert image.size == (64, 64)
    assert result.stdout.count("\n") == 1, "a path is one line, whatever is in it"


@cases([Case(name, given(text), "no image file") for name, text in ODD_NAMES.items()])
def test_odd_names_of_damaged_images_are_said_escaped(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path) -> Sequence[str | Path]:
        (name,) = case.make(folder)
        shutil.copy(SCENE, folder / name)
        (folder / name).write_bytes(b"no image")
        return *RUN, "--out", "made.png", "--source", f"./{name}"

    check_case(Case(case.name, make, r"\(8 bytes\) is not an image that can be read"), tmp_path, monkeypatch)


@contextmanager
def without_rights() -> Generator[None, None, None]:
    """Where the tests run as the administrator, to whom nothing is denied: as another user, for this block."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def denied(mode: int, path: str, *arguments: str) -> Callable[[Path], Sequence[str]]:
    """A case with an image and a request file in a folder; then the rights of one of them are taken away."""

    def make(folder: Path) -> Sequence[str]:
        folder.chmod(0o777)
        (folder / "denied").mkdir()
        shutil.copy(SCENE, folder / "denied/scene.png")
        batch_file(folder / "denied")
        (folder / path).chmod(mode)
        return "run", *arguments

    return make


WRITES = ("--prompt", "a red apple", "--out")
READS = (*WRITES, "made.png", "--source", "denied/scene.png")
DENIED = [
    Case("a source in a closed folder", denied(0, "denied", *READS), "denied/scene.png cannot be read: permission"),
    Case("a closed source", denied(0, "denied/scene.png", *READS), "denied/scene.png cannot be read: permission"),
    Case(
        "a closed request file",
        denied(0, "denied/requests.jsonl", "--batch", "denied/requests.jsonl", "--out", "made.png"),
        "requests.jsonl cannot be read .*permission denied",
    ),
    Case(
        "a folder to read",
        denied(0o555, "denied", *WRITES, "denied/made.png"),
        "cannot write denied/made.png .permission",
    ),
    Case(
        "a closed folder", denied(0, "denied", *WRITES, "denied/made.png"), "cannot write denied/made.png .permission"
    ),
    Case(
        "a file of others",
        denied(0o644, "denied/scene.png", *WRITES, "denied/scene.png", "--overwrite"),
        "denied/scene.png is read-only|cannot write denied/scene.png .permission",
    ),
]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other rights")
@cases(DENIED)
def test_missing_rights_are_called_that(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(argument) for argument in case.make(tmp_path)]
    with without_rights():
        result = CliRunner().invoke(main, arguments)
    (tmp_path / "denied").chmod(0o755)
    check_answer(result, case.says, case.exit_code)
    assert set(contents(tmp_path)) == {"denied", "denied/requests.jsonl", "denied/scene.png"}
    assert (tmp_path / "denied/scene.png").read_bytes() == SCENE.read_bytes()
