"""MIGE in the library diffusers: the same images as our own pipeline, by the library's conventions."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from PIL import Image

import mige_rt
from mige_rt import InputError
from mige_rt.bundle import DEFAULT_MODEL, check_files, read_manifest
from mige_rt.diffusers import MigeBlocks, MigeModel, MigePipeline
from mige_rt.scheduler import draw_noise

EDIT = "make the background blue"
LATENTS = (1, 8, 16, 16)  # of one image of the default model
TOLERANCE = 1  # grey levels: diffusers' schedulers compute their coefficients in another order


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def library_pipe(pipe: mige_rt.MigePipeline) -> MigePipeline:
    """The default model as a pipeline of diffusers; the engine is the one that our own uses."""
    opened = MigePipeline.from_pretrained(DEFAULT_MODEL)
    opened.set_progress_bar_config(disable=True)
    return opened


def ddim(steps: int, like: Any) -> DDIMScheduler:
    """DDIM of diffusers at the timesteps of ours, which are whole numbers where `steps` divides 999."""
    changes: Any = {"timestep_spacing": "leading", "steps_offset": 999 // steps, "set_alpha_to_one": False}
    return DDIMScheduler.from_config(like, clip_sample=False, **changes)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("name", "steps"), [("dpm_solver_pp_2m", 9), ("dpm_solver_pp_2m", 27), ("ddim", 9)])
def test_the_image_is_that_of_our_own_pipeline(
    pipe: mige_rt.MigePipeline, library_pipe: MigePipeline, scene: Image.Image, name: Any, steps: int
) -> None:
    """From the same generator, with the library's schedulers, and guidance by the prompt and by the source."""
    scales: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 3.0, "image_guidance_scale": 1.5}
    ours = pipe(EDIT, source=scene, generator=generator(), scheduler=name, **scales).images[0]
    components = library_pipe.components
    if name == "ddim":
        components["scheduler"] = ddim(steps, library_pipe.scheduler.config)
    theirs = MigePipeline(**components)
    theirs.set_progress_bar_config(disable=True)
    image = theirs(EDIT, source=scene, generator=generator(), **scales).images[0]
    assert difference(image, ours) <= TOLERANCE


def test_references_and_several_images(
    pipe: mige_rt.MigePipeline, library_pipe: MigePipeline, reference: Image.Image
) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 3, "num_images_per_prompt": 6}  # more than are made at once
    ours = pipe("a <imagehere> on a red background", [reference], generator=generator(), **arguments).images
    theirs = library_pipe("a <imagehere> on a red background", [reference], generator=generator(), **arguments).images
    assert len(theirs) == 6 and all(difference(a, b) <= TOLERANCE for a, b in zip(ours, theirs, strict=True))
    several = [generator(k) for k in range(2)]
    two = library_pipe(["a red apple"] * 2, generator=several, num_inference_steps=3).images
    alone = library_pipe("a red apple", generator=generator(1), num_inference_steps=3).images[0]
    assert difference(two[1], alone) <= TOLERANCE
    with pytest.raises(InputError, match="3 generators were given for 2 images"):
        library_pipe(["a"] * 2, generator=[generator()] * 3)


def test_output_types(library_pipe: MigePipeline) -> None:
    def make(output_type: Any, **arguments: Any) -> Any:
        return library_pipe("x", generator=generator(), num_inference_steps=3, output_type=output_type, **arguments)

    image = make("pil").images[0]
    array, tensor = make("np").images, make("pt").images
    assert array.shape == (1, 64, 64, 3) and tensor.shape == (1, 3, 64, 64)
    assert np.abs(array[0] * 255 - np.asarray(image)).max() <= 0.51 and 0 <= array.min() <= array.max() <= 1
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    latents = make("latent").images
    assert np.array_equal(np.asarray(library_pipe.mige.engine_pipeline.decode(latents.numpy())[0]), np.asarray(image))
    assert difference(make("pil", return_dict=False)[0][0], image) == 0
    with pytest.raises(InputError, match="output_type is 'jpeg'"):
        make("jpeg")


def test_latents_are_the_noise(library_pipe: MigePipeline, pipe: mige_rt.MigePipeline) -> None:
    noise = torch.from_numpy(draw_noise([7], (pipe.config.vae.channels, 16, 16)))
    ours = pipe("a red apple", seed=7, num_inference_steps=9).images[0]
    assert difference(library_pipe("a red apple", latents=noise, num_inference_steps=9).images[0], ours) <= TOLERANCE
    with pytest.raises(InputError, match=r"latents have the shape .*is expected"):
        library_pipe("a red apple", latents=noise[:, :, :8], num_inference_steps=9)
    with pytest.raises(InputError, match="latents for 1 images were given, and 2"):
        library_pipe("a red apple", latents=noise, num_images_per_prompt=2)


