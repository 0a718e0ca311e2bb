"""The stay on a GPU, rehearsed at tiny size on the CPU; and what becomes of a part that does not end well."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.gpu_stay.__main__ import PARTS, main, supervise
from benchmarks.gpu_stay.record import Record
from mige_rt.config import PRESETS


@pytest.fixture(scope="module")
def stay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole rehearsal, run as one does it, in another folder than the code's."""
    folder = tmp_path_factory.mktemp("stay")
    command = [sys.executable, "-m", "benchmarks.gpu_stay", "--rehearsal", "--device", "cpu"]
    code = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([*command, "--minutes", "30", "--out", "out"], cwd=folder, env=environment, check=False)
    return folder / "out"


def results(stay: Path, part: str) -> dict[str, dict[str, Any]]:
    """A part's entries by name, none of which has met an error."""
    content = json.loads((stay / f"{part}.json").read_text())
    assert content["status"] == "ok", content
    return {entry["name"]: entry for entry in content["results"]}


def test_every_part_is_rehearsed(stay: Path) -> None:
    summary = json.loads((stay / "summary.json").read_text())
    assert {part: outcome["status"] for part, outcome in summary.items()} == dict.fromkeys(PARTS, "ok")
    assert all(outcome["seconds"] > 0 for outcome in summary.values())


def test_the_tests_for_a_gpu_are_run_one_by_one(stay: Path) -> None:
    tests = results(stay, "tests")
    assert tests.pop("pytest")["exit_code"] == 0
    assert len(tests) > 20 and {entry["outcome"] for entry in tests.values()} <= {"skipped", "passed"}


def test_captured_runs_are_compared_with_uncaptured_ones(stay: Path) -> None:
    entries = results(stay, "capture")
    assert {"plain: new batch", "plain: reuse", "compile, low memory: first"} <= entries.keys()
    assert entries["plain: reuse"]["errors"] == [0, 0]
    assert "memory over 20 lengths, twice" in entries and "compile: a capture that fails" in entries


def test_images_made_among_others_are_compared_with_those_made_alone(stay: Path) -> None:
    entry = results(stay, "serving")["fp32"]
    assert 0 < entry["latents"] < 1e-4 and entry["captured_largest_difference"] == 0
    assert entry["images_a_call"] > 1


def test_engines_that_are_not_here_are_left_out(stay: Path) -> None:
    entries = results(stay, "ordering")
    assert entries["pytorch"]["ok"] and entries["onnxruntime"]["ok"]
    assert "skipped" in entries["tensorrt-rtx"]


def test_the_denoiser_is_timed_in_every_mode(stay: Path) -> None:
    entries = results(stay, "denoiser")
    eager = entries["batch 2, mask ragged, math"]
    (compiled,) = (entry for name, entry in entries.items() if name.endswith("compiled blocks"))  # with the fastest
    assert eager["tflop"] > 0
    assert eager["eager"]["ms"] > 0 and eager["captured"]["ms"] > 0 and compiled["compiled"]["ms"] > 0


def test_the_least_that_a_step_takes_is_that_of_its_products(stay: Path) -> None:
    entries = results(stay, "matrices")
    total = entries.pop("all of a step")
    dit = PRESETS["tiny"].dit
    tokens, width = 2 * dit.trained_grid**2, dit.width
    assert entries[f"{tokens} x {width} by {width} x {3 * width}"]["times_a_step"] == dit.depth
    assert entries[f"{tokens} x {width} by {width} x {width}"]["times_a_step"] == 3 * dit.depth
    assert len(entries) == 5
    expected = sum(entry["times_a_step"] * entry["bf16"]["ms"] for entry in entries.values())
    assert total["bf16_ms"] == pytest.approx(expected)


def test_images_are_made_with_and_without_low_memory_and_as_published(stay: Path) -> None:
    plain, low = results(stay, "image").values()
    assert plain["graphs"]["denoiser"]["calls"] == 3 and low["name"] == "low memory, captured"
    medians = results(stay, "published")["medians"]
    assert medians["times_as_fast"] == pytest.approx(medians["seconds"]["as published"] / medians["seconds"]["ours"])


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def test_a_part_that_does_not_end_keeps_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    code = f"import json, time; open({str(path)!r}, 'w').write(json.dumps({{'results': [1]}})); time.sleep(600)"
    outcome = supervise(python(code), path, 3, os.environ)
    assert (outcome["status"], outcome["reason"]) == ("timed out", "it had 3 s")
    assert json.loads(path.read_text())["results"] == [1]


def test_a_part_that_dies_says_what_it_said_last(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    outcome = supervise(python("print('the last words', flush=True); import os; os.abort()"), path, 60, os.environ)
    assert outcome["status"] == "crashed"
    content = json.loads(path.read_text())
    assert "the last words" in content["log"] and content["results"] == []


def test_an_entry_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    record = Record(tmp_path / "part.json")
    with record.entry("first") as entry:
        entry["ms"] = 1
        raise RuntimeError("no kernel")
    with record.entry("second") as entry:
        entry["ok"] = True
    first, second = json.loads(record.path.read_text())["results"]
    assert first["ms"] == 1 and first["error"] == "RuntimeError: no kernel" and second["ok"]
    assert record.status == "failed"


def test_full_sizes_are_not_for_a_cpu(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--device", "cpu", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "--rehearsal" in result.output and not (tmp_path / "out").exists()
