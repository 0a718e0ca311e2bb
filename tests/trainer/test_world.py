from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mige_rt.errors import InputError
from trainer.world.backgrounds import PATTERNS, Background, draw
from trainer.world.concepts import Concept, load_concepts
from trainer.world.fetch import main
from trainer.world.scene import Scene, draw_scene, random_places, random_subject


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
    drawing = draw_scene(Scene(background, (below, above)), 64)
    picture, masks, empty = drawing.picture, drawing.masks, draw_scene(Scene(background), 64).picture
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
