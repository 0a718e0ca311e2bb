"""Words for what stands where. A concept that is held out for evaluation is never named, whatever is asked."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from mige_rt.instruction import rewrite_instruction
from trainer.synthetic.concepts import main_colour
from trainer.synthetic.scene import Scene, relation

T = TypeVar("T")
NAMED_SHARE = 0.65  # of the mentions of things that may be named
RELATED_SHARE = 0.6  # of the mentions of places that can be told from another subject's

# Where something goes, for each place where it may stand.
TOWARDS: dict[str, str] = {
    "in the top left": "to the top left",
    "at the top": "to the top",
    "in the top right": "to the top right",
    "on the left": "to the left side",
    "in the middle": "to the middle",
    "on the right": "to the right side",
    "in the bottom left": "to the bottom left",
    "at the bottom": "to the bottom",
    "in the bottom right": "to the bottom right",
}


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def multimodal(rng: np.random.Generator, plain: Sequence[str], with_image: Sequence[str]) -> str:
    """Half of the wordings name the image themselves; the others are rewritten as the pipeline rewrites them."""
    if rng.random() < 0.5:
        return pick(rng, with_image)
    return rewrite_instruction(pick(rng, plain), "local" if rng.random() < 0.7 else "global")


def naming(rng: np.random.Generator, scene: Scene, index: int) -> str:
    """Words for one subject of a scene: its name unless it is held out, or its place, or a colour that no other has."""
    subject = scene.subjects[index]
    if subject.concept.named and not subject.concept.held_out and rng.random() < NAMED_SHARE:
        return f"the {subject.concept.name}"
    thing = pick(rng, ("thing", "object"))
    colours = [main_colour(s.concept.image(s.style)) for s in scene.subjects]
    if colours[index] is not None and colours.count(colours[index]) == 1 and rng.random() < 0.3:
        return f"the {colours[index]} {thing}"
    if len(scene.subjects) == 1 and rng.random() < 0.5:
        return f"the {thing}"
    return f"the {thing} {subject.place}"


def whereabouts(rng: np.random.Generator, scene: Scene, place: str, but: int | None = None) -> str:
    """Words for a place in a scene: its own, or how it lies to a subject other than `but`, as in "above the cat"."""
    relations = [(i, relation(place, other.place)) for i, other in enumerate(scene.subjects) if i != but]
    related = [(i, words) for i, words in relations if words is not None]
    if related and rng.random() < RELATED_SHARE:
        index, words = pick(rng, related)
        return f"{words} {naming(rng, scene, index)}"
    return place
