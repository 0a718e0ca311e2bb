"""Samples of the paper's tasks, each with its instruction, its pictures and its ground truth.

The paper (section 3.1) states every task in one multimodal form: words with `<imagehere>` where a picture stands.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mige_rt.instruction import Task, rewrite_instruction
from trainer.world.backgrounds import COLOURS, PATTERNS, Background
from trainer.world.concepts import Concept
from trainer.world.scene import (
    PLACE_WORDS,
    Scene,
    draw_reference,
    draw_scene,
    random_background,
    random_places,
    random_scene,
    random_subject,
)


@dataclass(frozen=True)
class Sample:
    """One training or evaluation sample; pictures are uint8 [side,side,3].

    prompt: the caption without the task's prefix. images: in placeholder order; where one is the source, it is the very
    same array. changed: bool [side,side], the pixels in which the ground truth differs from the source (all, for
    generation).
    """

    kind: str
    task: Task
    prompt: str
    images: list[np.ndarray]
    source: np.ndarray | None
    target: np.ndarray
    changed: np.ndarray


def _pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[rng.integers(len(options))]


def _multimodal(rng: np.random.Generator, plain: list[str], multimodal: list[str]) -> str:
    """Half of the wordings name the picture themselves; the others are rewritten as the pipeline rewrites them."""
    if rng.random() < 0.5:
        return _pick(rng, multimodal)
    return rewrite_instruction(_pick(rng, plain), "local" if rng.random() < 0.7 else "global")


def _changed(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.any(source != target, axis=-1)


def _naming(rng: np.random.Generator, scene: Scene, index: int) -> str:
    """Words for one subject of a scene: its name, or where it stands."""
    subject = scene.subjects[index]
    if len(scene.subjects) > 1 and rng.random() < 0.3:
        return f"the {_pick(rng, ['thing', 'object'])} {subject.place}"
    return f"the {subject.concept.name}"


def recolour(rng: np.random.Generator, concepts: list[Concept], side: int) -> Sample:
    scene = random_scene(rng, concepts, int(rng.integers(1, 3)))
    colour = _pick(rng, [c for c in COLOURS if c != scene.background.colour])
    after = replace(scene, background=replace(scene.background, colour=colour))
    source, target = draw_scene(scene, side)[0], draw_scene(after, side)[0]
    prompt = _multimodal(
        rng,
        [
            f"make the background {colour}",
            f"turn the background {colour}",
            f"change the background to {colour}",
            f"change the color of the background to {colour}",
            f"paint the background of the image {colour}",
        ],
        [f"make the background of <imagehere> {colour}", f"change the background in <imagehere> to {colour}"],
    )
    return Sample("recolour", "edit", prompt, [source], source, target, _changed(source, target))


def remove(rng: np.random.Generator, concepts: list[Concept], side: int) -> Sample:
    scene = random_scene(rng, concepts, int(rng.integers(1, 4)))
    index = int(rng.integers(len(scene.subjects)))
    after = replace(scene, subjects=tuple(s for i, s in enumerate(scene.subjects) if i != index))
    source, target = draw_scene(scene, side)[0], draw_scene(after, side)[0]
    what = _naming(rng, scene, index)
    prompt = _multimodal(
        rng,
        [f"remove {what}", f"delete {what}", f"erase {what} from the picture", f"take {what} away"],
        [f"remove {what} from <imagehere>", f"erase {what} in <imagehere>"],
    )
    return Sample("remove", "edit", prompt, [source], source, target, _changed(source, target))


def add(rng: np.random.Generator, concepts: list[Concept], side: int) -> Sample:
    number = int(rng.integers(0, 3))
    chosen = [concepts[i] for i in rng.choice(len(concepts), number + 1, replace=False)]
    places = random_places(rng, number + 1)
    subjects = tuple(random_subject(rng, c, p) for c, p in zip(chosen, places, strict=True))
    scene = Scene(random_background(rng), subjects[:-1])
    source, target = draw_scene(scene, side)[0], draw_scene(replace(scene, subjects=subjects), side)[0]
    reference, place = draw_reference(rng, chosen[-1], subjects[-1].flip, side), places[-1]
    if rng.random() < 0.5:
        images = [reference, source]
        prompt = _pick(
            rng,
            [
                f"add <imagehere> to <imagehere> {place}",
                f"put <imagehere> {place} of <imagehere>",
                f"place <imagehere> in <imagehere> {place}",
            ],
        )
    else:
        images = [source, reference]
        prompt = _pick(rng, [f"in <imagehere> add <imagehere> {place}", f"add to <imagehere> a <imagehere> {place}"])
    return Sample("add", "compose", prompt, images, source, target, _changed(source, target))


def replace_subject(rng: np.random.Generator, concepts: list[Concept], side: int) -> Sample:
    scene = random_scene(rng, concepts, int(rng.integers(1, 3)))
    index = int(rng.integers(len(scene.subjects)))
    old = scene.subjects[index]
    present = {s.concept.code for s in scene.subjects}
    new = concepts[rng.integers(len(concepts))]
    while new.code in present:
        new = concepts[rng.integers(len(concepts))]
    subjects = tuple(replace(s, concept=new) if i == index else s for i, s in enumerate(scene.subjects))
    source, target = draw_scene(scene, side)[0], draw_scene(replace(scene, subjects=subjects), side)[0]
    reference, what = draw_reference(rng, new, old.flip, side), _naming(rng, scene, index)
    if rng.random() < 0.75:
        images = [source, reference]
        prompt = _pick(
            rng,
            [
                f"replace {what} in <imagehere> with <imagehere>",
                f"swap {what} in <imagehere> for <imagehere>",
                f"change {what} in <imagehere> to <imagehere>",
            ],
        )
    else:
        images = [reference, source]
        prompt = f"put <imagehere> in place of {what} in <imagehere>"
    return Sample("replace", "compose", prompt, images, source, target, _changed(source, target))


def generate(rng: np.random.Generator, concepts: list[Concept], side: int) -> Sample:
    pattern, colour = _pick(rng, list(PATTERNS)), _pick(rng, list(COLOURS))
    background = Background(pattern, colour, int(rng.integers(2**31)))
    ground = f"on a {pattern} {colour} background"
    if rng.random() < 0.7:
        place = _pick(rng, list(PLACE_WORDS))
        subjects = (random_subject(rng, concepts[rng.integers(len(concepts))], place),)
        prompt = _pick(rng, [f"a <imagehere> {place} {ground}", f"<imagehere> {ground} {place}"])
    else:
        first, second = (concepts[i] for i in rng.choice(len(concepts), 2, replace=False))
        subjects = (random_subject(rng, first, "on the left"), random_subject(rng, second, "on the right"))
        relation = _pick(rng, ["beside", "next to", "and", "to the left of"])
        prompt = f"a <imagehere> {relation} a <imagehere> {ground}"
    target = draw_scene(Scene(background, subjects), side)[0]
    images = [draw_reference(rng, subject.concept, subject.flip, side) for subject in subjects]
    return Sample("generate", "subject", prompt, images, None, target, np.ones((side, side), bool))


KINDS: dict[str, Callable[[np.random.Generator, list[Concept], int], Sample]] = {
    "recolour": recolour,
    "remove": remove,
    "add": add,
    "replace": replace_subject,
    "generate": generate,
}


def make_sample(seed: int, index: int, concepts: list[Concept], side: int) -> Sample:
    """Sample number `index` of the unlimited series `seed`: the same arguments give the same sample everywhere."""
    rng = np.random.default_rng([seed, index])
    return KINDS[_pick(rng, list(KINDS))](rng, concepts, side)
