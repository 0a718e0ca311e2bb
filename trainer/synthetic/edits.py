"""Edits by words alone: removing, recolouring, moving, resizing, restyling, light and weather."""

from dataclasses import replace

import numpy as np

from trainer.synthetic.atmosphere import LOOKS, TIMES, WEATHERS
from trainer.synthetic.backgrounds import COLOURS, Background
from trainer.synthetic.concepts import STYLES, Style, main_colour
from trainer.synthetic.sample import Sample, Stock, edit
from trainer.synthetic.scene import (
    Scene,
    Sizes,
    Subject,
    free_places,
    grid_way,
    inside,
    put,
    random_background,
    random_pattern,
    random_subjects,
)
from trainer.synthetic.wording import TOWARDS, multimodal, naming, pick, whereabouts

TINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "turquoise")
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # words for a way in rows and columns
FACTORS = {"bigger": 1.5, "larger": 1.5, "smaller": 1 / 1.5, "twice as big": 2.0, "half as big": 0.5}
RESIZED: Sizes = (0.27, 0.6)  # what resizing starts from and leads to
STYLE_WORDS: dict[Style, tuple[str, str]] = {"fluent": ("3d", "glossy 3d"), "noto": ("flat", "flat cartoon")}
BACK_SHARE = 0.2  # of the edits of light and weather: those that take it away


def _scene(rng: np.random.Generator, stock: Stock, most: int) -> Scene:
    """A scene of one to `most` subjects."""
    number = int(rng.integers(1, stock.at_most(most) + 1))
    return Scene(random_background(rng, stock.photos), random_subjects(rng, stock.concepts, number))


def _with(scene: Scene, index: int, subject: Subject) -> Scene:
    return replace(scene, subjects=tuple(subject if i == index else s for i, s in enumerate(scene.subjects)))


def recolour(rng: np.random.Generator, stock: Stock) -> Sample | None:
    """The background in another color."""
    background = random_pattern(rng)
    scene = replace(_scene(rng, stock, 2), background=background)
    colour = pick(rng, [c for c in COLOURS if c != background.colour])
    prompt = multimodal(
        rng,
        [
            f"make the background {colour}",
            f"turn the background {colour}",
            f"change the background to {colour}",
            f"change the color of the background to {colour}",
            f"paint the background of the image {colour}",
            f"i want a {colour} background",
        ],
        [
            f"make the background of <imagehere> {colour}",
            f"change the background in <imagehere> to {colour}",
            f"give <imagehere> a {colour} background",
        ],
    )
    return edit("recolour", stock, prompt, scene, replace(scene, background=replace(background, colour=colour)))


def remove(rng: np.random.Generator, stock: Stock) -> Sample | None:
    """One subject is gone."""
    scene = _scene(rng, stock, 3)
    index = int(rng.integers(len(scene.subjects)))
    what = naming(rng, scene, index)
    prompt = multimodal(
        rng,
        [
            f"remove {what}",
            f"delete {what}",
            f"erase {what} from the picture",
            f"take {what} away",
            f"get rid of {what}",
            f"make {what} disappear",
        ],
        [f"remove {what} from <imagehere>", f"erase {what} in <imagehere>", f"show <imagehere> without {what}"],
    )
    after = replace(scene, subjects=tuple(s for i, s in enumerate(scene.subjects) if i != index))
    return edit("remove", stock, prompt, scene, after)


def recolour_subject(rng: np.random.Generator, stock: Stock) -> Sample | None:
    """One subject in another color."""
    scene = _scene(rng, stock, 3)
    index = int(rng.integers(len(scene.subjects)))
    subject = scene.subjects[index]
    taken = [main_colour(subject.concept.image(subject.style))]
    if isinstance(scene.background, Background):
        taken.append(scene.background.colour)
    colour = pick(rng, [c for c in TINTS if c not in taken])
    what = naming(rng, scene, index)
    prompt = multimodal(
        rng,
        [
            f"make {what} {colour}",
            f"turn {what} {colour}",
            f"paint {what} {colour}",
            f"change the color of {what} to {colour}",
            f"color {what} in the picture {colour}",
        ],
        [f"make {what} in <imagehere> {colour}", f"change the color of {what} in <imagehere> to {colour}"],
    )
    after = _with(scene, index, replace(subject, tint=colour))
    return edit("recolour_subject", stock, prompt, scene, after, [index])


def move(rng: np.random.Generator, stock: Stock) -> Sample | None:
    """To a place, to where another subject is near, or one step in a direction."""
    scene = _scene(rng, stock, 2)
    index = int(rng.integers(len(scene.subjects)))
    subject = scene.subjects[index]
    places = [p for p in free_places([s.place for s in scene.subjects if s is not subject]) if p != subject.place]
    if not places:
        return None
    place, what = pick(rng, places), naming(rng, scene, index)
    step = next((word for word, way in STEPS.items() if way == grid_way(subject.place, place)), None)
    where = whereabouts(rng, scene, place, but=index)
    where = step if step is not None and rng.random() < 0.7 else TOWARDS.get(where, where)
    prompt = multimodal(
        rng,
        [f"move {what} {where}", f"shift {what} {where}", f"move {what} in the picture {where}"],
        [f"move {what} in <imagehere> {where}", f"in <imagehere> shift {what} {where}"],
    )
    after = _with(scene, index, put(subject, subject.size, place))
    return edit("move", stock, prompt, scene, after, [index])