def test_the_callback_sees_replaces_and_interrupts(library_pipe: MigePipeline) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []

    def watch(pipe: MigePipeline, i: int, timestep: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, int(timestep), tuple(values["latents"].shape)))
        return {"latents": torch.zeros_like(values["latents"])} if i == 2 else values

    result = library_pipe(
        "x", num_inference_steps=3, callback_on_step_end=watch, output_type="latent", generator=generator()
    )
    assert seen == [(0, 999, LATENTS), (1, 666, LATENTS), (2, 333, LATENTS)]
    assert not result.images.any(), "the latents that the callback gave are gone on with"

    def stop(pipe: MigePipeline, i: int, timestep: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i == 1
        return {}

    library_pipe("x", num_inference_steps=9, callback_on_step_end=stop)
    assert library_pipe.num_timesteps == 2
    with pytest.raises(InputError, match="prompt_embeds"):
        library_pipe("x", callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_noise_that_a_scheduler_adds_follows_from_the_seed(library_pipe: MigePipeline) -> None:
    scheduler = EulerAncestralDiscreteScheduler.from_config(library_pipe.scheduler.config)
    ancestral = MigePipeline(**{**library_pipe.components, "scheduler": scheduler})
    ancestral.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"num_inference_steps": 4, "generator": [generator(1), generator(2)]}
    two = ancestral(["a red apple"] * 2, **arguments).images
    alone = ancestral("a red apple", num_inference_steps=4, generator=generator(2)).images[0]
    assert difference(two[1], alone) <= TOLERANCE and difference(two[0], two[1]) > TOLERANCE


def test_what_is_saved_opens_again_and_is_a_bundle(library_pipe: MigePipeline, tmp_path: Path) -> None:
    saved = MigePipeline(**library_pipe.components)
    saved.scheduler = ddim(9, library_pipe.scheduler.config)
    out = tmp_path / "saved"
    saved.save_pretrained(out)
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "MigePipeline" and index["scheduler"] == ["diffusers", "DDIMScheduler"]
    check_files(out, read_manifest(out), everything=True)
    opened = MigePipeline.from_pretrained(out, trust=True)
    opened.set_progress_bar_config(disable=True)
    assert isinstance(opened, DiffusionPipeline) and isinstance(opened.scheduler, DDIMScheduler)
    again = opened("a red apple", num_inference_steps=9, generator=generator()).images[0]
    assert difference(again, saved("a red apple", num_inference_steps=9, generator=generator()).images[0]) == 0
    with pytest.raises(InputError, match="exists already"):
        saved.save_pretrained(out)
    config = out / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("DDIMScheduler", "AutoModel"))
    with pytest.raises(InputError, match="'AutoModel', which is no scheduler"):
        MigePipeline.from_pretrained(out, trust=True)


def test_devices_and_types(library_pipe: MigePipeline) -> None:
    mige = library_pipe.mige.engine_pipeline
    assert library_pipe.to("cpu") is library_pipe and library_pipe.to("cpu", torch.float32) is library_pipe
    assert library_pipe.mige.engine_pipeline is mige, "it is there already"
    assert library_pipe.device == torch.device("cpu") and library_pipe.dtype == torch.float32
    with pytest.raises(InputError, match="cuda:77"):
        library_pipe.to("cuda:77")
    with pytest.raises(InputError, match=r"torch\.int64 was given"):
        library_pipe.to(torch.int64)
    with pytest.raises(InputError, match="mige-rt pull"):
        MigeModel.from_pretrained(revision="v1")  # pyright: ignore[reportArgumentType]


def test_an_engine_of_torch_tensors(scene: Image.Image) -> None:
    pytorch = MigePipeline.from_pretrained(engine="pytorch")
    pytorch.set_progress_bar_config(disable=True)
    ours = pytorch.mige.engine_pipeline(EDIT, source=scene, generator=generator(), num_inference_steps=3).images[0]
    theirs = pytorch(EDIT, source=scene, generator=generator(), num_inference_steps=3).images[0]
    assert difference(theirs, ours) <= TOLERANCE


def test_modular_blocks_make_the_same_image(library_pipe: MigePipeline, scene: Image.Image, tmp_path: Path) -> None:
    blocks = MigeBlocks()
    assert {component.name for component in blocks.expected_components} == {"mige", "scheduler"}
    modular: Any = blocks.init_pipeline()
    assert isinstance(modular, ModularPipeline)
    modular = cast("Any", modular)
    modular.load_components()
    arguments: dict[str, Any] = {"source": scene, "num_inference_steps": 4}
    images = modular(prompt=EDIT, generator=generator(), output="images", **arguments)
    assert difference(images[0], library_pipe(EDIT, generator=generator(), **arguments).images[0]) == 0
    modular.update_components(scheduler=ddim(9, library_pipe.scheduler.config))
    state = modular(prompt=EDIT, source=scene, num_inference_steps=9, generator=generator())
    assert state.get("latents").shape == LATENTS and difference(state.get("images")[0], images[0]) > 0
    blocks.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "modular_config.json").read_text())
    assert config["_class_name"] == "MigeBlocks"
