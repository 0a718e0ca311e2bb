"""A scene: a background and subjects with places and sizes; and how it is drawn."""

from dataclasses import dataclass

import numpy as np

from trainer.world.backgrounds import COLOURS, PATTERNS, Background, draw
from trainer.world.concepts import Concept, paste

# Words for the nine places of a scene, and their centres as fractions of its side.
PLACES: dict[str, tuple[float, float]] = {
    "in the top left": (0.27, 0.27),
    "at the top": (0.5, 0.27),
    "in the top right": (0.73, 0.27),
    "on the left": (0.27, 0.5),
    "in the middle": (0.5, 0.5),
    "on the right": (0.73, 0.5),
    "in the bottom left": (0.27, 0.73),
    "at the bottom": (0.5, 0.73),
    "in the bottom right": (0.73, 0.73),
}
PLACE_WORDS = tuple(PLACES)


@dataclass(frozen=True)
class Subject:
    """A concept at a centre (fractions of the scene's side), its size (a fraction too), and whether mirrored."""

    concept: Concept
    place: str
    centre: tuple[float, float]
    size: float
    flip: bool


@dataclass(frozen=True)
class Scene:
    background: Background
    subjects: tuple[Subject, ...] = ()


def draw_scene(scene: Scene, side: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The picture, uint8 [side,side,3], and each subject's visible mask, bool [side,side]; later ones lie on top."""
    picture = draw(scene.background, side)
    masks: list[np.ndarray] = []
    for subject in scene.subjects:
        x, y = subject.centre
        mask = paste(picture, subject.concept.fluent, (x * side, y * side), round(subject.size * side), subject.flip)
        masks = [above & ~mask for above in masks] + [mask]
    return picture, masks


def random_background(rng: np.random.Generator) -> Background:
    return Background(str(rng.choice(PATTERNS)), str(rng.choice(list(COLOURS))), int(rng.integers(2**31)))


def random_subject(rng: np.random.Generator, concept: Concept, place: str | None = None) -> Subject:
    """A subject near the named place (any, if None), between 34 % and 50 % of the scene's side."""
    place = place or PLACE_WORDS[rng.integers(len(PLACE_WORDS))]
    x, y = PLACES[place]
    jitter = rng.uniform(-0.03, 0.03, 2)
    centre = (float(x + jitter[0]), float(y + jitter[1]))
    return Subject(concept, place, centre, float(rng.uniform(0.34, 0.5)), bool(rng.integers(2)))


def random_places(rng: np.random.Generator, number: int) -> list[str]:
    """Places for `number` subjects (at most 3), far enough apart that none hides another."""
    while True:
        places = [PLACE_WORDS[i] for i in rng.permutation(len(PLACE_WORDS))[:number]]
        centres = [np.array(PLACES[place]) for place in places]
        if all(np.linalg.norm(a - b) > 0.4 for i, a in enumerate(centres) for b in centres[:i]):
            return places


def random_scene(rng: np.random.Generator, concepts: list[Concept], number: int) -> Scene:
    """A scene of `number` different concepts."""
    chosen = [concepts[i] for i in rng.choice(len(concepts), number, replace=False)]
    places = random_places(rng, number)
    return Scene(random_background(rng), tuple(random_subject(rng, c, p) for c, p in zip(chosen, places, strict=True)))


def draw_reference(rng: np.random.Generator, concept: Concept, flip: bool, side: int) -> np.ndarray:
    """A picture of the concept alone, large, on a white or a coloured ground; uint8 [side,side,3]."""
    colour = "white" if rng.random() < 0.5 else str(rng.choice(list(COLOURS)))
    background = Background("plain" if rng.random() < 0.7 else "shaded", colour, int(rng.integers(2**31)))
    subject = Subject(concept, "in the middle", (0.5, 0.5), float(rng.uniform(0.78, 0.95)), flip)
    return draw_scene(Scene(background, (subject,)), side)[0]
