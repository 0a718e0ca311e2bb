"""Tasks with images of things: generating them in a scene, adding them to one, replacing another with one."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from trainer.synthetic.atmosphere import TIMES, WEATHERS
from trainer.synthetic.backgrounds import Background
from trainer.synthetic.sample import Sample, Stock, composition, generation
from trainer.synthetic.scene import (
    HALF,
    LARGE,
    SMALL,
    Scene,
    Subject,
    put_from_reference,
    random_background,
    random_pattern,
    random_subject,
    random_subjects,
    reference_scene,
)
from trainer.synthetic.wording import naming, pick, whereabouts

SIZE_WORDS = {"small": SMALL, "little": SMALL, "large": LARGE, "big": LARGE}
COMPARED = {"bigger than": LARGE, "smaller than": SMALL, "as big as": HALF}
PAIRS = {  # words between two subjects that say where they stand
    "to the left of": ("on the left", "on the right"),
    "to the right of": ("on the right", "on the left"),
    "beside": ("on the left", "on the right"),
    "next to": ("on the left", "on the right"),
    "and": ("on the left", "on the right"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
SIZED_SHARE = 0.25  # of the subjects that may be asked for in a size: those that are
QUIET_PATTERNS = ("plain", "shaded")
QUIET_SHARE = 0.6  # of the backgrounds of practice, the others are of any pattern
SCENE_SHARE = 0.4  # of the images to be painted again: those that are scenes
AIR_SHARE = 0.15  # of the generated images: those at a time of day or in some weather


def _sized(rng: np.random.Generator, subject: Subject) -> tuple[str, Subject]:
    """An article, with SIZED_SHARE a size too, and the subject in that size."""
    if rng.random() >= SIZED_SHARE:
        return "a", put_from_reference(subject, HALF)
    word = pick(rng, list(SIZE_WORDS))
    return f"a {word}", put_from_reference(subject, SIZE_WORDS[word])


def add(rng: np.random.Generator, stock: Stock) -> Sample | None:
    """One subject at a place and perhaps in a size, or two subjects."""
    new = stock.at_most(2) if rng.random() < 0.15 else 1
    number = int(rng.integers(0, stock.at_most(3 - new, new) + 1))
    subjects = random_subjects(rng, stock.concepts, number + new)
    scene = Scene(random_background(rng, stock.photos), subjects[:number])
    if new == 2:
        first, second = (f"<imagehere> {subject.place}" for subject in subjects[number:])
        last = rng.random() < 0.5
        before, behind = ("", " to <imagehere>") if last else ("in <imagehere> ", "")
        prompt = f"{before}{pick(rng, ('add', 'put'))} {first} and {second}{behind}"
        pair = (number, number + 1)
        named = (*pair, None) if last else (None, *pair)
        after = replace(scene, subjects=(*subjects[:number], *(put_from_reference(s, HALF) for s in subjects[number:])))
        return composition("add", rng, stock, prompt, scene, after, named)
    where = whereabouts(rng, scene, subjects[-1].place)
    what, subject, compared = "<imagehere>", put_from_reference(subjects[-1], HALF), ""
    if number and rng.random() < SIZED_SHARE:
        other, words = int(rng.integers(number)), pick(rng, list(COMPARED))
        subject = put_from_reference(subject, COMPARED[words])
        compared = f", {words} {naming(rng, scene, other)}"
    elif rng.random() < 0.7:
        article, subject = _sized(rng, subject)
        what = f"{article} {what}"
    after = replace(scene, subjects=(*subjects[:-1], subject))
    if rng.random() < 0.5:
        named = (number, None)
        options = [
            f"add {what} to <imagehere> {where}",
            f"place {what} in <imagehere> {where}",
            f"put {what} into <imagehere> {where}",
        ]
        if where == subject.place:
            options.append(f"put {what} {where} of <imagehere>")
    else:
        named = (None, number)
        options = [f"in <imagehere> add {what} {where}", f"add to <imagehere> {what} {where}"]
    return composition("add", rng, stock, pick(rng, options) + compared, scene, after, named)


def replace_subject(rng: np.random.Generator, stock: Stock) -> Sample | None:
    """The new one stands where the old one stood."""
    number = int(rng.integers(1, stock.at_most(3, 1) + 1))
    concepts = [stock.concepts[i] for i in rng.choice(len(stock.concepts), number + 1, replace=False)]
    subjects = random_subjects(rng, concepts[:-1], number)
    scene = Scene(random_background(rng, stock.photos), subjects)
    index = int(rng.integers(number))
    old = subjects[index]
    new = put_from_reference(random_subject(rng, concepts[-1], old.place), HALF)
    after = replace(scene, subjects=tuple(new if i == index else s for i, s in enumerate(subjects)))
    what = naming(rng, scene, index)
    if rng.random() < 0.75:
        named = (None, index)
        options = [
            f"replace {what} in <imagehere> with <imagehere>",
            f"swap {what} in <imagehere> for <imagehere>",
            f"change {what} in <imagehere> to <imagehere>",
            f"turn {what} in <imagehere> into <imagehere>",
            f"in <imagehere> exchange {what} for <imagehere>",
        ]
    else:
        named = (index, None)
        options = [
            f"put <imagehere> in place of {what} in <imagehere>",
            f"use <imagehere> instead of {what} in <imagehere>",
        ]
    return composition("replace", rng, stock, pick(rng, options), scene, after, named)


def again(rng: np.random.Generator, stock: Stock) -> Sample | None:
    """The image that is shown: of one subject, large, or of a scene."""
    if rng.random() < SCENE_SHARE:
        subjects = random_subjects(rng, stock.concepts, int(rng.integers(1, stock.at_most(3) + 1)))
        scene = Scene(random_background(rng, stock.photos), subjects)
    else:
        scene = reference_scene(rng, random_subjects(rng, stock.concepts, 1)[0])
    prompt = pick(rng, ("<imagehere>", "show <imagehere>", "paint <imagehere>"))
    return generation("again", stock, prompt, scene, [scene])


def another_ground(rng: np.random.Generator, stock: Stock) -> Sample | None:
    """What a reference shows, at the same place and in the same size, on another background."""
    reference = reference_scene(rng, random_subjects(rng, stock.concepts, 1)[0])
    background = _practice_pattern(rng)
    ground, air = _ground(rng, background)
    prompt = f"{pick(rng, ('a', 'the'))} <imagehere> {ground}"
    return generation("another_ground", stock, prompt, replace(reference, background=background, air=air), [reference])


def _practice_pattern(rng: np.random.Generator) -> Background:
    """Plain and shaded grounds first: where a stripe is to be, no words say, and learning it hides the subject."""
    return random_pattern(rng, QUIET_PATTERNS) if rng.random() < QUIET_SHARE else random_pattern(rng)


def _ground(rng: np.random.Generator, background: Background) -> tuple[str, str | None]:
    """Words for a background and, perhaps, for some light or weather; and the latter's name."""
    words = f"{pick(rng, ('on', 'against', 'with'))} a {background.pattern} {background.colour} background"
    if rng.random() >= AIR_SHARE:
        return words, None
    air = pick(rng, [*TIMES, *WEATHERS])
    return f"{words} {'at' if air in TIMES else 'in'} {air}", air


