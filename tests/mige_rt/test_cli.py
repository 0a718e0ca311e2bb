import json
import re
import subprocess
import sys
from inspect import cleandoc
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.cli import main

QUICK = ["--steps", "2", "--seed", "1"]
COMPOSE = ["--prompt", "replace the thing in <imagehere> with <imagehere>"]


@pytest.fixture
def scene_path(scene: Image.Image, tmp_path: Path) -> Path:
    scene.save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


@pytest.fixture
def reference_path(reference: Image.Image, tmp_path: Path) -> Path:
    reference.save(tmp_path / "reference.png")
    return tmp_path / "reference.png"


def _run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["run", *map(str, args)])


def test_the_three_uses_write_a_image_and_say_where(scene_path: Path, reference_path: Path, tmp_path: Path) -> None:
    for number, args in enumerate(
        (
            ["--prompt", "a <imagehere> on a plain blue background", "--image", reference_path],
            ["--prompt", "make the background blue", "--source", scene_path],
            [*COMPOSE, "--source", scene_path, "--image", scene_path, "--image", reference_path],
        )
    ):
        out = tmp_path / f"out{number}.png"
        result = _run(*args, "--out", out, *QUICK)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{out}\n"
        assert "default model" in result.stderr
        with Image.open(out) as image:
            image.load()
            assert image.size == (64, 64)
            assert image.info["seed"] == "1" and image.info["num_inference_steps"] == "2" and "prompt" in image.info
            assert {"model", "task", "guidance_scale", "image_guidance_scale", "engine", "precision"} <= set(image.info)
            assert image.info["prompt"] == args[1] and image.info["size"] == "64x64"


def test_the_written_seed_repeats_the_image(scene_path: Path, tmp_path: Path) -> None:
    prompt = ["--prompt", "make it blue", "--source", scene_path, "--steps", "2"]
    first = _run(*prompt, "--out", tmp_path / "a.png", "--num-images", "2")
    drawn = next(line for line in first.stderr.splitlines() if line.startswith("seed ")).split()[1]
    paths = [tmp_path / "a-1.png", tmp_path / "a-2.png"]
    assert first.stdout.split() == [str(path) for path in paths]
    _run(*prompt, "--out", tmp_path / "b.png", "--seed", str(int(drawn) + 1))
    with Image.open(paths[1]) as second, Image.open(tmp_path / "b.png") as again, Image.open(paths[0]) as other:
        assert second.info["seed"] == again.info["seed"] == str(int(drawn) + 1)
        differences = [abs(a - b) for a, b in zip(second.tobytes(), again.tobytes(), strict=True)]
        assert max(differences) <= 1
        assert second.tobytes() != other.tobytes()


@pytest.mark.parametrize(("extension", "kind"), [("jpg", "JPEG"), ("webp", "WEBP"), ("PNG", "PNG")])
def test_the_extension_gives_the_format(scene_path: Path, tmp_path: Path, extension: str, kind: str) -> None:
    out = tmp_path / f"out.{extension}"
    assert _run("--prompt", "make it blue", "--source", scene_path, "--out", out, *QUICK).exit_code == 0
    with Image.open(out) as image:
        assert image.format == kind


