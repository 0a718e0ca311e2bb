"""Files on a disk that fails (EIO): one sentence, nothing half-written, no earlier file lost."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import io_errors
from hostile_cases import Case, cases, check_case, given

UNREADABLE = "/proc/self/mem"  # which gives EIO at its beginning, where no process has memory
OUT = ("--out", "made.png")
RUN = ("run", "--prompt", "x", *OUT)


def description(name: str) -> Case:
    """A model whose description cannot be read."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "model").mkdir()
        (folder / "model" / name).symlink_to(UNREADABLE)
        return *RUN, "--model", "model"

    return Case(f"a model's {name}", make, f"{name}.*input/output error")


READ = [
    Case("a source", given(*RUN, "--source", UNREADABLE), r"mem cannot be read \(input/output error\)"),
    Case(
        "a reference",
        given("run", "--prompt", "a <imagehere>", "--image", UNREADABLE, *OUT),
        r"mem cannot be read \(input/output error\)",
    ),
    Case("a request file", given("run", "--batch", UNREADABLE, *OUT), "JSON lines: input/output error"),
    description("manifest.json"),
    description("config.json"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@cases(READ)
def test_a_file_that_cannot_be_read(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(case, tmp_path, monkeypatch)


@pytest.mark.skipif(not io_errors.AVAILABLE, reason="the numbers of this machine's system calls are not known")
@pytest.mark.parametrize(("calls", "at_least"), [("write", 1_000), ("fsync", 0)])
def test_an_image_that_cannot_be_written(tmp_path: Path, calls: str, at_least: int) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "made-1.jpg")
    command = ("-m", "mige_rt.cli", "run", "--prompt", "a red apple", "--out", "made.jpg", "--num-images", "2")
    answer = io_errors.check_failing(tmp_path, calls, at_least, [*command, "--overwrite", "--steps", "2"])
    assert "cannot write made-1.jpg (input/output error)" in answer
