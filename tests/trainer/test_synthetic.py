import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mige_rt.errors import InputError
from trainer.synthetic.atmosphere import TIMES, WEATHERS
from trainer.synthetic.backgrounds import PATTERNS, Background, Photo, draw
from trainer.synthetic.concepts import SPRITE_SIDE, Concept, load_concepts, main_colour, sprite
from trainer.synthetic.fetch import main
from trainer.synthetic.photos import ORIGINS, Origin, load_photos
from trainer.synthetic.sample import Stock, edit
from trainer.synthetic.scene import (
    APART,
    CLOSE,
    PLACES,
    Scene,
    Subject,
    draw_scene,
    random_background,
    random_places,
    random_subject,
)
from trainer.synthetic.tasks import make_sample
from trainer.synthetic.variation import DrawnShape, Variation, VariedConcepts, vary


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_background_in_another_colour_keeps_its_pattern(pattern: str) -> None:
    red, blue = (draw(Background(pattern, colour, seed=4), 64).astype(float) for colour in ("red", "blue"))
    # Where one is lighter than its neighbour, the other is too.
    for axis in (0, 1):
        edges = [np.diff(image.sum(axis=2), axis=axis) for image in (red, blue)]
        assert (edges[0] * edges[1] >= 0).all()
    assert red[..., 0].mean() > red[..., 2].mean() and blue[..., 2].mean() > blue[..., 0].mean()


def test_a_mask_is_where_a_subject_is_seen(concepts: list[Concept]) -> None:
    rng = np.random.default_rng(0)
    places = random_places(rng, 2)
    below, above = (random_subject(rng, concepts[i], place) for i, place in enumerate(places))
    background = Background("plain", "grey", 0)
    drawing = draw_scene(Scene(background, (below, above)), 64)
    image, masks, empty = drawing.image, drawing.masks, draw_scene(Scene(background), 64).image
    assert not (masks[0] & masks[1]).any()
    changed = np.any(image != empty, axis=-1)
    assert (masks[0] | masks[1])[changed].mean() > 0.7  # the rest is soft edges and shadows
    assert changed[masks[0] | masks[1]].mean() > 0.95


def test_some_places_are_close_and_none_too_close() -> None:
    rng = np.random.default_rng(0)
    distances = [math.dist(*(PLACES[place] for place in random_places(rng, 2))) for _ in range(200)]
    assert CLOSE < min(distances) <= APART
    assert np.mean(np.array(distances) > APART) > 0.7
    assert all(len(set(random_places(rng, 3))) == 3 for _ in range(20))


def test_what_hides_a_subject_or_cannot_be_seen_is_no_sample(concepts: list[Concept]) -> None:
    apple, camera = concepts[3], concepts[-3]
    stock, background = Stock(concepts, 64), Background("plain", "white", 0)
    below = Subject(apple, "in the middle", (0.5, 0.5), 0.4, False)
    beside, above = (Subject(camera, "on the left", (x, 0.5), 0.4, False) for x in (0.2, 0.5))
    before = Scene(background, (below,))
    assert edit("add", stock, "", before, Scene(background, (below, beside))) is not None
    assert edit("add", stock, "", before, Scene(background, (below, above))) is None
    assert edit("move", stock, "", before, before) is None
    speck = Subject(camera, "on the left", (0.2, 0.5), 0.1, False)
    assert edit("add", stock, "", before, Scene(background, (below, speck))) is None


def test_held_out_concepts_never_change(concepts: list[Concept]) -> None:
    assert [concept.name for concept in concepts if concept.held_out] == ["maple leaf", "watermelon", "frog face"]


def test_a_folder_without_the_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trainer\.synthetic\.fetch"):
        load_concepts(tmp_path)


@pytest.mark.parametrize("content", [b'[{"category": "Anim', b"\xff", b'[{"category": "Objects"}]', b"[7]"])
def test_a_damaged_index_of_the_world_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "emoji.json").write_bytes(content)
    with pytest.raises(InputError, match=r"emoji\.json is damaged \(.*\); remove .* and fetch it again"):
        load_concepts(tmp_path)


def test_fetching_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["--out", str(tmp_path / "file" / "x" / "y")])
    assert result.exit_code == 2 and "cannot be written (not a directory)" in " ".join(result.output.split())


def test_fetching_into_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert result.exit_code == 2 and "exists already" in result.output
    assert list(tmp_path.iterdir()) == []


def test_things_are_called_by_the_colour_they_have(concepts: list[Concept]) -> None:
    colours = {concept.name: main_colour(concept.fluent) for concept in concepts}
    assert (colours["red apple"], colours["maple leaf"], colours["camera"]) == ("red", "red", None)


