from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from cachetools import LRUCache
from PIL import Image

from engines.interface import Array
from engines.wrapper import HookedEngine
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import Request, resolve
from trainer.evaluate.metrics import psnr

COMPOSE = "replace the thing in <imagehere> with <imagehere>"
Calls = list[tuple[str, int]]  # the graph, the batch size of its first input


@pytest.fixture
def counted(pipe: MigePipeline) -> tuple[MigePipeline, Calls]:
    """A pipeline on the real engine, and what it asks of it."""
    calls: Calls = []

    def count(graph: str, inputs: Mapping[str, Array], run: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        calls.append((graph, next(iter(inputs.values())).shape[0]))
        return run()

    return MigePipeline(pipe.config, pipe.condition_encoder.tokenize, HookedEngine(pipe.engine, count)), calls


def _difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def test_the_three_uses(pipe: MigePipeline, scene: Image.Image, reference: Image.Image) -> None:
    side = pipe.config.size
    for result in (
        pipe("a <imagehere> beside a <ImageHere>", images=[reference, scene], seed=1, num_inference_steps=2),
        pipe("make the background blue", source=scene, seed=1, num_inference_steps=2),
        pipe(COMPOSE, images=[scene, reference], source=scene, seed=1, num_inference_steps=2),
        pipe("a red apple", seed=1, num_inference_steps=2),
    ):
        assert [image.size for image in result.images] == [(side, side)] and result.images[0].mode == "RGB"
        assert result.seeds == [1]


def test_a_image_depends_on_its_own_seed_only(pipe: MigePipeline, scene: Image.Image, reference: Image.Image) -> None:
    prompts = [COMPOSE, "put <imagehere> in place of the thing on the left in <imagehere>", COMPOSE, COMPOSE]
    images = [[scene, reference], [reference, scene], [scene, scene.rotate(90)], [scene, reference]]
    batch = pipe(prompts, images=images, source=[scene] * 4, seed=[5, 6, 7, 8], num_inference_steps=6).images
    for k in (0, 1, 3):
        alone = pipe(prompts[k], images=images[k], source=scene, seed=5 + k, num_inference_steps=6).images[0]
        assert _difference(alone, batch[k]) <= 1
    assert _difference(batch[0], batch[3]) > 8  # another seed, another image


def test_each_step_is_one_call_of_the_branches_that_count(
    counted: tuple[MigePipeline, Calls], scene: Image.Image, reference: Image.Image
) -> None:
    pipe, calls = counted
    steps: list[int] = []

    def on_step_end(_: MigePipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        steps.append(step)
        assert 0 <= timestep <= 999 and values["latents"].shape[0] == 2

    pipe(
        [COMPOSE] * 2,
        images=[[scene, reference]] * 2,
        source=[scene] * 2,
        seed=0,
        num_inference_steps=3,
        guidance_scale=5,
        image_guidance_scale=1,
        callback_on_step_end=on_step_end,
    )
    assert steps == [0, 1, 2]
    # Each different image, source and prompt of the batch is encoded once; two branches of two samples.
    expected = {"image_encoder": [2], "text_encoder": [1], "conditioner": [4], "denoiser": [4] * 3, "vae_decoder": [2]}
    for graph, batches in expected.items():
        assert [b for g, b in calls if g == graph] == batches
    assert [b for g, b in calls if g == "vae_encoder"] == [1, 1]  # the source, which is a reference, too, and the other
    for scales, branches in [((5, 1.5), 3), ((1, 1), 1), ((5, 5), 2)]:
        calls.clear()
        pipe(
            COMPOSE,
            images=[scene, reference],
            source=scene,
            num_inference_steps=2,
            guidance_scale=scales[0],
            image_guidance_scale=scales[1],
        )
        assert ("denoiser", branches) in calls


def test_guidance_without_a_branch_is_what_it_is_with_it(pipe: MigePipeline, scene: Image.Image) -> None:
    arguments: dict[str, Any] = {"source": scene, "seed": 3, "num_inference_steps": 5, "guidance_scale": 3.0}
    two = pipe("make the background red", image_guidance_scale=1.0, **arguments).images[0]
    three = pipe("make the background red", image_guidance_scale=1.0 + 1e-7, **arguments).images[0]
    assert _difference(two, three) <= 1


def test_other_sizes_and_fits(pipe: MigePipeline, scene: Image.Image) -> None:
    wide = scene.resize((128, 64))
    prompt = "make the background blue"
    assert pipe(prompt, source=wide, num_inference_steps=2, width=96, height=64).images[0].size == (96, 64)
    width, height = pipe(prompt, source=wide, num_inference_steps=2, fit="aspect").images[0].size
    assert width == 2 * height or abs(width / height - 2) < 0.4
    assert abs(width * height - pipe.config.size**2) < 0.3 * pipe.config.size**2
    said: list[str] = []
    pipe(prompt, source=wide, num_inference_steps=2, on_warning=said.append)
    assert len(said) == 1 and "50%" in said[0]
    said.clear()
    pipe(prompt, source=wide, num_inference_steps=2, fit="pad", on_warning=said.append)
    assert said == []


@pytest.mark.parametrize(
    ("size", "fit"), [((60, 64), None), ((0, 64), None), ((64, 64), "aspect")], ids=["multiple", "zero", "both"]
)
def test_unusable_sizes(pipe: MigePipeline, scene: Image.Image, size: tuple[int, int], fit: Any) -> None:
    with pytest.raises(InputError, match=r"multiples of|fit aspect"):
        pipe("make it blue", source=scene, width=size[0], height=size[1], fit=fit, num_inference_steps=2)


def test_a_source_is_what_a_prompt_without_placeholder_speaks_of(scene: Image.Image, reference: Image.Image) -> None:
    for request in (
        Request("make it night", source=scene),
        Request("make it night in <imagehere>", source=scene),
        Request("make it night in <imagehere>", images=(scene,), source=scene),
        Request("make it night", images=(scene.copy(),), source=scene),
    ):
        resolved = resolve(request)
        assert resolved.task == "edit" and resolved.prompt == "make it night in<imagehere>".replace(
            "in<", "in <" if "<" in request.prompt else "in<"
        )
        assert len(resolved.images) == 1
    assert resolve(Request("make it a painting", source=scene), "global").prompt == "make it a painting of<imagehere>"
    twice = resolve(Request("darken the image but keep this photo sharp", source=scene))
    assert len(twice.images) == 2 and twice.task == "edit"
    assert resolve(Request(COMPOSE, images=(scene, reference), source=scene)).task == "compose"
    assert resolve(Request("a <imagehere>", images=(reference,))).task == "subject"


@pytest.mark.parametrize("images", [0, 1, 3])
def test_placeholders_and_images_must_match(scene: Image.Image, images: int) -> None:
    for source in (None, scene.rotate(90)):
        with pytest.raises(InputError, match=f"2 <imagehere> and {images} images"):
            resolve(Request(COMPOSE, images=(scene,) * images, source=source))


def test_a_reference_beside_a_prompt_that_does_not_mention_it(scene: Image.Image, reference: Image.Image) -> None:
    with pytest.raises(InputError, match="0 <imagehere> and 1 images"):
        resolve(Request("make it blue", images=(reference,), source=scene))


def test_a_task_that_needs_a_source_says_so(scene: Image.Image, reference: Image.Image) -> None:
    with pytest.raises(InputError, match="needs a source"):
        resolve(Request("a <imagehere>", images=(reference,), task="edit"))
    with pytest.raises(InputError, match="takes no source"):
        resolve(Request("a <imagehere>", images=(reference,), source=scene, task="subject"))


def test_a_long_prompt_is_cut_with_a_warning(pipe: MigePipeline, reference: Image.Image) -> None:
    said: list[str] = []
    words = "very " * 200
    pipe(
        f"a <imagehere> on a {words} red background", images=[reference], num_inference_steps=2, on_warning=said.append
    )
    assert len(said) == 1 and "very very" in said[0]
    # A placeholder behind the cut goes with the words, and its image with it.
    pipe(f"a {words} <imagehere>", images=[reference], num_inference_steps=2, on_warning=said.append)
    assert len(said) == 2


def test_batches_that_do_not_fit_together(pipe: MigePipeline, scene: Image.Image) -> None:
    with pytest.raises(InputError, match="run them apart"):
        pipe(["make it blue", "a cat"], source=[scene, None], num_inference_steps=2)
    with pytest.raises(InputError, match="2 prompts"):
        pipe(["a", "b"], seed=[1], num_inference_steps=2)
    with pytest.raises(InputError, match="at least 2"):
        pipe("a cat", num_inference_steps=1)
    with pytest.raises(InputError, match="finite"):
        pipe("a cat", guidance_scale=float("nan"))
    with pytest.raises(InputError, match="empty"):
        pipe("  ")


def test_a_second_image_of_a_prompt_encodes_nothing(
    counted: tuple[MigePipeline, Calls], scene: Image.Image, reference: Image.Image
) -> None:
    pipe, calls = counted
    first = pipe(COMPOSE, [scene, reference], scene, seed=1, num_inference_steps=2).images[0]
    calls.clear()
    again = pipe(COMPOSE, [scene.copy(), reference], scene.copy(), seed=1, num_inference_steps=2).images[0]
    assert [graph for graph, _ in calls] == ["conditioner", "denoiser", "denoiser", "vae_decoder"]
    assert again.tobytes() == first.tobytes()
    for other in (
        {"prompt": COMPOSE.replace("thing", "things")},
        {"images": [scene, scene.rotate(90)]},
        {"fit": "pad"},
    ):
        calls.clear()
        pipe(
            **{
                "prompt": COMPOSE,
                "images": [scene, reference],
                "source": scene,
                "seed": 1,
                "num_inference_steps": 2,
                **other,
            }
        )
        assert "text_encoder" in [graph for graph, _ in calls], other
    pipe.clear_cache()
    calls.clear()
    pipe(COMPOSE, [scene, reference], scene, seed=1, num_inference_steps=2)
    assert [graph for graph, _ in calls if "encoder" in graph] == [
        "vae_encoder",
        "vae_encoder",
        "image_encoder",
        "text_encoder",
    ]


def test_remembered_prompts_beside_new_ones_give_the_same_images(
    counted: tuple[MigePipeline, Calls], scene: Image.Image
) -> None:
    pipe, calls = counted
    prompts = ["make it blue", "remove the thing on the left of the picture", "make it blue"]
    together = pipe(prompts, source=scene, seed=[1, 2, 3], num_inference_steps=2).images
    pipe.clear_cache()
    pipe(prompts[1], source=scene, seed=2, num_inference_steps=2)
    calls.clear()
    mixed = pipe(prompts, source=scene, seed=[1, 2, 3], num_inference_steps=2).images
    assert [batch for graph, batch in calls if graph == "text_encoder"] == [1]
    for a, b in zip(together, mixed, strict=True):
        assert psnr(np.asarray(a), np.asarray(b)) > 60


def test_only_so_many_prompts_are_remembered(counted: tuple[MigePipeline, Calls], monkeypatch) -> None:
    pipe, calls = counted
    monkeypatch.setattr(pipe.condition_encoder, "_prompts", LRUCache(2))
    for prompt in ("a", "b", "c"):
        pipe(f"a plain {prompt}", seed=1, num_inference_steps=2)
    calls.clear()
    pipe("a plain c", seed=1, num_inference_steps=2)
    assert "text_encoder" not in [graph for graph, _ in calls]
    pipe("a plain a", seed=1, num_inference_steps=2)
    assert "text_encoder" in [graph for graph, _ in calls]


def test_with_low_memory_graphs_are_released_and_the_image_is_the_same(pipe: MigePipeline, scene: Image.Image) -> None:
    from engines.onnx_runtime import OnnxRuntimeEngine
    from engines.pytorch import PyTorchEngine

    wanted = pipe("make it blue", source=scene, seed=1, num_inference_steps=2).images[0]
    for name in ("onnxruntime", "pytorch"):
        small = MigePipeline.from_pretrained(engine=name, device="cpu", low_memory=True)
        for _ in range(2):
            assert (
                psnr(
                    np.asarray(small("make it blue", source=scene, seed=1, num_inference_steps=2).images[0]),
                    np.asarray(wanted),
                )
                > 60
            )
            small.clear_cache()
        if isinstance(small.engine, OnnxRuntimeEngine):
            assert {graph for graph, _ in small.engine.sessions} == {"vae_decoder"}
        else:
            assert isinstance(small.engine, PyTorchEngine)
            model = small.engine.model
            held = {graph for graph in GRAPHS if all(not p.is_meta for p in model.graph(graph).parameters())}
            assert held == {"vae_decoder"}


def test_guidance_in_a_part_of_the_steps_runs_one_branch_in_the_others(
    counted: tuple[MigePipeline, Calls], scene: Image.Image
) -> None:
    pipe, calls = counted
    blue = partial(
        pipe, "make it blue", source=scene, seed=1, num_inference_steps=10, guidance_scale=5.0, image_guidance_scale=1.0
    )
    exact = blue().images[0]
    calls.clear()
    part = blue(guidance_range=(0.2, 0.6)).images[0]
    assert [batch for graph, batch in calls if graph == "denoiser"] == [1, 1, 2, 2, 2, 2, 1, 1, 1, 1]
    assert part.tobytes() != exact.tobytes()
    with pytest.raises(InputError, match=r"guidance range is 0\.6 to 0\.2"):
        pipe("make it blue", source=scene, guidance_range=(0.6, 0.2))


def test_reuse_skips_the_model_where_little_changes(counted: tuple[MigePipeline, Calls], scene: Image.Image) -> None:
    pipe, calls = counted
    exact = np.asarray(pipe("make it blue", source=scene, seed=1, num_inference_steps=30).images[0])
    evaluations, quality = [], []
    for threshold in (0.0, 0.03, 0.1):
        calls.clear()
        image = pipe("make it blue", source=scene, seed=1, num_inference_steps=30, reuse=threshold).images[0]
        evaluations.append(sum(graph == "denoiser" for graph, _ in calls))
        quality.append(psnr(np.asarray(image), exact))
    assert evaluations[0] == 30 and evaluations[0] > evaluations[1] > evaluations[2] >= 3
    assert quality[0] > 60 and quality[0] > quality[1] > quality[2] > 15
    with pytest.raises(InputError, match="reuse"):
        pipe("make it blue", source=scene, reuse=-1.0)
