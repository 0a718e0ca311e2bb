"""Outputs: whole or not at all, and never over a file by surprise."""

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import Case, cases, check_case, contents, given, same_image

from mige_rt.cli import main
from mige_rt.errors import InputError
from mige_rt.image_output import OutputExistsError, save_image
from mige_rt.images import open_image

QUICK = ("--steps", "2", "--seed", "1")
RUN = ("run", "--prompt", "a red apple", *QUICK)
EDIT = ("run", "--prompt", "make it blue", *QUICK)
EXTENSIONS = ("png", "jpg", "webp")
Make = Callable[[Path], Sequence[str | Path]]


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def existing(*names: str, then: Sequence[str], mode: int = 0o644) -> Make:
    """A case with images of these names, and these arguments."""

    def make(folder: Path) -> Sequence[str]:
        for name in names:
            noise().save(folder / name)
            (folder / name).chmod(mode)
        return then

    return make


def batch(
    lines: Sequence[Mapping[str, object]], *names: str, then: Sequence[str] = (), file: str = "requests.jsonl"
) -> Make:
    """A case with a request file of these lines, and images of these names."""

    def make(folder: Path) -> Sequence[str]:
        existing(*names, then=())(folder)
        (folder / file).write_text("\n".join(map(json.dumps, lines)))
        return "run", "--batch", file, "--out", "made.png", *QUICK, *then

    return make


def linked(link: Callable[[Path], object], *arguments: str) -> Make:
    """A case with an image `image.png` and whatever `link` makes at `made.png`."""

    def make(folder: Path) -> Sequence[str]:
        noise().save(folder / "image.png")
        link(folder / "made.png")
        return *RUN, "--out", "made.png", *arguments

    return make


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


APPLE = {"prompt": "a red apple"}
OBSTACLES = {
    "a folder": (Path.mkdir, "is a folder"),
    "a named pipe": (os.mkfifo, "is no regular file"),
    "a socket": (bind_socket, "is no regular file"),
    "a link to a device": (lambda path: path.symlink_to("/dev/full"), "is no regular file"),
    "a dangling link": (
        lambda path: path.symlink_to("none.png"),
        "is a symbolic link to none.png, which does not exist",
    ),
    "a link to itself": (lambda path: path.symlink_to("made.png"), "cannot write made.png .*symbolic links"),
    "a link to a folder": (lambda path: path.symlink_to("."), "is a folder"),
}
REFUSED = [
    *(
        Case(
            f"an existing {extension}",
            existing(f"made.{extension}", then=(*RUN, "--out", f"made.{extension}")),
            "exists already",
        )
        for extension in EXTENSIONS
    ),
    Case("the source", existing("a.png", then=(*EDIT, "--source", "a.png", "--out", "a.png")), "a.png exists already"),
    Case(
        "the source by another way",
        existing("a.png", then=(*EDIT, "--source", "a.png", "--out", "./x/../a.png")),
        "the folder x/.. does not exist|exists already",
    ),
    Case(
        "a reference",
        existing("a.png", then=("run", "--prompt", "a <imagehere>", "--image", "a.png", "--out", "a.png", *QUICK)),
        "a.png exists already",
    ),
    Case(
        "one of several",
        existing("made-2.png", then=(*RUN, "--out", "made.png", "--num-images", "3")),
        "made-2.png exists",
    ),
    Case("one of a batch", batch([APPLE, APPLE], "made-2.png"), "line 2: made-2.png exists already"),
    Case(
        "one of several of a batch", batch([APPLE], "made-1-2.png", then=("--num-images", "2")), "made-1-2.png exists"
    ),
    Case(
        "a read-only file",
        existing("made.png", then=(*RUN, "--out", "made.png", "--overwrite"), mode=0o444),
        "made.png is read-only",
    ),
    Case(
        "the source of another line",
        batch([APPLE, {**APPLE, "source": "made-1.png"}], "made-1.png", then=("--overwrite",)),
        "line 1 would overwrite made-1.png, which line 2 reads",
    ),
    Case(
        "the reference of an earlier line",
        batch([{"prompt": "<imagehere>", "images": ["made-2.png"]}, APPLE], "made-2.png", then=("--overwrite",)),
        "line 2 would overwrite made-2.png, which line 1 reads",
    ),
    Case(
        "the request file", batch([APPLE], then=("--overwrite",), file="made-1.png"), "would overwrite the file itself"
    ),
    *(
        Case(f"{name}{suffix}", linked(link, *arguments), says)
        for name, (link, says) in OBSTACLES.items()
        for suffix, arguments in {"": (), " to overwrite": ("--overwrite",)}.items()
    ),
]