@pytest.fixture
def photographed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A world's folder with two photos, fetched from a package that is installed; another is not."""
    installed, world = tmp_path / "installed", tmp_path / "world"
    for folder in (installed, world):
        folder.mkdir()
    y, x = np.mgrid[0:600, 0:900]
    for k, name in enumerate(("dune", "wood")):
        pixels = np.stack([x % 256, y % 256, np.full_like(x, 90 * k)], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(installed / f"{name}.jpg")
    there = Origin("there", "CC0", str(installed))
    monkeypatch.setattr("trainer.synthetic.photos.ORIGINS", (there, Origin("absent", "CC0", "no_such_module/data")))
    result = CliRunner().invoke(main, ["--out", str(world), "--photos"])
    assert result.exit_code == 0, result.output
    return world


def test_photos_are_behind_scenes_only_where_they_are_given(photographed: Path, concepts: list[Concept]) -> None:
    photos = load_photos(photographed)
    assert [path.name for path in photos] == ["dune.jpg", "wood.jpg"]
    assert "dune.jpg\tthere\tCC0" in (photographed / "photos" / "origins.txt").read_text()
    rng = np.random.default_rng(0)
    assert not any(isinstance(random_background(rng), Photo) for _ in range(50))
    behind = [random_background(rng, photos) for _ in range(50)]
    assert {background.path for background in behind if isinstance(background, Photo)} == set(photos)
    assert any(isinstance(background, Background) for background in behind)
    differ = 0
    for index in range(20):
        with_photos, again = (make_sample(2, index, concepts, 64, {"remove": 1}, photos) for _ in range(2))
        assert np.array_equal(with_photos.target, again.target)
        assert with_photos.source is not None
        assert np.array_equal(with_photos.source[~with_photos.changed], with_photos.target[~with_photos.changed])
        differ += not np.array_equal(with_photos.target, make_sample(2, index, concepts, 64, {"remove": 1}).target)
    assert differ > 4


def test_a_crop_shows_a_part_of_the_photo(photographed: Path) -> None:
    wood = load_photos(photographed)[1]
    crops = [draw(Photo(wood, seed), 64) for seed in (1, 1, 2)]
    assert all(crop.shape == (64, 64, 3) and crop.dtype == np.uint8 for crop in crops)
    assert np.array_equal(crops[0], crops[1]) and not np.array_equal(crops[0], crops[2])
    assert abs(crops[0][..., 2].mean() - 90) < 6  # the photo's blue, which is even


def test_without_photos_installed_it_is_said_where_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_photos(tmp_path) == []
    monkeypatch.setattr("trainer.synthetic.photos.ORIGINS", (Origin("absent", "CC0", str(tmp_path / "none")),))
    result = CliRunner().invoke(main, ["--out", str(tmp_path), "--photos"])
    assert result.exit_code == 2 and "absent" in result.output
    assert list(tmp_path.iterdir()) == []
    assert all(path.is_file() for origin in ORIGINS for path in origin.photos())


def test_variation_never_touches_what_is_held_out(concepts: list[Concept]) -> None:
    held_out = [concept for concept in concepts if concept.held_out]
    for index in range(8):
        shares = {"add": 1, "generate": 1}
        plain, varied = (make_sample(2, index, held_out, 48, shares, varied=share) for share in (1e-9, 1.0))
        assert np.array_equal(plain.target, varied.target) and plain.prompt == varied.prompt
    cut_outs = {cut_out for concept in held_out for cut_out in (concept.fluent, concept.noto)}
    rng = np.random.default_rng(0)
    things = VariedConcepts(concepts, 1.0, rng)
    for _ in range(50):
        for thing in VariedConcepts(concepts, 1.0, rng):
            if not thing.held_out:
                assert isinstance(thing.fluent, Variation | DrawnShape) and not thing.named
                assert not isinstance(thing.fluent, Variation) or thing.fluent.other not in cut_outs
    assert [things[i] for i in range(12)] == [things[i] for i in range(12)]
    with pytest.raises(ValueError, match="held out"):
        vary(rng, held_out[0], concepts[0])


def test_varied_things_differ_from_sample_to_sample(concepts: list[Concept]) -> None:
    known = [concept for concept in concepts if not concept.held_out]
    rng = np.random.default_rng(1)
    looks = [np.asarray(sprite(VariedConcepts(known, 1.0, rng)[0].fluent)) for _ in range(20)]
    assert all(look.shape == (SPRITE_SIDE, SPRITE_SIDE, 4) and look[..., 3].any() for look in looks)
    assert len({look.tobytes() for look in looks}) == len(looks)
    turned = np.asarray(Variation(known[0].fluent, hue=0.5)().convert("RGB").convert("HSV")).astype(int)
    plain = np.asarray(sprite(known[0].fluent).convert("RGB").convert("HSV")).astype(int)
    colored = (plain[..., 1] > 120) & (plain[..., 2] > 120)
    shift = (turned[..., 0] - plain[..., 0])[colored] % 256
    assert np.median(shift) == pytest.approx(128, abs=4)


def test_a_reference_is_found_again_on_another_ground(concepts: list[Concept]) -> None:
    for index in range(10):
        sample = make_sample(4, index, concepts, 64, {"another_ground": 1})
        (mark,) = sample.after
        assert mark.reference == 0 and sample.source is None
        if not any(word in sample.prompt for word in (*TIMES, *WEATHERS)):
            inner = mark.mask.copy()
            for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
                inner &= np.roll(mark.mask, step, axis)  # without the soft edge
            same = np.abs(sample.images[0].astype(int) - sample.target).max(axis=-1) < 16
            assert same[inner].mean() > 0.97
        assert not np.array_equal(sample.images[0][~mark.mask], sample.target[~mark.mask])


def test_painting_again_asks_for_the_image_that_is_shown(concepts: list[Concept]) -> None:
    numbers = set()
    for index in range(20):
        sample = make_sample(4, index, concepts, 32, {"again": 1})
        assert len(sample.images) == 1 and np.array_equal(sample.images[0], sample.target)
        numbers.add(len(sample.after))
    assert numbers == {1, 2, 3}
