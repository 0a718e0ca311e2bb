"""What a sample is, and how it is made of the scenes before and after."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mige_rt.instruction import Task
from trainer.masks import mask_box
from trainer.synthetic.concepts import Concept, Style
from trainer.synthetic.scene import Drawing, Scene, Subject, draw_scene, reference_scene

MOSTLY = 0.6  # share of every subject that is to be seen
CONTRAST = 24  # of 255, in some channel: what counts as a change that can be seen
SEEN = 0.03  # share of the image that has to change so


@dataclass(frozen=True)
class Origin:
    """Where an image of a sample shows a subject of the ground truth.

    image: index in Sample.images. scale, shift: a point of the ground truth, x and y in fractions of its side, is at
    scale * point + shift of the image.
    """

    image: int
    scale: float
    shift: tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """One subject that is to be seen in an image.

    mask: bool [side,side], the visible part. box: left, top, right, bottom of that part in pixels, the last two
    exclusive; None if nothing is visible. reference: index in Sample.images of the image that shows this subject
    alone, if there is one. origin: of a subject of the ground truth that is seen in an image of the sample.
    """

    concept: Concept
    style: Style
    mask: np.ndarray
    box: tuple[int, int, int, int] | None
    reference: int | None
    origin: Origin | None


@dataclass(frozen=True)
class Sample:
    """One training or evaluation sample; images are uint8 [side,side,3].

    prompt: the caption without the task's prefix. images: in placeholder order; where one is the source, it is the very
    same array. changed: bool [side,side], the pixels in which the ground truth differs from the source (all, for
    generation). before, after: the subjects of source and target, from the rearmost to the foremost. asked: indices in
    `after` of those that the instruction brings in or changes in place.
    """

    kind: str
    task: Task
    prompt: str
    images: list[np.ndarray]
    source: np.ndarray | None
    target: np.ndarray
    changed: np.ndarray
    before: tuple[Mark, ...]
    after: tuple[Mark, ...]
    asked: tuple[int, ...]


@dataclass(frozen=True)
class Stock:
    """What scenes are made of: things, and photos for some of the backgrounds; and the images' side in pixels."""

    concepts: Sequence[Concept]
    side: int
    photos: Sequence[Path] = ()

    def at_most(self, number: int, new: int = 0) -> int:
        """`number`, or as many different things as a scene may hold when `new` others are to come in."""
        return min(number, len(self.concepts) - new)


# One attempt at a sample of a kind; None where chance made it unfair.
Draft = Callable[[np.random.Generator, Stock], Sample | None]


def _marks(scene: Scene, drawing: Drawing, references: Mapping[int, int], shown: Sequence[Scene]) -> tuple[Mark, ...]:
    """shown: what the sample's images show."""
    return tuple(
        Mark(subject.concept, subject.style, mask, mask_box(mask), references.get(i), _origin(subject, shown))
        for i, (subject, mask) in enumerate(zip(scene.subjects, drawing.masks, strict=True))
    )


def _origin(subject: Subject, shown: Sequence[Scene]) -> Origin | None:
    for image, scene in enumerate(shown):
        for other in scene.subjects:
            if other.concept is subject.concept:
                scale = other.size / subject.size
                x, y = (there - scale * here for there, here in zip(other.centre, subject.centre, strict=True))
                return Origin(image, scale, (x, y))
    return None


def _fair(before: Drawing, after: Drawing) -> bool:
    """Whether the change can be seen, and every subject mostly."""
    difference = np.abs(before.image.astype(np.int16) - after.image).max(axis=-1)
    return min([1.0, *before.shown, *after.shown]) >= MOSTLY and float((difference >= CONTRAST).mean()) >= SEEN


def generation(kind: str, stock: Stock, prompt: str, scene: Scene, shown: Sequence[Scene]) -> Sample | None:
    """A sample without a source.

    Args:
        kind: Of task.
        stock: The images' side.
        prompt: The instruction.
        scene: The ground truth.
        shown: What the placeholders' images show: one for each of the scene's subjects, in their order, or one for all.

    Returns:
        None where a subject can hardly be seen.
    """
    drawing = draw_scene(scene, stock.side)
    if not _fair(draw_scene(Scene(scene.background, air=scene.air), stock.side), drawing):
        return None
    images = [drawing.image if other is scene else draw_scene(other, stock.side).image for other in shown]
    marks = _marks(scene, drawing, {i: min(i, len(images) - 1) for i in range(len(scene.subjects))}, shown)
    everywhere = np.ones((stock.side, stock.side), bool)
    asked = tuple(range(len(marks)))
    return Sample(kind, "subject", prompt, images, None, drawing.image, everywhere, (), marks, asked)


def edit(kind: str, stock: Stock, prompt: str, before: Scene, after: Scene, asked: Sequence[int] = ()) -> Sample | None:
    """A sample whose one image is the source; asked as in Sample."""
    source, target = draw_scene(before, stock.side), draw_scene(after, stock.side)
    if not _fair(source, target):
        return None
    return _edited(kind, prompt, [before], (before, source), (after, target), {}, asked)


def composition(
    kind: str,
    rng: np.random.Generator,
    stock: Stock,
    prompt: str,
    before: Scene,
    after: Scene,
    named: Sequence[int | None],
) -> Sample | None:
    """A sample with a source and images of what comes in.

    named: what each placeholder of the prompt stands for, a subject of `after` or, if None, the source.
    """
    source, target = draw_scene(before, stock.side), draw_scene(after, stock.side)
    if not _fair(source, target):
        return None
    shown = [before if i is None else reference_scene(rng, after.subjects[i]) for i in named]
    references = {subject: image for image, subject in enumerate(named) if subject is not None}
    return _edited(kind, prompt, shown, (before, source), (after, target), references, sorted(references))


def _edited(
    kind: str,
    prompt: str,
    shown: Sequence[Scene],
    before: tuple[Scene, Drawing],
    after: tuple[Scene, Drawing],
    references: dict[int, int],
    asked: Sequence[int],
) -> Sample:
    source, target = before[1].image, after[1].image
    images = [source if scene is before[0] else draw_scene(scene, len(source)).image for scene in shown]
    changed = np.any(source != target, axis=-1)
    return Sample(
        kind,
        "compose" if references else "edit",
        prompt,
        images,
        source,
        target,
        changed,
        _marks(*before, {}, ()),
        _marks(*after, references, shown),
        tuple(asked),
    )
