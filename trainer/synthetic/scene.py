"""A scene: a background and subjects with places and sizes; and how it is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trainer.synthetic import atmosphere
from trainer.synthetic.backgrounds import COLOURS, PATTERNS, Background, Photo, draw
from trainer.synthetic.concepts import Concept, Style, paste

# Words for the nine places of a scene, row by row, and their centres as fractions of its side.
PLACES: dict[str, tuple[float, float]] = {
    "in the top left": (0.25, 0.25),
    "at the top": (0.5, 0.25),
    "in the top right": (0.75, 0.25),
    "on the left": (0.25, 0.5),
    "in the middle": (0.5, 0.5),
    "on the right": (0.75, 0.5),
    "in the bottom left": (0.25, 0.75),
    "at the bottom": (0.5, 0.75),
    "in the bottom right": (0.75, 0.75),
}
PLACE_WORDS = tuple(PLACES)

Sizes = tuple[float, float]  # smallest and largest, fractions of the scene's side
USUAL: Sizes = (0.34, 0.5)
CROWDED: Sizes = (0.3, 0.4)  # of three subjects

# What is put where words say is as large as this part of its reference, right at its place: with one ground truth to be
# judged by, whatever the words left open would be chance. With places a quarter of the side apart, a patch of the
# result then shows whole patches of the reference, always in the same way, which a model this small can learn.
SMALL, HALF, LARGE = 1 / 3, 1 / 2, 2 / 3
REFERENCE_SIZES = (13 / 16, 14 / 16, 15 / 16)  # fractions of the reference's side

APART, CLOSE = 0.4, 0.3  # least distance of two places: so that nothing is hidden, or a little may be
CLOSE_SHARE = 0.25  # of scenes
NOTO_SHARE = 0.2  # of subjects
PHOTO_SHARE = 0.5  # of backgrounds that may be photos, where there are any


@dataclass(frozen=True)
class Subject:
    """A concept at a centre (fractions of the scene's side) and in a size (a fraction too).

    place: words for where it stands. reference_size: its size in the image that shows it alone. flip: mirrored. tint:
    the colour that it was given, one of COLOURS.
    """

    concept: Concept
    place: str
    centre: tuple[float, float]
    size: float
    flip: bool
    style: Style = "fluent"
    reference_size: float = REFERENCE_SIZES[1]
    tint: str | None = None


@dataclass(frozen=True)
class Scene:
    """Subjects from the rearmost to the foremost. air: the light or the weather over them, if there is any."""

    background: Background | Photo
    subjects: tuple[Subject, ...] = ()
    air: str | None = None


@dataclass(frozen=True)
class Drawing:
    """A scene as it looks.

    Attributes:
        image: uint8 [side,side,3]
        masks: Each subject's visible part, bool [side,side].
        shown: That part's share of the subject's pixels in the image, were it alone.
    """

    image: np.ndarray
    masks: list[np.ndarray]
    shown: list[float]


def draw_scene(scene: Scene, side: int) -> Drawing:
    """Draw a scene, from the rearmost subject to the foremost, then the light or the weather."""
    image = draw(scene.background, side)
    masks: list[np.ndarray] = []
    areas: list[int] = []
    for subject in scene.subjects:
        x, y = subject.centre
        path, size = subject.concept.image(subject.style), round(subject.size * side)
        mask = paste(image, path, (x * side, y * side), size, subject.flip, subject.tint)
        masks = [below & ~mask for below in masks] + [mask]
        areas.append(int(mask.sum()))
    if scene.air is not None:
        image = atmosphere.apply(image, scene.air)
    shown = [mask.sum() / max(area, 1) for mask, area in zip(masks, areas, strict=True)]
    return Drawing(image, masks, shown)


def grid_way(start: str, end: str) -> tuple[int, int]:
    """From one place to another: rows down, columns to the right."""
    rows, columns = zip(*(divmod(PLACE_WORDS.index(place), 3) for place in (start, end)), strict=True)
    return rows[1] - rows[0], columns[1] - columns[0]


def relation(place: str, other: str) -> str | None:
    """Words for where a place is, seen from another that is two steps away in the same row or column."""
    ways = {(0, -2): "to the left of", (0, 2): "to the right of", (-2, 0): "above", (2, 0): "below"}
    return ways.get(grid_way(other, place))


def random_background(rng: np.random.Generator, photos: Sequence[Path] = ()) -> Background | Photo:
    """A pattern; in PHOTO_SHARE of the cases one of the photos, where there are any."""
    if photos and rng.random() < PHOTO_SHARE:
        return Photo(photos[int(rng.integers(len(photos)))], int(rng.integers(2**31)))
    return random_pattern(rng)


def random_pattern(rng: np.random.Generator, patterns: Sequence[str] = PATTERNS) -> Background:
    """One of some patterns in a color."""
    pattern, colour = patterns[int(rng.integers(len(patterns)))], list(COLOURS)[rng.integers(len(COLOURS))]
    return Background(pattern, colour, int(rng.integers(2**31)))


def inside(centre: tuple[float, float], size: float) -> tuple[float, float]:
    """The centre, or the nearest one from which a subject of that size does not reach out of the scene."""
    x, y = (min(max(c, size / 2), 1 - size / 2) for c in centre)
    return x, y


def random_subject(
    rng: np.random.Generator, concept: Concept, place: str | None = None, sizes: Sizes = USUAL
) -> Subject:
    """A subject at the named place (any, if None)."""
    place = place or PLACE_WORDS[rng.integers(len(PLACE_WORDS))]
    size = float(rng.uniform(*sizes))
    style: Style = "noto" if rng.random() < NOTO_SHARE and concept.noto is not None else "fluent"
    flip, reference_size = bool(rng.integers(2)), REFERENCE_SIZES[rng.integers(len(REFERENCE_SIZES))]
    return Subject(concept, place, inside(PLACES[place], size), size, flip, style, reference_size)


def put(subject: Subject, size: float, place: str | None = None) -> Subject:
    """The subject right at a place (its own, if None) in that size."""
    place = place or subject.place
    return replace(subject, place=place, size=size, centre=inside(PLACES[place], size))


def put_from_reference(subject: Subject, part: float, place: str | None = None) -> Subject:
    """The subject right at a place (its own, if None), as large as a part of the image that shows it alone."""
    return put(subject, part * subject.reference_size, place)


def free_places(occupied: Sequence[str], apart: float = APART) -> list[str]:
    """The places that are at least that far from all those occupied."""
    return [p for p in PLACES if all(math.dist(PLACES[p], PLACES[other]) > apart for other in occupied)]


def random_places(rng: np.random.Generator, number: int) -> list[str]:
    """Places for `number` subjects (at most 3); in CLOSE_SHARE of the cases one may hide a little of another."""
    apart = CLOSE if rng.random() < CLOSE_SHARE else APART
    while True:
        places: list[str] = []
        for _ in range(number):
            free = free_places(places, apart)
            if not free:
                break
            places.append(free[int(rng.integers(len(free)))])
        if len(places) == number:
            return places


def random_subjects(rng: np.random.Generator, concepts: Sequence[Concept], number: int) -> tuple[Subject, ...]:
    """Subjects of `number` different concepts, at most 3."""
    chosen = [concepts[i] for i in rng.choice(len(concepts), number, replace=False)]
    sizes = CROWDED if number == 3 else USUAL
    places = random_places(rng, number)
    return tuple(random_subject(rng, c, p, sizes) for c, p in zip(chosen, places, strict=True))


def reference_scene(rng: np.random.Generator, subject: Subject) -> Scene:
    """The subject alone, large, on a white or a coloured ground."""
    colour = "white" if rng.random() < 0.5 else list(COLOURS)[rng.integers(len(COLOURS))]
    background = Background("plain" if rng.random() < 0.7 else "shaded", colour, int(rng.integers(2**31)))
    centre, size = (0.5, 0.5), subject.reference_size
    return Scene(background, (replace(subject, place="in the middle", centre=centre, size=size, tint=None),))