def resize(rng: np.random.Generator, stock: Stock) -> Sample | None:
    """One subject bigger or smaller."""
    scene = _scene(rng, stock, 2)
    index = int(rng.integers(len(scene.subjects)))
    word = pick(rng, list(FACTORS))
    factor, (least, most) = FACTORS[word], RESIZED
    size = float(rng.uniform(max(least, least / factor), min(most, most / factor)))
    before, after = (
        _with(scene, index, replace(subject, size=s, centre=inside(subject.centre, s)))
        for subject in [scene.subjects[index]]
        for s in (size, size * factor)
    )
    what = naming(rng, scene, index)
    plain = [f"make {what} {word}", f"make {what} in the image {word}"]
    if word in ("bigger", "larger"):
        plain += [f"enlarge {what}", f"increase the size of {what}"]
    elif word == "smaller":
        plain += [f"shrink {what}", f"reduce the size of {what}"]
    prompt = multimodal(rng, plain, [f"make {what} in <imagehere> {word}", f"in <imagehere> make {what} {word}"])
    return edit("resize", stock, prompt, before, after, [index])


def restyle(rng: np.random.Generator, stock: Stock) -> Sample | None:
    """One subject, or all of them, drawn in the other style."""
    scene = _scene(rng, stock, 2)
    if any(subject.concept.noto is None for subject in scene.subjects):
        return None
    style = pick(rng, STYLES)
    other = next(s for s in STYLES if s != style)
    word, manner = STYLE_WORDS[style][0], pick(rng, STYLE_WORDS[style])
    if rng.random() < 0.7:
        asked = [int(rng.integers(len(scene.subjects)))]
        what = naming(rng, scene, asked[0])
        plain = [f"make {what} {word}", f"redraw {what} in a {manner} style", f"turn {what} into a {manner} drawing"]
        with_image = [f"draw {what} in <imagehere> in a {manner} style", f"make {what} in <imagehere> {word}"]
    else:
        asked = list(range(len(scene.subjects)))
        plain = [f"make everything {word}", f"redraw the picture in a {manner} style"]
        with_image = [f"draw <imagehere> in a {manner} style", f"make everything in <imagehere> {word}"]
    before, after = (
        replace(scene, subjects=tuple(replace(s, style=t) if i in asked else s for i, s in enumerate(scene.subjects)))
        for t in (other, style)
    )
    return edit("restyle", stock, multimodal(rng, plain, with_image), before, after, asked)


def light(rng: np.random.Generator, stock: Stock) -> Sample | None:
    """Another time of day or another look of the whole image; sometimes from such a time back to the day."""
    scene = _scene(rng, stock, 3)
    word = pick(rng, list(TIMES) if rng.random() < 0.5 else list(LOOKS))
    changed = replace(scene, air=word)
    if word in LOOKS:
        plain = [f"make it {word}", f"make the picture {word}", f"turn the image {word}"]
        prompt = multimodal(rng, plain, [f"make <imagehere> {word}", f"turn <imagehere> {word}"])
        return edit("light", stock, prompt, scene, changed)
    if rng.random() < BACK_SHARE:
        plain = ["make it day", "make it day again", f"turn {word} into day", "change the time to day"]
        return edit("light", stock, multimodal(rng, plain, ["show <imagehere> by day"]), changed, scene)
    plain = [f"make it {word}", f"change the time to {word}", f"turn day into {word}"]
    prompt = multimodal(rng, plain, [f"show <imagehere> at {word}", f"make it {word} in <imagehere>"])
    return edit("light", stock, prompt, scene, changed)


def weather(rng: np.random.Generator, stock: Stock) -> Sample | None:
    """Rain, snow or fog comes; or goes."""
    scene = _scene(rng, stock, 3)
    word = pick(rng, list(WEATHERS))
    changed = replace(scene, air=word)
    if rng.random() < BACK_SHARE:
        plain = [f"remove the {word}", f"clear the {word}", f"make the {word} stop", "make the weather clear"]
        return edit("weather", stock, multimodal(rng, plain, [f"show <imagehere> without {word}"]), changed, scene)
    plain = [f"add {word}", f"change the weather to {word}", f"let there be {word}", f"add {word} to the picture"]
    if word in ("rain", "snow"):
        plain += [f"make it {word}", f"let it {word}"]
    prompt = multimodal(rng, plain, [f"show <imagehere> in {word}", f"add {word} to <imagehere>"])
    return edit("weather", stock, prompt, scene, changed)