@cases(REFUSED)
def test_outputs(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(case, tmp_path, monkeypatch)


def run(*arguments: str | Path) -> list[str]:
    """The paths that a successful run prints."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout.split()


def test_overwrite_replaces_the_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = existing("made.png", "other.png", then=(*RUN, "--out", "made.png", "--overwrite"))(tmp_path)
    before = contents(tmp_path)
    assert run(*arguments) == ["made.png"]
    after = contents(tmp_path)
    assert after["other.png"] == before["other.png"] and after["made.png"] != before["made.png"]
    assert open_image("made.png").size == (64, 64)


def test_a_source_can_be_edited_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = existing("a.png", then=(*EDIT, "--source", "a.png"))(tmp_path)
    run(*arguments, "--out", "b.png")
    run(*arguments, "--out", "a.png", "--overwrite")
    assert same_image(open_image("a.png"), open_image("b.png"))


def test_a_link_is_written_through_and_a_hard_link_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(*existing("image.png", then=(*RUN, "--out", "first.png"))(tmp_path))
    before = contents(tmp_path)
    Path("link.png").symlink_to("image.png")
    os.link("image.png", "hard.png")
    run(*RUN, "--out", "link.png", "--overwrite")
    assert Path("link.png").is_symlink()
    assert same_image(open_image("image.png"), open_image("first.png"))
    assert Path("hard.png").read_bytes() == before["image.png"], "another name of the file keeps what it had"


def test_default_names_count_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*RUN) == ["out.png"]
    assert run(*RUN) == ["out-1.png"]
    assert run(*RUN, "--num-images", "2") == ["out-2.png", "out-3.png"]
    assert run(*RUN) == ["out-4.png"]
    Path("out.png").unlink()
    Path("out.png").symlink_to("none.png")
    assert run(*RUN) == ["out-5.png"], "a dangling link has a name, too"
    assert run(*RUN, "--overwrite", "--num-images", "2") == ["out-1.png", "out-2.png"]


def test_overwriting_keeps_the_permissions(tmp_path: Path) -> None:
    path = tmp_path / "made.png"
    save_image(noise(), path, {})
    path.chmod(0o640)
    save_image(noise(), path, {}, overwrite=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


# What cannot be written whole


@contextmanager
def file_size_limit(size: int) -> Generator[None, None, None]:
    """No file may grow beyond `size` bytes, as on a disk that is full then."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("missing", [1, 2, 100, 10**9], ids=["1 byte", "2 bytes", "100 bytes", "all bytes"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_full_disk_leaves_no_half_and_the_earlier_file(
    tmp_path: Path, extension: str, missing: int, overwrite: bool
) -> None:
    save_image(noise(), tmp_path / f"whole.{extension}", {"prompt": "x"})
    size = (tmp_path / f"whole.{extension}").stat().st_size
    if overwrite:
        (tmp_path / f"made.{extension}").write_bytes(b"the earlier one")
    before = contents(tmp_path)
    with file_size_limit(max(0, size - missing)), pytest.raises(InputError, match=r"cannot write .*file too large"):
        save_image(noise(), tmp_path / f"made.{extension}", {"prompt": "x"}, overwrite=overwrite)
    assert contents(tmp_path) == before
    with file_size_limit(size):
        save_image(noise(), tmp_path / f"made.{extension}", {"prompt": "x"}, overwrite=overwrite)
    assert contents(tmp_path)[f"made.{extension}"] == before[f"whole.{extension}"]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_full_disk_is_an_error_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str
) -> None:
    def make(folder: Path) -> Sequence[str]:
        arguments = batch([APPLE])(folder)
        return [str(word).replace("made.png", f"made.{extension}") for word in arguments]

    says = rf"requests.jsonl line 1: cannot write made-1.{extension} \(file too large\)"
    with file_size_limit(100):
        check_case(Case("", make, says, 1), tmp_path, monkeypatch)
        assert set(contents(tmp_path)) == {"requests.jsonl"}
        out = f"made.{extension}"
        for number in ("1", "2"):
            several = given(*RUN, "--out", out, "--num-images", number)
            check_case(Case("", several, "cannot write made.*file too large"), tmp_path, monkeypatch)


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path, None, None]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_file_system_that_is_full(small_disk: Path, extension: str) -> None:
    (small_disk / f"made.{extension}").write_bytes(b"the earlier one" * 1_000)
    (small_disk / "ballast").write_bytes(b"x" * 40_000)
    before = contents(small_disk)
    for name in ("made", "new"):
        with pytest.raises(InputError, match=r"cannot write .*no space left on device"):
            save_image(noise(256), small_disk / f"{name}.{extension}", {}, overwrite=True)
        assert contents(small_disk) == before


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("lost", [1, 2, 10, 1_000])
def test_a_disk_that_loses_bytes_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str, lost: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: os.ftruncate(file, os.fstat(file).st_size - lost))
    with pytest.raises(InputError, match="bytes were kept"):
        save_image(noise(), tmp_path / f"made.{extension}", {})
    assert contents(tmp_path) == {}


# Two at once


def test_of_eight_writers_of_one_new_file_one_wins(tmp_path: Path) -> None:
    def write(seed: int) -> bool:
        try:
            save_image(noise(), tmp_path / "made.png", {"seed": str(seed)})
        except OutputExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    with Image.open(tmp_path / "made.png") as image:
        assert image.info["seed"] == str(won.index(True))
    assert set(contents(tmp_path)) == {"made.png"}


def test_of_eight_writers_over_one_file_each_leaves_a_whole_one(tmp_path: Path) -> None:
    save_image(noise(), tmp_path / "made.png", {})
    with ThreadPoolExecutor(8) as pool:
        writes = [
            pool.submit(save_image, noise(), tmp_path / "made.png", {"seed": str(seed)}, overwrite=True)
            for seed in range(40)
        ]
        while not all(write.done() for write in writes):
            assert same_image(open_image(tmp_path / "made.png"), noise())
    assert all(write.exception() is None for write in writes)
    assert set(contents(tmp_path)) == {"made.png"}


@pytest.mark.parametrize(
    ("out", "codes", "names"),
    [
        ((), [0, 0], {"out.png", "out-1.png"}),
        (("--out", "made.png"), [0, 2], {"made.png"}),
        (("--out", "made.png", "--overwrite"), [0, 0], {"made.png"}),
    ],
    ids=["default names", "one name", "one name to overwrite"],
)
def test_two_processes_of_one_output(tmp_path: Path, out: Sequence[str], codes: list[int], names: set[str]) -> None:
    command = [sys.executable, "-m", "mige_rt.cli", *RUN, *out]
    runs = [subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    printed = [process.communicate() for process in runs]
    assert sorted(process.returncode for process in runs) == codes, printed
    assert set(contents(tmp_path)) == names
    for name in names:
        assert open_image(tmp_path / name).size == (64, 64)
