"""The API as a user of diffusers knows it."""

import inspect
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import mige_rt
from mige_rt import InputError, MigePipeline, MigePipelineOutput
from mige_rt.bundle import DEFAULT_MODEL, MANIFEST
from mige_rt.cli import main

EDIT = "make the background blue"


def _same(a: Image.Image, b: Image.Image) -> bool:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) <= 1


def test_the_package_gives_its_public_names_and_its_types() -> None:
    for name in mige_rt.__all__:
        assert getattr(mige_rt, name) is not None
    assert mige_rt.__version__.count(".") == 2
    assert files("mige_rt").joinpath("py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        _ = mige_rt.Pipeline  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("method", [MigePipeline.from_pretrained, MigePipeline.__call__, MigePipeline.generate])
def test_help_says_what_every_argument_is(method: Any) -> None:
    text = inspect.getdoc(method) or ""
    arguments = text.partition("Args:")[2]
    missing = [name for name in inspect.signature(method).parameters if f" {name}: " not in arguments]
    assert set(missing) <= {"self"}
    assert "Raises:" in text


def test_several_images_of_a_prompt_are_those_of_their_seeds(pipe: MigePipeline, scene: Image.Image) -> None:
    result = pipe(EDIT, source=scene, seed=5, num_images_per_prompt=6, num_inference_steps=2)
    assert isinstance(result, MigePipelineOutput)
    assert result.seeds == [5, 6, 7, 8, 9, 10] and len(result.images) == 6  # more than are made at once
    for seed, image in ((5, result.images[0]), (10, result.images[5])):
        assert _same(pipe(EDIT, source=scene, seed=seed, num_inference_steps=2).images[0], image)
    two = pipe([EDIT, "make it red"], source=scene, seed=[1, 8], num_images_per_prompt=2, num_inference_steps=2)
    assert two.seeds == [1, 2, 8, 9]
    assert _same(pipe("make it red", source=scene, seed=9, num_inference_steps=2).images[0], two.images[3])
    assert pipe(["a", "b"], seed=3, num_images_per_prompt=2, num_inference_steps=2).seeds == [3, 4, 5, 6]
    with pytest.raises(InputError, match="num_images_per_prompt is 0"):
        pipe("a", num_images_per_prompt=0)


def test_a_generator_gives_the_seeds(pipe: MigePipeline) -> None:
    for make in (lambda: np.random.default_rng(1), lambda: torch.Generator().manual_seed(1)):
        generator = make()
        first = pipe("a", generator=generator, num_inference_steps=2)
        assert pipe("a", generator=generator, num_inference_steps=2).seeds != first.seeds
        assert pipe("a", generator=make(), num_inference_steps=2).seeds == first.seeds
        assert _same(pipe("a", seed=first.seeds[0], num_inference_steps=2).images[0], first.images[0])
    with pytest.raises(InputError, match="both seed and generator"):
        pipe("a", seed=1, generator=np.random.default_rng(1))
    with pytest.raises(InputError, match="generator is a int"):
        pipe("a", generator=3)  # type: ignore[arg-type]


def test_a_drawn_seed_is_told(pipe: MigePipeline) -> None:
    result = pipe("a", num_inference_steps=2)
    assert _same(pipe("a", seed=result.seeds[0], num_inference_steps=2).images[0], result.images[0])


def test_the_callback_is_that_of_diffusers(pipe: MigePipeline, scene: Image.Image) -> None:
    steps: list[tuple[int, float]] = []

    def stop_changes(pipeline: MigePipeline, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        assert pipeline is pipe
        steps.append((step, timestep))
        return {"latents": values["latents"] * 0}

    blank = pipe(EDIT, source=scene, seed=1, num_inference_steps=3, callback_on_step_end=stop_changes).images[0]
    assert [step for step, _ in steps] == [0, 1, 2] and steps[0][1] == pytest.approx(999)
    other = pipe("a red apple", seed=2, num_inference_steps=3, callback_on_step_end=stop_changes).images[0]
    assert blank.tobytes() == other.tobytes()


def test_images_of_any_mode_are_taken_and_paths_refused(pipe: MigePipeline, scene: Image.Image) -> None:
    wanted = pipe(EDIT, source=scene, seed=1, num_inference_steps=2).images[0]
    assert _same(pipe(EDIT, source=scene.convert("RGBA"), seed=1, num_inference_steps=2).images[0], wanted)
    for arguments in ({"source": "scene.png"}, {"source": np.asarray(scene)}):
        with pytest.raises(InputError, match="a Pillow image is expected"):
            pipe(EDIT, **arguments)  # type: ignore[arg-type]
    for images in (scene, "scene.png"):
        with pytest.raises(InputError, match="images is a list of Pillow images"):
            pipe("a <imagehere>", images=images)  # type: ignore[arg-type]


def test_a_repository_that_was_downloaded_is_opened(
    pipe: MigePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "models--someone--mige"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(DEFAULT_MODEL, cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    opened = MigePipeline.from_pretrained("someone/mige", device="cpu", local_files_only=True)
    assert opened.model_name == "someone/mige" and opened.config == pipe.config
    with pytest.raises(InputError, match=r"someone/other is no path here, and could not be downloaded"):
        MigePipeline.from_pretrained("someone/other", local_files_only=True)


@pytest.mark.parametrize("file", [MANIFEST, "config.json"])
def test_folders_of_the_first_schema_are_refused_with_the_command_that_makes_new_ones(
    tmp_path: Path, file: str
) -> None:
    (tmp_path / file).write_text(json.dumps({"schema": 1, "model": {}}))
    command = "mige-rt export --ckpt" if file == MANIFEST else "mige-rt convert --ckpt"
    with pytest.raises(InputError, match=rf"{file} has schema 1, this version of mige-rt reads 2: .*{command}"):
        MigePipeline.from_pretrained(tmp_path)


def test_the_command_takes_the_names_of_diffusers(scene: Image.Image, tmp_path: Path) -> None:
    scene.save(tmp_path / "scene.png")
    arguments = ["run", "--prompt", EDIT, "--source", str(tmp_path / "scene.png"), "--seed", "1"]
    ours = ["--steps", "3", "--text-scale", "3", "--source-scale", "1.5", "--size", "64x32", "--num-images", "1"]
    theirs = ["--num-inference-steps", "3", "--guidance-scale", "3", "--image-guidance-scale", "1.5"]
    theirs += ["--width", "64", "--height", "32", "--num-images-per-prompt", "1"]
    for name, options in (("ours", ours), ("theirs", theirs)):
        result = CliRunner().invoke(main, [*arguments, *options, "--out", str(tmp_path / f"{name}.png")])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "ours.png").read_bytes() == (tmp_path / "theirs.png").read_bytes()
    result = CliRunner().invoke(main, [*arguments, "--size", "64", "--width", "64"])
    assert result.exit_code == 2 and "either --size or --width and --height" in result.output