def _generate(
    kind: str,
    numbers: Mapping[int, float],
    draw_background: Callable[[np.random.Generator], Background],
    rng: np.random.Generator,
    stock: Stock,
) -> Sample | None:
    """As many subjects on a background, each as often as told, in words for all that the image shows."""
    background = draw_background(rng)
    number = stock.at_most(int(rng.choice(list(numbers), p=list(numbers.values()))))
    subjects = random_subjects(rng, stock.concepts, number)
    ground, air = _ground(rng, background)
    if number == 1:
        article, subject = _sized(rng, subjects[0])
        subjects, place = (subject,), subject.place
        prompt = pick(rng, [f"{article} <imagehere> {place} {ground}", f"{article} <imagehere> {ground} {place}"])
    elif number == 2 and rng.random() < 0.6:
        words, places = pick(rng, list(PAIRS.items()))
        subjects = tuple(put_from_reference(s, HALF, p) for s, p in zip(subjects, places, strict=True))
        prompt = f"a <imagehere> {words} a <imagehere> {ground}"
    else:
        subjects = tuple(put_from_reference(s, HALF) for s in subjects)
        each = [f"a <imagehere> {subject.place}" for subject in subjects]
        prompt = f"{', '.join(each[:-1])} and {each[-1]} {ground}"
    shown = [reference_scene(rng, subject) for subject in subjects]
    return generation(kind, stock, prompt, Scene(background, subjects, air), shown)


generate = partial(_generate, "generate", {1: 0.55, 2: 0.3, 3: 0.15}, random_pattern)
generate_one = partial(_generate, "generate_one", {1: 1.0}, _practice_pattern)
generate_several = partial(_generate, "generate_several", {2: 2 / 3, 3: 1 / 3}, _practice_pattern)
