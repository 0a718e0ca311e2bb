"""Commands that write folders, killed or on a disk that fails: what is there is whole, and the next run ends it."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import io_errors

from engines.plans import check_plans, read_plans
from mige_rt.bundle import DEFAULT_MODEL, check_files, read_manifest
from mige_rt.config import PRESETS

DATA = Path(__file__).parents[1] / "data"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
LOGS = ("state/vae/log.jsonl",)  # to which a training adds lines before it saves its state


@dataclass(frozen=True)
class Command:
    """A command that is cut short.

    Attributes:
        prepare: Fills an empty folder with what the command reads, and with what it has written before.
        arguments: What Python is run with, in that folder.
        check: Asserts of the folder, at any moment, that what looks finished is whole, and nothing earlier is lost.
        fails: What it says when a file cannot be written.
    """

    prepare: Callable[[Path], object]
    arguments: tuple[str, ...]
    check: Callable[[Path], None]
    fails: str


def run(folder: Path, arguments: tuple[str, ...]) -> None:
    """Run a command to its end, which must be a good one."""
    ended = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def check_export(folder: Path) -> None:
    if (folder / "out").exists():
        check_files(folder / "out", read_manifest(folder / "out"), everything=True)


CONVERT = """
import sys
from pathlib import Path
from mige_rt.config import PRESETS
from mige_rt.errors import InputError
from trainer.checkpoints.convert_published import convert
try:
    convert(Path("published"), Path("out"), config=PRESETS["tiny"])
except InputError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def publish(folder: Path) -> None:
    """Weights of the default model's sizes in the published layout."""
    import torch

    from trainer.checkpoints.published_names import published_shapes
    from trainer.model.vae import make_vae

    published = folder / "published"
    (published / "t5-v1_1-xxl").mkdir(parents=True)
    shapes = published_shapes(PRESETS["tiny"])
    torch.save({"state_dict": {key: torch.zeros(shape) for key, shape in shapes.items()}}, published / "model.pth")
    make_vae(PRESETS["tiny"].vae).save_pretrained(published / "sd-vae-ft-ema")
    shutil.copy(DATA / "reference/spiece.model", published / "t5-v1_1-xxl")


def check_converted(folder: Path) -> None:
    from trainer.checkpoints.model_folder import load_model

    if (folder / "out").exists():
        load_model(folder / "out")


BUILD = ("-m", "mige_rt.cli", "build", "--bundle", "bundle", "--engine", "tensorrt-rtx", "--compute-capability", "8.9")


