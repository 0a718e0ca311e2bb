"""The examples run as they are, from the command line, and write images of the right size."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "tour.ipynb"
FINE_TUNING = EXAMPLES / "fine_tune.ipynb"
IMAGES = {
    "generate.py": ["generate-0.png", "generate-1.png"],
    "edit.py": ["edit-1.5.png", "edit-5.0.png"],
    "compose_batch.py": ["compose-7.png", "compose-8.png", "compose-9.png"],
}


def run(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_every_script_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == IMAGES.keys()


@pytest.mark.parametrize("script", IMAGES)
def test_script(script: str, tmp_path: Path) -> None:
    done = run(EXAMPLES / script, tmp_path, folder=tmp_path)
    assert done.stdout.split() == [str(tmp_path / name) for name in IMAGES[script]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(IMAGES[script])
    contents = []
    for name in IMAGES[script]:
        with Image.open(tmp_path / name) as image:
            image.load()
            assert (image.size, image.mode) == ((64, 64), "RGB")
            contents.append(image.tobytes())
    assert len(set(contents)) == len(contents)  # other seeds and scales give other images


def test_the_callback_is_called_after_each_step(tmp_path: Path) -> None:
    done = run(EXAMPLES / "compose_batch.py", tmp_path, folder=tmp_path)
    assert [line.split(",")[0] for line in done.stderr.splitlines() if line.startswith("step ")] == [
        f"step {number} of 20" for number in range(1, 21)
    ]


def test_notebook(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    check_outputs(cells[1:])
    checks = "assert edited.size == generated.size == composed.size == (64, 64)\nassert strip.size == (192, 64)\n"
    script = tmp_path / "tour.py"
    script.write_text("\n\n".join(cell.source for cell in cells) + "\n\n" + checks)
    run(script, folder=EXAMPLES)


def check_outputs(cells: list[Any]) -> None:
    """Whoever looks at a notebook without running it sees an image below each cell that ends with one."""
    for number, cell in enumerate(cells, 2):
        assert cell.execution_count == number
        shows_image = not re.match(r"\w+ =|print|pipe\.", cell.source.splitlines()[-1])
        assert shows_image == any("image/png" in output.get("data", {}) for output in cell.outputs)


def test_the_fine_tuning_notebook_runs(tmp_path: Path) -> None:
    """In two steps instead of its own number."""
    notebook = nbformat.read(FINE_TUNING, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    check_outputs(cells[1:])
    code, replaced = re.subn(r"max_train_steps=\d+", "max_train_steps=2", "\n\n".join(cell.source for cell in cells))
    assert replaced == 1
    checks = "assert len(before) == len(half) == len(after) == 4\nassert before[0].tobytes() != after[0].tobytes()\n"
    script = tmp_path / "fine_tune.py"
    script.write_text(f"{code}\n\n{checks}")
    done = run(script, folder=EXAMPLES)
    assert "30 layers, 2 steps" in done.stdout
