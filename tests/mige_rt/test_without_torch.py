"""What a user without PyTorch relies on."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ("torch", "transformers", "diffusers", "accelerate", "safetensors", "onnx", "trainer", "export")
BLOCKED = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None  # importing it fails
from mige_rt.cli import main
main(sys.argv[1:])
"""


def test_the_first_command_of_the_readme_needs_no_torch(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    arguments = ["run", "--prompt", "make the background blue", "--source", "docs/scene.png", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and out.is_file(), done.stderr
    assert "engine onnxruntime on cpu" in done.stderr


def test_what_needs_torch_says_how_to_get_it(tmp_path: Path) -> None:
    for arguments in (
        ["export", "--out", str(tmp_path / "b")],
        ["convert", "--ckpt", "x", "--out", str(tmp_path / "m")],
        ["run", "--prompt", "a thing", "--engine", "pytorch", "--out", str(tmp_path / "o.png")],
    ):
        done = subprocess.run(
            [sys.executable, "-c", BLOCKED, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and "pip install 'mige-rt[torch]'" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["mige_rt.bundle", "mige_rt.pipeline", "engines.interface", "engines.factory"])
def test_each_part_can_be_imported_first(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, check=True)
