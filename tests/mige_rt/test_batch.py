"""Many images from a request file: resumed, on several processes, on Ray, with what failed in a file of its own."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mige_rt.batch.images import ImageSettings, is_finished, request_digest
from mige_rt.batch.processes import run_in_processes
from mige_rt.batch.worker import BatchJob, BatchSettings, Outcome
from mige_rt.cli import main
from mige_rt.cli.batch import pace
from mige_rt.image_output import read_settings
from mige_rt.requests import RequestRecord
from mige_rt.sampling_params import SamplingParams

LINES = [
    {"id": "blue", "prompt": "make it blue", "source": "scene.png"},
    {"id": "thing", "prompt": "a <imagehere> on a red background", "images": ["scene.png"], "seed": 7},
    {"id": "none", "prompt": "a <imagehere>", "images": ["none.png"]},
    {"prompt": "a red apple"},
    {"id": "bad", "prompt": "a red apple", "colour": 1},
]
MADE = {"made-blue.png", "made-thing.png", "made-4.png"}
QUICK = ("--out", "made.png", "--steps", "2", "--failures", "failures.jsonl")


@pytest.fixture
def folder(scene: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a request file of which two lines cannot be made."""
    scene.save(tmp_path / "scene.png")
    write(tmp_path, LINES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, lines: list[dict[str, object]]) -> None:
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", "--batch", "requests.jsonl", *QUICK, *arguments])


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("made*")}


def test_a_batch_goes_on_where_it_was_stopped(folder: Path) -> None:
    first = run("--seed", "1")
    assert first.exit_code == 1 and set(first.stdout.split()) == MADE
    made = images(folder)
    (folder / "made-4.png").unlink()
    again = run("--seed", "1")
    assert again.exit_code == 1 and again.stdout == "made-4.png\n"
    assert "2 of 4 requests are finished already" in again.stderr
    assert images(folder) == made
    done = run("--seed", "1")
    assert done.stdout == "" and images(folder) == made


def test_failures_have_a_file_with_reasons(folder: Path) -> None:
    assert run("--seed", "1").exit_code == 1
    failures = [json.loads(line) for line in Path("failures.jsonl").read_text().splitlines()]
    assert [(failure["line"], failure["id"]) for failure in failures] == [(3, "none"), (5, "")]
    assert "no image file at none.png" in failures[0]["reason"] and "unknown colour" in failures[1]["reason"]
    shutil.copy("scene.png", "none.png")
    write(folder, LINES[:4])
    mended = run("--seed", "1")
    assert mended.exit_code == 0 and mended.stdout == "made-none.png\n"
    assert Path("failures.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "change",
    [{"prompt": "make it green"}, {"seed": 5}, {"source": "other.png"}, {"task": "edit"}],
    ids=["prompt", "seed", "source", "task"],
)
def test_a_changed_request_is_not_taken_for_finished(folder: Path, change: dict[str, object]) -> None:
    record = RequestRecord("make it blue", source="scene.png", seed=1)
    settings = ImageSettings(params=SamplingParams(num_inference_steps=2))
    Image.new("RGB", (64, 64)).save(folder / "other.png")
    fields: dict[str, Any] = {"prompt": "make it blue", "source": "scene.png", "seed": 1, **change}
    changed = RequestRecord(**fields)
    digests = [request_digest(each, folder, None, settings, "model") for each in (record, record, changed)]
    assert digests[0] == digests[1] != digests[2]


def test_what_another_request_made_refuses_the_batch(folder: Path) -> None:
    write(folder, LINES[:1])
    assert run("--seed", "1").exit_code == 0
    before = images(folder)
    for arguments in (("--seed", "2"), ("--seed", "1", "--text-scale", "3"), ("--seed", "1", "--precision", "fp32")):
        refused = run(*arguments)
        assert refused.exit_code == 2 and "made-blue.png exists already" in refused.stderr
    Image.new("RGB", (64, 64), "red").save("scene.png")
    assert run("--seed", "1").exit_code == 2, "another source of the same name"
    assert images(folder) == before
    assert run("--seed", "1", "--overwrite").exit_code == 0
    assert images(folder) != before


def test_default_names_are_recognised_and_do_not_count_on(folder: Path) -> None:
    write(folder, LINES[3:4])
    command = ["run", "--batch", "requests.jsonl", "--steps", "2"]
    Image.new("RGB", (64, 64)).save("out-1.png")
    refused = CliRunner().invoke(main, [*command, "--seed", "1"])
    assert refused.exit_code == 2 and "line 1: out-1.png exists already" in refused.stderr
    Path("out-1.png").unlink()
    for stdout in ("out-1.png\n", ""):
        assert CliRunner().invoke(main, [*command, "--seed", "1"]).stdout == stdout
    changed = CliRunner().invoke(main, [*command, "--seed", "2"])
    assert changed.exit_code == 2 and "line 1: out-1.png exists already" in changed.stderr
    assert [path.name for path in folder.glob("out*")] == ["out-1.png"]


