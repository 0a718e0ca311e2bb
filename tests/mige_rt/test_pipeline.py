from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.interface import GRAPHS, Array
from engines.wrapper import WatchedEngine
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import Request, resolve
from trainer.evaluate.metrics import psnr

COMPOSE = "replace the thing in <imagehere> with <imagehere>"
Calls = list[tuple[str, int]]  # the graph, the rows of its first input


@pytest.fixture
def counted(pipe: MigePipeline) -> tuple[MigePipeline, Calls]:
    """A pipeline on the real engine, and what it asks of it."""
    calls: Calls = []

    def count(graph: str, inputs: Mapping[str, Array], run: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        calls.append((graph, next(iter(inputs.values())).shape[0]))
        return run()

    return MigePipeline(pipe.config, pipe.encoder.tokenize, WatchedEngine(pipe.engine, count)), calls


def _difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def test_the_three_uses(pipe: MigePipeline, scene: Image.Image, reference: Image.Image) -> None:
    side = pipe.config.size
    for pictures in (
        pipe("a <imagehere> beside a <ImageHere>", images=[reference, scene], seed=1, steps=2),
        pipe("make the background blue", source=scene, seed=1, steps=2),
        pipe(COMPOSE, images=[scene, reference], source=scene, seed=1, steps=2),
        pipe("a red apple", seed=1, steps=2),
    ):
        assert [picture.size for picture in pictures] == [(side, side)] and pictures[0].mode == "RGB"


def test_a_picture_depends_on_its_own_seed_only(pipe: MigePipeline, scene: Image.Image, reference: Image.Image) -> None:
    prompts = [COMPOSE, "put <imagehere> in place of the thing on the left in <imagehere>", COMPOSE, COMPOSE]
    images = [[scene, reference], [reference, scene], [scene, scene.rotate(90)], [scene, reference]]
    batch = pipe(prompts, images=images, source=[scene] * 4, seed=[5, 6, 7, 8], steps=6)
    for k in (0, 1, 3):
        alone = pipe(prompts[k], images=images[k], source=scene, seed=5 + k, steps=6)[0]
        assert _difference(alone, batch[k]) <= 1
    assert _difference(batch[0], batch[3]) > 8  # another seed, another picture


def test_each_step_is_one_call_of_the_branches_that_count(
    counted: tuple[MigePipeline, Calls], scene: Image.Image, reference: Image.Image
) -> None:
    pipe, calls = counted
    steps: list[tuple[int, int]] = []
    pipe(
        [COMPOSE] * 2,
        images=[[scene, reference]] * 2,
        source=[scene] * 2,
        seed=0,
        steps=3,
        text_scale=5,
        source_scale=1,
        on_step=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    # Each different picture, source and prompt of the batch is encoded once; two branches of two samples.
    expected = {"image_encoder": [2], "text_encoder": [1], "conditioner": [4], "denoiser": [4] * 3, "vae_decoder": [2]}
    for graph, rows in expected.items():
        assert [r for g, r in calls if g == graph] == rows
    assert [r for g, r in calls if g == "vae_encoder"] == [1, 2]
    for scales, branches in [((5, 1.5), 3), ((1, 1), 1), ((5, 5), 2)]:
        calls.clear()
        pipe(COMPOSE, images=[scene, reference], source=scene, steps=2, text_scale=scales[0], source_scale=scales[1])
        assert ("denoiser", branches) in calls


def test_guidance_without_a_branch_is_what_it_is_with_it(pipe: MigePipeline, scene: Image.Image) -> None:
    settings: dict[str, Any] = {"source": scene, "seed": 3, "steps": 5, "text_scale": 3.0}
    two = pipe("make the background red", source_scale=1.0, **settings)[0]
    three = pipe("make the background red", source_scale=1.0 + 1e-7, **settings)[0]
    assert _difference(two, three) <= 1


def test_other_sizes_and_fits(pipe: MigePipeline, scene: Image.Image) -> None:
    wide = scene.resize((128, 64))
    prompt = "make the background blue"
    assert pipe(prompt, source=wide, steps=2, size=(96, 64))[0].size == (96, 64)
    width, height = pipe(prompt, source=wide, steps=2, fit="aspect")[0].size
    assert width == 2 * height or abs(width / height - 2) < 0.4
    assert abs(width * height - pipe.config.size**2) < 0.3 * pipe.config.size**2
    said: list[str] = []
    pipe(prompt, source=wide, steps=2, on_warning=said.append)
    assert len(said) == 1 and "50%" in said[0]
    said.clear()
    pipe(prompt, source=wide, steps=2, fit="pad", on_warning=said.append)
    assert said == []


@pytest.mark.parametrize(
    ("size", "fit"), [((60, 64), None), ((0, 64), None), ((64, 64), "aspect")], ids=["multiple", "zero", "both"]
)
def test_unusable_sizes(pipe: MigePipeline, scene: Image.Image, size: tuple[int, int], fit: Any) -> None:
    with pytest.raises(InputError, match=r"multiples of|fit aspect"):
        pipe("make it blue", source=scene, size=size, fit=fit, steps=2)


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
def test_placeholders_and_pictures_must_match(scene: Image.Image, images: int) -> None:
    for source in (None, scene.rotate(90)):
        with pytest.raises(InputError, match=f"2 <imagehere> and {images} pictures"):
            resolve(Request(COMPOSE, images=(scene,) * images, source=source))


def test_a_reference_beside_a_prompt_that_does_not_mention_it(scene: Image.Image, reference: Image.Image) -> None:
    with pytest.raises(InputError, match="0 <imagehere> and 1 pictures"):
        resolve(Request("make it blue", images=(reference,), source=scene))


def test_a_task_that_needs_a_source_says_so(scene: Image.Image, reference: Image.Image) -> None:
    with pytest.raises(InputError, match="needs a source"):
        resolve(Request("a <imagehere>", images=(reference,), task="edit"))
    with pytest.raises(InputError, match="takes no source"):
        resolve(Request("a <imagehere>", images=(reference,), source=scene, task="subject"))


def test_a_long_prompt_is_cut_with_a_warning(pipe: MigePipeline, reference: Image.Image) -> None:
    said: list[str] = []
    words = "very " * 200
    pipe(f"a <imagehere> on a {words} red background", images=[reference], steps=2, on_warning=said.append)
    assert len(said) == 1 and "very very" in said[0]
    # A placeholder behind the cut goes with the words, and its picture with it.
    pipe(f"a {words} <imagehere>", images=[reference], steps=2, on_warning=said.append)
    assert len(said) == 2


def test_batches_that_do_not_fit_together(pipe: MigePipeline, scene: Image.Image) -> None:
    with pytest.raises(InputError, match="run them apart"):
        pipe(["make it blue", "a cat"], source=[scene, None], steps=2)
    with pytest.raises(InputError, match="2 prompts"):
        pipe(["a", "b"], seed=[1], steps=2)
    with pytest.raises(InputError, match="at least 2"):
        pipe("a cat", steps=1)
    with pytest.raises(InputError, match="finite"):
        pipe("a cat", text_scale=float("nan"))
    with pytest.raises(InputError, match="empty"):
        pipe("  ")


def test_a_second_picture_of_a_prompt_encodes_nothing(
    counted: tuple[MigePipeline, Calls], scene: Image.Image, reference: Image.Image
) -> None:
    pipe, calls = counted
    first = pipe(COMPOSE, [scene, reference], scene, seed=1, steps=2)[0]
    calls.clear()
    again = pipe(COMPOSE, [scene.copy(), reference], scene.copy(), seed=1, steps=2)[0]
    assert [graph for graph, _ in calls] == ["conditioner", "denoiser", "denoiser", "vae_decoder"]
    assert again.tobytes() == first.tobytes()
    for other in (
        {"prompt": COMPOSE.replace("thing", "things")},
        {"images": [scene, scene.rotate(90)]},
        {"fit": "pad"},
    ):
        calls.clear()
        pipe(**{"prompt": COMPOSE, "images": [scene, reference], "source": scene, "seed": 1, "steps": 2, **other})
        assert "text_encoder" in [graph for graph, _ in calls], other
    pipe.forget()
    calls.clear()
    pipe(COMPOSE, [scene, reference], scene, seed=1, steps=2)
    assert [graph for graph, _ in calls if "encoder" in graph] == [
        "vae_encoder",
        "vae_encoder",
        "image_encoder",
        "text_encoder",
    ]


def test_remembered_prompts_beside_new_ones_give_the_same_pictures(
    counted: tuple[MigePipeline, Calls], scene: Image.Image
) -> None:
    pipe, calls = counted
    prompts = ["make it blue", "remove the thing on the left of the picture", "make it blue"]
    together = pipe(prompts, source=scene, seed=[1, 2, 3], steps=2)
    pipe.forget()
    pipe(prompts[1], source=scene, seed=2, steps=2)
    calls.clear()
    mixed = pipe(prompts, source=scene, seed=[1, 2, 3], steps=2)
    assert [rows for graph, rows in calls if graph == "text_encoder"] == [1]
    for a, b in zip(together, mixed, strict=True):
        assert psnr(np.asarray(a), np.asarray(b)) > 60


def test_only_so_many_prompts_are_remembered(counted: tuple[MigePipeline, Calls], monkeypatch) -> None:
    monkeypatch.setattr("mige_rt.conditioning.KEPT", 2)
    pipe, calls = counted
    for prompt in ("a", "b", "c"):
        pipe(f"a plain {prompt}", seed=1, steps=2)
    calls.clear()
    pipe("a plain c", seed=1, steps=2)
    assert "text_encoder" not in [graph for graph, _ in calls]
    pipe("a plain a", seed=1, steps=2)
    assert "text_encoder" in [graph for graph, _ in calls]


def test_with_low_memory_graphs_are_released_and_the_picture_is_the_same(
    pipe: MigePipeline, scene: Image.Image
) -> None:
    from engines.onnx_runtime import OnnxRuntimeEngine
    from engines.pytorch import PyTorchEngine

    wanted = pipe("make it blue", source=scene, seed=1, steps=2)[0]
    for name in ("onnxruntime", "pytorch"):
        small = MigePipeline.from_pretrained(engine=name, device="cpu", low_memory=True)
        for _ in range(2):
            assert psnr(np.asarray(small("make it blue", source=scene, seed=1, steps=2)[0]), np.asarray(wanted)) > 60
            small.forget()
        if isinstance(small.engine, OnnxRuntimeEngine):
            assert {graph for graph, _ in small.engine.sessions} == {"vae_decoder"}
        else:
            assert isinstance(small.engine, PyTorchEngine)
            model = small.engine.model
            held = {graph for graph in GRAPHS if all(not p.is_meta for p in getattr(model, graph).parameters())}
            assert held == {"vae_decoder"}


def test_guidance_in_a_part_of_the_steps_runs_one_branch_in_the_others(
    counted: tuple[MigePipeline, Calls], scene: Image.Image
) -> None:
    pipe, calls = counted
    blue = partial(pipe, "make it blue", source=scene, seed=1, steps=10, text_scale=5.0, source_scale=1.0)
    exact = blue()[0]
    calls.clear()
    part = blue(guidance_range=(0.2, 0.6))[0]
    assert [rows for graph, rows in calls if graph == "denoiser"] == [1, 1, 2, 2, 2, 2, 1, 1, 1, 1]
    assert part.tobytes() != exact.tobytes()
    with pytest.raises(InputError, match=r"guidance range is 0\.6 to 0\.2"):
        pipe("make it blue", source=scene, guidance_range=(0.6, 0.2))


def test_reuse_skips_the_model_where_little_changes(counted: tuple[MigePipeline, Calls], scene: Image.Image) -> None:
    pipe, calls = counted
    exact = np.asarray(pipe("make it blue", source=scene, seed=1, steps=30)[0])
    evaluations, quality = [], []
    for threshold in (0.0, 0.03, 0.1):
        calls.clear()
        picture = pipe("make it blue", source=scene, seed=1, steps=30, reuse=threshold)[0]
        evaluations.append(sum(graph == "denoiser" for graph, _ in calls))
        quality.append(psnr(np.asarray(picture), exact))
    assert evaluations[0] == 30 and evaluations[0] > evaluations[1] > evaluations[2] >= 3
    assert quality[0] > 60 and quality[0] > quality[1] > quality[2] > 15
    with pytest.raises(InputError, match="reuse"):
        pipe("make it blue", source=scene, reuse=-1.0)
