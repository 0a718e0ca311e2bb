"""What the page reads from an image file."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mige_rt.errors import InputError
from mige_rt.image_output import save_image
from mige_rt.pipeline import MigePipeline

pytest.importorskip("gradio", reason="the page needs the extra ui")

from importlib.resources import files

from mige_rt.batch.images import ImageJob, ImageSettings, make_images
from mige_rt.requests import RequestRecord
from mige_rt.sampling_params import SamplingParams
from mige_rt.ui.settings import PageSettings, settings_of

ROOT = Path(__file__).parents[3]


def test_the_settings_are_those_of_a_run(pipe: MigePipeline, tmp_path: Path) -> None:
    settings = ImageSettings(params=SamplingParams(num_inference_steps=2, guidance_scale=3.5))
    record = RequestRecord("make the background blue", source=str(ROOT / "docs/scene.png"))
    request = settings.resolve(record, Path(), 7)
    job = ImageJob(prompt=record.prompt, request=request, paths=(tmp_path / "a.png",))
    (path,) = make_images(pipe, job, settings)
    assert settings_of(path) == PageSettings(
        task="edit",
        prompt="make the background blue",
        seed=7,
        num_inference_steps=2,
        guidance_scale=3.5,
        image_guidance_scale=pipe.config.defaults.edit.image_guidance_scale,
        size=(64, 64),
    )


def test_what_the_page_cannot_take_over_is_named(pipe: MigePipeline, tmp_path: Path) -> None:
    params = SamplingParams(num_inference_steps=2, scheduler="ddim", reuse=0.1, guidance_range=(0, 0.5), fit="pad")
    settings = ImageSettings(params=replace(params, paste_back=True), edit_scope="global")
    record = RequestRecord("make the background blue", source=str(ROOT / "docs/scene.png"))
    job = ImageJob(prompt=record.prompt, request=settings.resolve(record, Path(), 7), paths=(tmp_path / "a.png",))
    (path,) = make_images(pipe, job, settings)
    assert settings_of(path).summary == (
        "The settings are in the tab above, but for scheduler ddim, edit_scope global, fit pad, guidance_range "
        "(0, 0.5), reuse 0.1, paste_back True, which only mige-rt run takes. Add its images, if they are not there."
    )


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, "holds no settings"),
        ({"prompt": "a cat", "task": "none"}, "holds no settings"),
        ({"prompt": "a cat", "task": "edit", "seed": "many"}, "cannot be used"),
        ({"prompt": "a cat", "task": "edit", "size": "large"}, "'large' is no size"),
    ],
)
def test_an_image_without_settings_is_refused(info: dict[str, str], message: str, tmp_path: Path) -> None:
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", info)
    with pytest.raises(InputError, match=message):
        settings_of(tmp_path / "a.png")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(InputError, match="holds no settings"):
        settings_of(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["scene.png", "subject.png"])
def test_the_examples_are_those_of_the_docs(name: str) -> None:
    packaged = files("mige_rt.ui") / "examples" / name
    assert packaged.read_bytes() == (ROOT / "docs" / name).read_bytes()