def test_one_bad_line_of_a_batch_does_not_stop_the_others(scene_path: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "make it blue", "source": "scene.png", "id": "blue"},
        {"prompt": "a <imagehere>", "images": ["missing.png"]},
        {"prompt": "a <imagehere>", "images": ["scene.png"], "seed": 7},
        {"prompt": "a <imagehere>", "colour": 1},
        {"prompt": "make it red", "source": "scene.png", "id": "../escape"},
        {"prompt": "a \ud800 cat"},
    ]
    (tmp_path / "batch.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    result = _run("--batch", tmp_path / "batch.jsonl", "--out", tmp_path / "made.png", *QUICK)
    assert result.exit_code == 1
    assert result.stdout.split() == [str(tmp_path / "made-blue.png"), str(tmp_path / "made-3.png")]
    for number in (2, 4, 5, 6, 7):
        assert f"line {number}" in result.stderr
    with Image.open(tmp_path / "made-3.png") as image:
        assert image.info["seed"] == "7"


def test_bad_input_costs_exit_code_2_and_nothing_is_written(
    scene_path: Path, reference_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "made.png"
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(scene_path.read_bytes()[:200])
    edit = ["--prompt", "make it blue", "--source", scene_path, "--out", out]
    cases: list[tuple[list[str | Path], str]] = [
        (["--prompt", "a <imagehere> and a <imagehere>", "--image", reference_path], "2 <imagehere> and 1 images"),
        (["--prompt", "a cat", "--image", reference_path], "0 <imagehere> and 1 images"),
        (["--prompt", "a <imagehere>", "--image", tmp_path / "text.png"], "text.png"),
        (["--prompt", "a <imagehere>", "--image", tmp_path / "empty.png"], "empty.png"),
        (["--prompt", "a <imagehere>", "--image", tmp_path / "cut.png"], "cut.png"),
        (["--prompt", "a <imagehere>", "--image", tmp_path / "none.png"], "none.png"),
        (["--prompt", "  "], "empty"),
        ([], "--prompt or --batch"),
        ([*edit, "--steps", "1"], "at least 2"),
        ([*edit, "--steps", "99999999999"], "at most 1000"),
        ([*edit, "--text-scale", "1e300"], "smaller scales"),
        ([*edit, "--size", "100000"], "at most 16 times"),
        (["--prompt", "...", "--source", scene_path], "empty"),
        (["--prompt", "a \ud800 cat"], "UTF-8"),
        ([*edit, "--image", scene_path, "--image", scene_path], "0 <imagehere> and 2 images"),
        (["--prompt", "a <imagehere>", "--image", "x" * 5000], "no image file"),
        ([*edit, "--text-scale", "nan"], "finite"),
        ([*edit, "--source-scale", "inf"], "finite"),
        ([*edit, "--size", "60"], "multiples of 8"),
        ([*edit, "--size", "64x"], "width x height"),
        ([*edit, "--size", "0"], "multiples of 8"),
        ([*edit, "--model", tmp_path], "model folder"),
        ([*edit, "--device", "cuda:77"], "cuda:77"),
        ([*edit, "--device", "banana"], "banana"),
        ([*edit, "--build"], "--build is for the engines tensorrt and tensorrt-rtx, and auto was given"),
        ([*edit, "--out", tmp_path / "none" / "made.png"], "does not exist"),
        ([*edit, "--out", tmp_path / "made.bmp"], ".bmp"),
        ([*edit, "--batch", tmp_path / "batch.jsonl"], "--prompt or --batch"),
        (["--batch", tmp_path / "batch.jsonl"], "cannot be read"),
    ]
    before = set(tmp_path.iterdir())
    for args, sentence in cases:
        result = _run(*args, *([] if "--out" in args else ["--out", out]))
        assert result.exit_code == 2, (args, result.output)
        assert sentence in result.stderr, (args, result.stderr)
        assert result.stdout == ""
        assert set(tmp_path.iterdir()) == before


def test_an_unwritable_output_is_found_out_before_the_work(scene_path: Path, tmp_path: Path) -> None:
    result = _run("--prompt", "x", "--source", scene_path, "--out", tmp_path / "none" / "a.png", "--model", "nowhere")
    assert result.exit_code == 2 and "does not exist" in result.stderr  # not the model, which would be opened later


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(reference_path: Path, tmp_path: Path) -> None:
    prompt = "a <imagehere> on a " + "very " * 300 + "red background"
    result = _run("--prompt", prompt, "--image", reference_path, "--out", tmp_path / "o.png", *QUICK)
    assert result.exit_code == 0 and "cut after" in result.stderr


def test_cropping_is_said(scene: Image.Image, tmp_path: Path) -> None:
    scene.resize((128, 64)).save(tmp_path / "wide.png")
    args = ["--prompt", "make it blue", "--source", tmp_path / "wide.png", "--out", tmp_path / "o.png", *QUICK]
    assert "50% of" in _run(*args).stderr
    again = _run(*args, "--fit", "aspect", "--overwrite")
    assert again.exit_code == 0 and "cropped" not in again.stderr


def test_convert_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"nothing")
    result = CliRunner().invoke(main, ["convert", "--ckpt", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, mige_rt.cli; print([m for m in ('numpy', 'torch', 'PIL', 'rich.progress') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(main.commands))
def test_examples_in_the_help_stand_on_lines_of_their_own(name: str) -> None:
    """As they are written: an example that is wrapped cannot be copied."""
    text = CliRunner().invoke(main, [name, "--help"]).stdout
    assert "\\b" not in text
    examples = [line.strip() for line in cleandoc(main.commands[name].help or "").splitlines() if line.startswith("  ")]
    assert all(example in text.split("Options:")[0] for example in examples)


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("mige-rt")
    done = subprocess.run([command, "run", "--help"], capture_output=True, text=True, check=True)
    assert "on white" in " ".join(done.stdout.split()) and "--source-scale" in done.stdout


def test_the_default_model_is_small() -> None:
    assert sum(file.stat().st_size for file in DEFAULT_MODEL.rglob("*") if file.is_file()) < 20 * 2**20


def test_all_paths_are_checked_before_the_first_image_is_made(scene_path: Path, tmp_path: Path) -> None:
    (tmp_path / "o-2.png").mkdir()
    edit = ["--prompt", "make it blue", "--source", scene_path, "--out", tmp_path / "o.png", *QUICK]
    result = _run(*edit, "--num-images", "2")
    assert result.exit_code == 2 and "o-2.png" in result.stderr and not (tmp_path / "o-1.png").exists()


def test_the_readme_is_finished() -> None:
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text()
    assert "PLACEHOLDER" not in text
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links and all((root / link).exists() for link in links), links


def test_savings_solver_and_low_vram_are_options(scene_path: Path, tmp_path: Path) -> None:
    def make(name: str, *options: str) -> bytes:
        out = tmp_path / f"{name}.png"
        steps = ["--steps", "12", "--seed", "1"]
        result = _run("--prompt", "make it blue", "--source", scene_path, "--out", out, *steps, *options)
        assert result.exit_code == 0, result.output
        with Image.open(out) as image:
            assert set(options[::2]) <= {f"--{str(key).replace('_', '-')}" for key in image.info} | {"--low-vram"}
            return image.tobytes()

    plain = make("plain")
    assert make("low", "--low-vram") == plain
    for options in (("--scheduler", "ddim"), ("--guidance-range", "0-0.5"), ("--reuse", "0.1")):
        assert make(options[0][2:], *options) != plain


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--guidance-range", "0.5"], "0.1-0.8"),
        (["--guidance-range", "0.8-0.1"], "guidance range is 0.8 to 0.1"),
        (["--reuse", "2"], "reuse"),
        (["--solver", "euler"], "dpm_solver_pp_2m"),
        (["--compile", "--engine", "onnxruntime"], "torch.compile is for the engine pytorch"),
    ],
)
def test_bad_savings_cost_exit_code_2(options: list[str], words: str, scene_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    result = _run("--prompt", "make it blue", "--source", scene_path, "--out", out, *QUICK, *options)
    assert result.exit_code == 2 and words in result.output, result.output
    assert not out.exists()
