from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

import export.bundle
from mige_rt.pipeline import MigePipeline
from trainer.preview import first_of_each_kind
from trainer.world.concepts import Concept, load_concepts
from trainer.world.tasks import Sample

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def concepts() -> list[Concept]:
    """Twelve concepts of the small world, two of them held out."""
    return load_concepts(DATA / "world")


@pytest.fixture(scope="session")
def pipe() -> MigePipeline:
    """The shipped default model."""
    return MigePipeline.from_pretrained(device="cpu")


@pytest.fixture(scope="session")
def samples(concepts: list[Concept]) -> dict[str, Sample]:
    """The first sample of every kind of task."""
    return {sample.kind: sample for sample in first_of_each_kind(concepts, 64, 0, 1)}


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundles of the default model by precision, validated, exported when first asked for; not to be changed."""

    @cache
    def bundle(precision: str) -> Path:
        out = tmp_path_factory.mktemp("bundles") / precision
        export.bundle.export_bundle("tiny", out, precision, export.bundle.Limits(4, 4, (32, 128)))
        return out

    return bundle


@pytest.fixture
def scene(samples: dict[str, Sample]) -> Image.Image:
    """A 64 x 64 scene to edit."""
    source = samples["replace"].source
    assert source is not None
    return Image.fromarray(source)


@pytest.fixture
def reference(samples: dict[str, Sample]) -> Image.Image:
    """A 64 x 64 picture of one thing."""
    return Image.fromarray(samples["generate"].images[0])
