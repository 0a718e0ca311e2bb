"""The source's own pixels where an edit has changed nothing."""

import numpy as np
import pytest
from PIL import Image

from mige_rt.paste_back import paste_back
from mige_rt.pipeline import MigePipeline
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import make_sample


def noisy(image: np.ndarray, seed: int) -> Image.Image:
    """As a VAE gives an image back."""
    noise = np.random.default_rng(seed).normal(0, 6, image.shape)
    return Image.fromarray(np.clip(image + noise, 0, 255).astype(np.uint8))


def test_only_what_was_changed_is_the_models() -> None:
    source = np.random.default_rng(0).integers(60, 180, (96, 128, 3), dtype=np.uint8)
    edited = source.copy()
    edited[30:60, 40:80] = (250, 20, 20)
    result = noisy(edited, 1)
    pasted = np.asarray(paste_back(Image.fromarray(source), noisy(source, 2), result))
    assert np.array_equal(pasted[30:60, 40:80], np.asarray(result)[30:60, 40:80])
    far = np.ones((96, 128), bool)
    far[15:75, 25:95] = False
    assert np.array_equal(pasted[far], source[far])


def test_what_the_vae_changes_is_no_edit() -> None:
    source = np.random.default_rng(0).integers(60, 180, (64, 64, 3), dtype=np.uint8)
    blurred = Image.fromarray(np.clip(source.astype(int) + 40, 0, 255).astype(np.uint8))  # brighter all over
    assert np.array_equal(np.asarray(paste_back(Image.fromarray(source), blurred, blurred)), source)


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="one size"):
        paste_back(Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64)), Image.new("RGB", (32, 64)))


def test_an_edit_keeps_more_of_its_source(pipe: MigePipeline, concepts: list[Concept]) -> None:
    sample = make_sample(4, 1, concepts, 64, {"recolour_subject": 1})  # an edit that the model makes
    source, untouched = Image.fromarray(sample.images[0]), ~sample.changed
    plain, pasted = (
        np.asarray(pipe(sample.prompt, source=source, seed=0, paste_back=option).images[0]) for option in (False, True)
    )
    assert sample.source is not None
    same = [np.all(image == sample.source, axis=-1)[untouched].mean() for image in (plain, pasted)]
    assert same[0] < 0.1 and same[1] > 0.5
    assert np.abs(pasted[sample.changed].astype(int) - plain[sample.changed]).mean() < 10  # the edit itself stays


def test_without_a_source_nothing_changes(pipe: MigePipeline, reference: Image.Image) -> None:
    images = [
        pipe("a <imagehere>", [reference], seed=0, num_inference_steps=2, paste_back=option).images[0]
        for option in (False, True)
    ]
    assert np.array_equal(np.asarray(images[0]), np.asarray(images[1]))