def build_once(folder: Path) -> None:
    """A bundle with plans, which are built again."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (or not made for this system)")
    shutil.copytree(DEFAULT_MODEL, folder / "bundle")
    run(folder, BUILD)


def check_built(folder: Path) -> None:
    plans = read_plans(folder / "bundle")
    for found in plans:
        check_plans(folder / "bundle", found, everything=True)
    assert plans or list(folder.glob("bundle/engines/*.old-*")), "the earlier plans are there"


# As `python -m trainer`, but every step is logged and saved.
TRAIN = """
import trainer.loop
from trainer.__main__ import main
trainer.loop.LOG_EVERY, trainer.loop.SAVE_EVERY = 1, 0
main(["vae", "--config", "training.toml", "--assets", %r, "--state", "state"])
"""
TRAINING = ("-c", TRAIN % str(DATA / "synthetic"))
STEPS_BEFORE, STEPS = 2, 12
SETTINGS = """
model = "tiny"
[vae]
steps = %d
batch = 2
rate = 1e-3
warmup = 1
decay = 1
weight_decay = 0.0
epsilon = 1e-8
clip = 1.0
ema = 0.5
seed = 1
"""


def train_before(folder: Path) -> None:
    """The state after a few steps, from which a longer training goes on."""
    (folder / "training.toml").write_text(SETTINGS % STEPS_BEFORE)
    run(folder, TRAINING)
    (folder / "training.toml").write_text(SETTINGS % STEPS)


def check_trained(folder: Path) -> None:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    state = folder / "state/vae"
    assert STEPS_BEFORE <= torch.load(state / "state.pt", weights_only=True)["step"] <= STEPS
    steps = [json.loads(line)["step"] for line in (state / "log.jsonl").read_text().splitlines()]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) >= STEPS_BEFORE
    (trained,) = list(state.glob("trained")) or state.glob("trained.old-*")
    AutoencoderKL.from_pretrained(trained)


EXPORT = ("-m", "mige_rt.cli", "export", "--no-validate", "--max-batch", "1", "--max-references", "1", "--out", "out")
COMMANDS = {
    "export": Command(lambda folder: None, EXPORT, check_export, "input/output error.*make room"),
    "convert": Command(publish, ("-c", CONVERT), check_converted, "could not be written"),
    "build": Command(build_once, BUILD, check_built, "input/output error.*make room"),
    "train": Command(train_before, TRAINING, check_trained, "input/output error.*make room"),
}


@dataclass(frozen=True)
class Whole:
    """A run that is not cut short: the seconds from its first temporary file to its end, and the files it leaves."""

    seconds: float
    files: set[str]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], None]:
    """Copies what a command needs into a folder that is there."""

    @cache
    def source(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        COMMANDS[name].prepare(folder)
        return folder

    def copy(name: str, to: Path) -> None:
        shutil.copytree(source(name), to, dirs_exist_ok=True)

    return copy


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prepared: Callable[[str, Path], None]) -> Callable[[str], Whole]:
    """How commands run here now, each measured when first asked for."""

    @cache
    def measured(name: str) -> Whole:
        folder = tmp_path_factory.mktemp(f"whole-{name}")
        prepared(name, folder)
        process = start(name, folder)
        began = time.monotonic()
        assert process.wait() == 0
        return Whole(time.monotonic() - began, files(folder))

    return measured


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def temporary(folder: Path) -> set[str]:
    """What is being written, or was left by a killed run."""
    return {name for name in files(folder) if ".partial-" in name or ".old-" in name or name.endswith(".part")}


def start(name: str, folder: Path) -> subprocess.Popen[bytes]:
    """A command that has begun to write."""
    command = [sys.executable, *COMMANDS[name].arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not temporary(folder) and process.poll() is None:
        time.sleep(0.02)
    return process


def kill(name: str, folder: Path, kind: str, seconds: float) -> None:
    """Kill a command when it has written for so long, and assert that it has done no harm."""
    before = files(folder)
    process = start(name, folder)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(getattr(signal, kind))
        process.wait()
    COMMANDS[name].check(folder)
    lost = before - files(folder)
    assert not lost or any(".old-" in name for name in temporary(folder)), "no file that was there is lost"


@pytest.mark.long  # CI kills a run in tests/trainer/test_run.py
def test_a_killed_training_goes_on(tmp_path: Path, prepared: Callable[[str, Path], None]) -> None:
    prepared("train", tmp_path)
    kill("train", tmp_path, "SIGKILL", 0.3)
    run(tmp_path, TRAINING)
    check_trained(tmp_path)
    assert not temporary(tmp_path)


def random_kills(each: int) -> list[tuple[str, str, float]]:
    """As many of each of COMMANDS and SIGNALS, with a moment from 0 to 1 of what the command writes for."""
    numbers = random.Random(0)
    return [(name, kind, numbers.random()) for _ in range(each) for name in COMMANDS for kind in SIGNALS]


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind", "share"), random_kills(4))
def test_a_command_killed_at_a_random_moment(
    tmp_path: Path,
    prepared: Callable[[str, Path], None],
    whole: Callable[[str], Whole],
    name: str,
    kind: str,
    share: float,
) -> None:
    prepared(name, tmp_path)
    expected = whole(name)
    kill(name, tmp_path, kind, share * expected.seconds)
    if name in ("export", "convert") and (tmp_path / "out").exists():
        assert not temporary(tmp_path)  # it had ended before, and is not made again
    else:
        run(tmp_path, COMMANDS[name].arguments)
    COMMANDS[name].check(tmp_path)
    assert files(tmp_path) == expected.files, "what the killed run has left is gone"


@pytest.mark.skipif(not io_errors.AVAILABLE, reason="the numbers of this machine's system calls are not known")
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("train", "write"),
        *(
            pytest.param(*values, marks=pytest.mark.long)
            for values in [("train", "fsync"), *((n, "write") for n in ("export", "convert", "build"))]
        ),
    ],
)
def test_a_disk_that_fails(tmp_path: Path, prepared: Callable[[str, Path], None], name: str, calls: str) -> None:
    prepared(name, tmp_path)
    command = COMMANDS[name]
    answer = io_errors.check_failing(tmp_path, calls, 2**16, command.arguments, LOGS)
    assert re.search(command.fails, answer, re.IGNORECASE), answer
    command.check(tmp_path)
