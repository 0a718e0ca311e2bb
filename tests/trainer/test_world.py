from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mige_rt.errors import InputError
from mige_rt.instruction import count_placeholders
from trainer.world.backgrounds import COLOURS, PATTERNS, Background, draw
from trainer.world.concepts import Concept, load_concepts
from trainer.world.fetch import main
from trainer.world.scene import PLACES, Scene, draw_scene, random_places, random_subject
from trainer.world.tasks import KINDS, Sample, make_sample

TREE = 40  # samples looked at by the tests that go over many


def test_a_sample_depends_on_its_seed_and_index_alone(concepts: list[Concept]) -> None:
    make_sample(7, 3, concepts, 64)
    first, again, other = (make_sample(7, index, concepts, 64) for index in (5, 5, 6))
    assert first.prompt == again.prompt and np.array_equal(first.target, again.target)
    assert first.prompt != other.prompt or not np.array_equal(first.target, other.target)


def test_every_sample_has_a_picture_for_each_placeholder(concepts: list[Concept]) -> None:
    seen = set()
    for index in range(TREE):
        sample = make_sample(1, index, concepts, 64)
        seen.add(sample.kind)
        assert count_placeholders(sample.prompt) == len(sample.images)
        assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in [*sample.images, sample.target])
        assert (sample.task == "subject") == (sample.source is None)
    assert seen == set(KINDS)


def _edits(concepts: list[Concept], kind: str) -> list[tuple[Sample, np.ndarray]]:
    """Samples of one kind with their sources."""
    made = [KINDS[kind](np.random.default_rng(index), concepts, 64) for index in range(TREE)]
    return [(sample, sample.source) for sample in made if sample.source is not None]


@pytest.mark.parametrize("kind", ["recolour", "remove", "add", "replace"])
def test_an_edit_changes_something_and_keeps_the_rest(concepts: list[Concept], kind: str) -> None:
    for sample, source in _edits(concepts, kind):
        assert np.array_equal(sample.target[~sample.changed], source[~sample.changed])
        assert sample.changed.any() and not sample.changed.all()


def test_recolouring_names_the_new_colour_and_changes_most_of_the_scene(concepts: list[Concept]) -> None:
    for sample, _ in _edits(concepts, "recolour"):
        assert any(colour in sample.prompt.split() for colour in COLOURS)
        assert sample.changed.mean() > 0.4


def test_adding_and_removing_touch_one_subject_only(concepts: list[Concept]) -> None:
    for kind in ("add", "remove"):
        for sample, _ in _edits(concepts, kind):
            rows, columns = np.nonzero(sample.changed)
            assert rows.max() - rows.min() <= 0.52 * 64 and columns.max() - columns.min() <= 0.52 * 64


def test_the_place_named_is_the_place_painted(concepts: list[Concept]) -> None:
    for sample, _ in _edits(concepts, "add"):
        place = max((p for p in PLACES if p in sample.prompt), key=len)
        rows, columns = np.nonzero(sample.changed)
        x, y = PLACES[place]
        assert abs(columns.mean() / 64 - x) < 0.15 and abs(rows.mean() / 64 - y) < 0.15


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_background_in_another_colour_keeps_its_pattern(pattern: str) -> None:
    red, blue = (draw(Background(pattern, colour, seed=4), 64).astype(float) for colour in ("red", "blue"))
    # Where one is lighter than its neighbour, the other is too.
    for axis in (0, 1):
        edges = [np.diff(picture.sum(axis=2), axis=axis) for picture in (red, blue)]
        assert (edges[0] * edges[1] >= 0).all()
    assert red[..., 0].mean() > red[..., 2].mean() and blue[..., 2].mean() > blue[..., 0].mean()


def test_a_mask_is_where_a_subject_is_seen(concepts: list[Concept]) -> None:
    rng = np.random.default_rng(0)
    places = random_places(rng, 2)
    below, above = (random_subject(rng, concepts[i], place) for i, place in enumerate(places))
    background = Background("plain", "grey", 0)
    picture, masks = draw_scene(Scene(background, (below, above)), 64)
    empty, _ = draw_scene(Scene(background), 64)
    assert not (masks[0] & masks[1]).any()
    changed = np.any(picture != empty, axis=-1)
    assert (masks[0] | masks[1])[changed].mean() > 0.7  # the rest is soft edges and shadows
    assert changed[masks[0] | masks[1]].mean() > 0.95


def test_held_out_concepts_never_change(concepts: list[Concept]) -> None:
    assert [concept.name for concept in concepts if concept.held_out] == ["maple leaf", "watermelon", "frog face"]


def test_a_folder_without_the_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trainer\.world\.fetch"):
        load_concepts(tmp_path)


def test_fetching_into_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert result.exit_code == 2 and "exists already" in result.output
    assert list(tmp_path.iterdir()) == []
