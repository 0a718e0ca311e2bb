"""Nothing tells anybody how mige-rt is used."""

import os
import subprocess
import sys
from pathlib import Path

COMMAND = [
    sys.executable,
    "-m",
    "mige_rt.cli",
    "run",
    "--prompt",
    "a red apple",
    "--steps",
    "2",
    "--engine",
    "onnxruntime",
]


def home_after_a_run(tmp_path: Path, **variables: str) -> set[str]:
    """The folders that a run makes in an empty home."""
    home = tmp_path / "home"
    home.mkdir()
    inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment = {**inherited, "HOME": str(home), **variables}
    subprocess.run([*COMMAND, "--out", str(tmp_path / "out.png")], env=environment, check=True, capture_output=True)
    return {path.name for path in home.rglob("*") if path.is_dir()}


def test_no_library_keeps_an_identifier_of_the_machine(tmp_path: Path) -> None:
    assert home_after_a_run(tmp_path) <= {".cache", "mige-rt"}


def test_the_users_own_choice_stays(tmp_path: Path) -> None:
    if sys.platform == "linux":  # where the library was seen to keep one
        assert ".onnxruntime" in home_after_a_run(tmp_path, ORT_DISABLE_TELEMETRY="0")