def test_a_drawn_seed_is_as_good_as_another(folder: Path) -> None:
    write(folder, [LINES[0], {**LINES[1], "seed": None}])
    assert run().exit_code == 0
    made = images(folder)
    (folder / "made-thing.png").unlink()
    assert run().stdout == "made-thing.png\n"
    assert images(folder)["made-blue.png"] == made["made-blue.png"]


def test_a_part_of_a_request_s_images_is_made_again_the_same(folder: Path) -> None:
    write(folder, LINES[:1])
    assert run("--seed", "1", "--num-images", "5").exit_code == 0
    made = images(folder)
    for name in ("made-blue-2.png", "made-blue-5.png"):
        (folder / name).unlink()
    again = run("--seed", "1", "--num-images", "5")
    assert again.stdout.split() == ["made-blue-2.png", "made-blue-5.png"]
    assert images(folder) == made


@pytest.mark.parametrize("extension", ["jpg", "webp"])
def test_other_formats_know_their_request_too(folder: Path, extension: str) -> None:
    write(folder, LINES[:1])
    out = ("--out", f"made.{extension}", "--seed", "1")
    assert run(*out).stdout == f"made-blue.{extension}\n"
    assert read_settings(folder / f"made-blue.{extension}")["prompt"] == "make it blue"
    assert run(*out).stdout == ""


def test_workers_make_the_same_bytes(folder: Path) -> None:
    assert run("--seed", "1", "--num-images", "2").exit_code == 1
    alone, failures = images(folder), Path("failures.jsonl").read_text()
    for path in folder.glob("made*"):
        path.unlink()
    together = run("--seed", "1", "--num-images", "2", "--workers", "4")
    assert together.exit_code == 1, together.output
    assert len(alone) == 6 and images(folder) == alone
    assert set(together.stdout.split()) == set(alone) and Path("failures.jsonl").read_text() == failures


def test_a_worker_that_ends_costs_its_line_alone(folder: Path) -> None:
    settings = BatchSettings(
        folder=folder,
        images=ImageSettings(params=SamplingParams(num_inference_steps=2)),
        model="",
        open=partial(os._exit, 9),  # ends the process instead, as a system without memory does
    )
    lines = [json.dumps({"prompt": "a <imagehere>", "images": ["none.png"]}), '{"prompt": "x"}', "no JSON"]
    jobs = [
        BatchJob(number=i, text=text, seed=1, is_drawn=False, paths=[str(folder / f"{i}.png")])
        for i, text in enumerate(lines)
    ]
    outcomes = {outcome.number: outcome.error for outcome in run_in_processes(settings, jobs, 1)}
    assert "no image file" in outcomes[0] and "it is no JSON" in outcomes[2]
    assert "the worker process ended while it made this (exit code 9)" in outcomes[1]


def test_a_model_that_cannot_be_opened_is_no_lines_fault(folder: Path) -> None:
    result = run("--model", "nowhere", "--workers", "2")
    assert result.exit_code == 2 and "nowhere is no model folder" in result.stderr
    assert images(folder) == {} and not Path("failures.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--failures", "notes.txt"), "notes.txt exists already, and holds no failures"),
        (("--failures", "requests.jsonl", "--overwrite"), "would overwrite requests.jsonl, which the batch reads"),
        (("--failures", "none/f.jsonl"), "none/f.jsonl cannot be written"),
        (("--workers", "2", "--build", "--engine", "tensorrt"), "--build is for one process"),
    ],
)
def test_bad_options_are_refused_before_any_work(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run(*arguments)
    assert result.exit_code == 2 and words in result.stderr, result.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_workers_are_for_a_batch() -> None:
    result = CliRunner().invoke(main, ["run", "--prompt", "x", "--workers", "2"])
    assert result.exit_code == 2 and "are for a --batch" in result.stderr


def test_the_pace_says_images_a_minute_and_time_left() -> None:
    assert pace(30, 90, 60) == "30 images, 30 a minute, 3 min left"
    assert pace(1000, 9000, 3600) == "1,000 images, 16.7 a minute, 9 h 0 min left"
    assert pace(10, 0, 60) == "10 images, 10 a minute, less than a minute left"
    assert pace(0, 5, 1) == "0 images, 5 left"


def test_a_foreign_file_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert not any(is_finished(tmp_path / name, "x") for name in ("text.png", "plain.png", "none.png"))
    assert Outcome(number=1).error == ""


@pytest.mark.long
def test_ray_makes_the_same_bytes(folder: Path) -> None:
    """A cluster of this machine alone, in a process of its own, since Ray starts others that outlive a failed test.

    Ray gives it 30 seconds to start, which a loaded machine may take.
    """
    assert run("--seed", "1").exit_code == 1
    alone = images(folder)
    for path in folder.glob("made*"):
        path.unlink()
    command = [sys.executable, "-m", "mige_rt.cli", "run", "--batch", "requests.jsonl", *QUICK, "--seed", "1"]
    done = subprocess.run(
        [*command, "--ray", "local", "--workers", "2"], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 1, done.stderr
    assert images(folder) == alone
    assert set(done.stdout.split()) == {str(folder / name) for name in alone}
    assert [json.loads(line)["line"] for line in Path("failures.jsonl").read_text().splitlines()] == [3, 5]
