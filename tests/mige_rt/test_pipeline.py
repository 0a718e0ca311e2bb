from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.interface import Array
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline, Request, resolve

COMPOSE = "replace the thing in <imagehere> with <imagehere>"


class Counting:
    """An engine that counts what is asked of the real one behind it."""

    def __init__(self, pipe: MigePipeline) -> None:
        self.inner = pipe.engine
        self.name, self.device, self.precision = self.inner.name, self.inner.device, self.inner.precision
        self.limits = self.inner.limits
        self.calls: list[tuple[str, int]] = []  # the graph, the rows of its first input

    def array(self, values: np.ndarray) -> Array:
        return self.inner.array(values)

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append((graph, next(iter(inputs.values())).shape[0]))
        return self.inner.run(graph, inputs)


@pytest.fixture
def counted(pipe: MigePipeline) -> tuple[MigePipeline, Counting]:
    engine = Counting(pipe)
    return MigePipeline(pipe.config, pipe.tokenize, engine), engine


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
    counted: tuple[MigePipeline, Counting], scene: Image.Image, reference: Image.Image
) -> None:
    pipe, engine = counted
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
    # Two different pictures for the whole batch, encoded once; one source; two branches of two samples.
    expected = {"image_encoder": [2], "text_encoder": [2], "conditioner": [4], "denoiser": [4] * 3, "vae_decoder": [2]}
    for graph, rows in expected.items():
        assert [r for g, r in engine.calls if g == graph] == rows
    assert [r for g, r in engine.calls if g == "vae_encoder"] == [2, 1]
    for scales, branches in [((5, 1.5), 3), ((1, 1), 1), ((5, 5), 2)]:
        engine.calls.clear()
        pipe(COMPOSE, images=[scene, reference], source=scene, steps=2, text_scale=scales[0], source_scale=scales[1])
        assert ("denoiser", branches) in engine.calls


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
