"""Runs that are killed: no half that looks whole, no earlier file lost, leftovers known and removed by the next run."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import contents

from mige_rt.atomic import atomic_file, atomic_folder
from mige_rt.cli import main
from mige_rt.errors import InputError
from mige_rt.images import open_image

LEFTOVER = re.compile(r"\.mige-rt-[0-9a-f]{12}\.part")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
QUICK = ("--steps", "2", "--seed", "1")
OLD = Image.effect_noise((64, 64), 90).convert("RGB")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mige_rt.cli", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def one(folder: Path) -> list[str]:
    """A run that overwrites an image."""
    OLD.save(folder / "made.png")
    return ["run", "--prompt", "a red apple", "--out", "made.png", "--overwrite", *QUICK]


def several(folder: Path) -> list[str]:
    """A run of eight JPEGs, two of which are there."""
    OLD.save(folder / "made-2.jpg")
    OLD.save(folder / "made-7.jpg")
    return ["run", "--prompt", "a red apple", "--out", "made.jpg", "--num-images", "8", "--overwrite", *QUICK]


def batch(folder: Path) -> list[str]:
    """A run of 30 requests."""
    (folder / "requests.jsonl").write_text("".join(json.dumps({"prompt": f"{n} apples"}) + "\n" for n in range(30)))
    return ["run", "--batch", "requests.jsonl", "--out", "made.webp", *QUICK]


RUNS: dict[str, Callable[[Path], list[str]]] = {"one": one, "several": several, "batch": batch}


def check_killed(folder: Path, before: dict[str, bytes | str], printed: str) -> None:
    """Every file that was there is what it was or a whole new image, every other one a whole image or a leftover."""
    after = contents(folder)
    assert before.keys() <= after.keys(), "no file that was there is lost"
    for name, content in after.items():
        if content != before.get(name) and not LEFTOVER.fullmatch(name):
            assert re.fullmatch(r"made(-\d+)?\.\w+", name)
            assert open_image(folder / name).size == (64, 64)
    assert set(printed.split()) <= after.keys(), "what was printed is there"
    leftovers = [name for name in after if LEFTOVER.fullmatch(name)]
    assert len(leftovers) <= 1
    next_run = ["run", "--prompt", "x", "--out", str(folder / "next.png"), *QUICK]
    assert CliRunner().invoke(main, next_run).exit_code == 0
    assert contents(folder).keys() == after.keys() - {*leftovers} | {"next.png"}


def random_kills(count: int) -> list[tuple[str, str, float]]:
    """As many of RUNS and SIGNALS in turn, each with a moment from 0 to 1 of a run."""
    numbers = random.Random(0)
    return [(list(RUNS)[k % 3], SIGNALS[k // 3 % 3], numbers.random()) for k in range(count)]


@pytest.fixture(scope="module")
def seconds(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a run takes here now."""
    folder, began = tmp_path_factory.mktemp("timed"), time.monotonic()
    assert start(folder, *one(folder)).wait() == 0
    return time.monotonic() - began


def kill_at(folder: Path, name: str, kind: str, moment: float) -> None:
    arguments = RUNS[name](folder)
    before = contents(folder)
    process = start(folder, *arguments)
    try:
        printed, _ = process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(getattr(signal, kind))
        printed, _ = process.communicate()
    check_killed(folder, before, printed)


@pytest.mark.parametrize(("name", "kind", "share"), random_kills(6))
def test_a_run_killed_at_a_random_moment(tmp_path: Path, seconds: float, name: str, kind: str, share: float) -> None:
    kill_at(tmp_path, name, kind, seconds * (0.5 + share / 2))


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind", "share"), random_kills(56)[6:])
def test_more_runs_killed_at_random_moments(tmp_path: Path, seconds: float, name: str, kind: str, share: float) -> None:
    kill_at(tmp_path, name, kind, seconds * 1.5 * share)


@pytest.mark.parametrize("name", ["several", "batch"])
@pytest.mark.parametrize("kind", SIGNALS)
def test_a_run_killed_while_it_writes(tmp_path: Path, name: str, kind: str) -> None:
    """As soon as its temporary file appears, at the second one, so that there is a whole file, too."""
    arguments = RUNS[name](tmp_path)
    before = contents(tmp_path)
    process = start(tmp_path, *arguments)
    temporary: set[str] = set()
    while len(temporary) < 2 and process.poll() is None:
        temporary.update(filter(LEFTOVER.fullmatch, os.listdir(tmp_path)))
    process.send_signal(getattr(signal, kind))
    printed, errors = process.communicate()
    assert process.returncode == (1 if kind == "SIGINT" else -getattr(signal, kind)), errors
    check_killed(tmp_path, before, printed)


# The leftovers of killed processes, one by one

HOLD = """
import sys, time
from pathlib import Path
from mige_rt.atomic import atomic_file, atomic_folder
with {block} as temporary:
    print(temporary, flush=True)
    time.sleep(600)
"""


def hold(folder: Path, block: str) -> tuple[subprocess.Popen[str], Path]:
    """A process that writes a file or a folder, and does not end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(block=block)], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, folder / process.stdout.readline().strip()


def test_a_leftover_goes_and_what_another_run_writes_stays(tmp_path: Path) -> None:
    (killed, leftover), (living, used) = (hold(tmp_path, 'atomic_file(Path("made.png"))') for _ in range(2))
    killed.kill()
    killed.communicate()
    foreign = [tmp_path / name for name in (".made.part", ".mige-rt-notes.part", "mige-rt-0123456789ab.part")]
    for path in foreign:
        path.touch()
    try:
        with atomic_file(tmp_path / "next.png") as temporary:
            temporary.write_text("x")
        assert not leftover.exists() and used.exists()
        assert all(path.exists() for path in foreign)
    finally:
        living.kill()
        living.communicate()


def test_a_folder_left_by_a_killed_run_goes_when_it_is_made_again(tmp_path: Path) -> None:
    (killed, leftover), (living, used) = (hold(tmp_path, 'atomic_folder(Path("out [1]"))') for _ in range(2))
    killed.kill()
    killed.communicate()
    foreign = [tmp_path / name for name in ("out [1].partial-mine", "out [1].partial-1x", "out 1.partial-1")]
    for path in foreign:
        path.mkdir()
    try:
        assert leftover.is_dir()
        with atomic_folder(tmp_path / "out [1]") as temporary:
            (temporary / "file").touch()
        assert not leftover.exists() and used.is_dir()
        assert all(path.is_dir() for path in foreign)
    finally:
        living.kill()
        living.communicate()


def test_a_folder_moved_away_by_a_killed_run_is_put_back(tmp_path: Path) -> None:
    """It was killed between the two renames by which a new folder takes an old one's place."""
    (tmp_path / "out.old-4000000").mkdir()
    (tmp_path / "out.old-4000000/file").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", replace=True):
        raise ZeroDivisionError
    assert contents(tmp_path).keys() == {"out", "out/file"}
    (tmp_path / "out.old-4000001").mkdir()
    with atomic_folder(tmp_path / "out", replace=True):
        pass
    assert contents(tmp_path).keys() == {"out"}


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5_000, "zero\0byte", "none/out", "file/out", ""])
def test_odd_names_of_folders_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written|exists already"), atomic_folder(tmp_path / name):
        pass
    assert contents(tmp_path).keys() == {"file"}
