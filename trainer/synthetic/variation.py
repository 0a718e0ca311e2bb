"""Things that exist nowhere else: a concept in another hue and pose, joined with another one, or a drawn shape.

A model that sees the same few hundred things again and again remembers them. One that never sees a thing twice has to
copy what it is shown.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from trainer.synthetic.concepts import SPRITE_SIDE, Concept, CutOut, centred, sprite

DRAWN_SHARE, JOINED_SHARE = 0.3, 0.25  # of the varied things
HUE_SHARE, TURNED_SHARE = 0.7, 0.4  # of the varied things that are not drawn


@dataclass(frozen=True)
class Variation:
    """A cut-out image that is varied.

    Attributes:
        cut_out: The image.
        hue: The change of hue, in turns.
        angle: The rotation, in degrees.
        other: The image that shows on one side of a line through the middle, if there is one.
        line: That line's direction, in degrees.
    """

    cut_out: CutOut
    hue: float = 0.0
    angle: float = 0.0
    other: CutOut | None = None
    line: float = 0.0

    def __call__(self) -> Image.Image:
        """RGBA of SPRITE_SIDE pixels a side."""
        image = sprite(self.cut_out)
        if self.other is not None:
            image = Image.composite(image, sprite(self.other), _half(self.line))
        if self.hue:
            hue, saturation, value = image.convert("RGB").convert("HSV").split()
            turned = hue.point([(level + round(self.hue * 256)) % 256 for level in range(256)])
            alpha = image.getchannel("A")
            image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
            image.putalpha(alpha)
        if self.angle:
            image = image.rotate(self.angle, Image.Resampling.BILINEAR, expand=True)
        return centred(image)


@dataclass(frozen=True)
class DrawnShape:
    """Two to four outlines on each other, each with a random texture. seed: which."""

    seed: int

    def __call__(self) -> Image.Image:
        """RGBA of SPRITE_SIDE pixels a side."""
        rng = np.random.default_rng(self.seed)
        image = Image.new("RGBA", (SPRITE_SIDE, SPRITE_SIDE))
        for size in sorted(rng.uniform(0.25, 1.0, int(rng.integers(2, 5))), reverse=True):
            outline = Image.new("L", image.size)
            ImageDraw.Draw(outline).polygon(_outline(rng, float(size)), fill=255)
            image.paste(Image.fromarray(_texture(rng)), (0, 0), outline)
        return centred(image)


def _half(line: float) -> Image.Image:
    """A mask, 255 on one side of a line through the middle."""
    y, x = np.mgrid[0:SPRITE_SIDE, 0:SPRITE_SIDE] - (SPRITE_SIDE - 1) / 2
    angle = math.radians(line)
    return Image.fromarray(((x * math.cos(angle) + y * math.sin(angle) > 0) * 255).astype(np.uint8))


def _outline(rng: np.random.Generator, size: float) -> list[tuple[float, float]]:
    """A closed curve whose radius is a sum of few waves, round or angular; size: a fraction of the side."""
    corners = int(rng.choice((3, 4, 5, 6, 40)))
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False) + rng.uniform(0, 2 * np.pi)
    waves = int(rng.integers(2, 6))
    radius = 1 + rng.uniform(0, 0.4) * np.cos(waves * turn + rng.uniform(0, 2 * np.pi))
    stretch = rng.uniform(0.5, 1.0, 2)
    centre = 0.5 + (1 - size) / 2 * rng.uniform(-1, 1, 2)
    points = centre + size / 2 * stretch * np.stack([np.cos(turn), np.sin(turn)], axis=1) * radius[:, None] / 1.4
    return [(float(x), float(y)) for x, y in points * SPRITE_SIDE]


def _texture(rng: np.random.Generator) -> np.ndarray:
    """uint8 [SPRITE_SIDE,SPRITE_SIDE,3]: two colours that a wave, a ramp, dots or clouds mix."""
    y, x = np.mgrid[0:SPRITE_SIDE, 0:SPRITE_SIDE] / SPRITE_SIDE
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(1, 6)
    along = x * np.cos(angle) + y * np.sin(angle)
    match int(rng.integers(5)):
        case 0:
            mix = along
        case 1:
            mix = np.sin(2 * np.pi * frequency * along) > 0
        case 2:
            mix = np.sin(2 * np.pi * frequency * x) * np.sin(2 * np.pi * frequency * y) > 0.3
        case 3:
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8))
            mix = np.asarray(coarse.resize((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.BICUBIC)) / 255
        case _:
            mix = np.zeros_like(x)
    first, second = rng.uniform(0, 255, (2, 3))
    colours = first + (second - first) * np.asarray(mix, float)[..., None]
    return np.clip(np.rint(colours), 0, 255).astype(np.uint8)


def vary(rng: np.random.Generator, concept: Concept, other: Concept) -> Concept:
    """A thing that words never name, made of a concept or drawn.

    Args:
        rng: Draws how it is varied.
        concept: What it is made of.
        other: What it may be joined with, unless it is held out.

    Raises:
        ValueError: `concept` is held out, whose images are for the evaluation alone.
    """
    if concept.held_out:
        raise ValueError(f"{concept.name} is held out and must not be varied")
    if rng.random() < DRAWN_SHARE:
        return replace(concept, fluent=DrawnShape(int(rng.integers(2**31))), noto=None, named=False)
    hue = float(rng.random()) if rng.random() < HUE_SHARE else 0.0
    angle = float(rng.uniform(-180, 180)) if rng.random() < TURNED_SHARE else 0.0
    is_joined, line = rng.random() < JOINED_SHARE and not other.held_out, float(rng.uniform(0, 360))

    def varied(cut_out: CutOut, second: CutOut) -> Variation:
        return Variation(cut_out, hue, angle, second if is_joined else None, line)

    noto = None if concept.noto is None else varied(concept.noto, other.noto or other.fluent)
    return replace(concept, fluent=varied(concept.fluent, other.fluent), noto=noto, named=False)


class VariedConcepts(Sequence[Concept]):
    """Concepts of which a share is varied, anew for each sample; those held out are as they are."""

    def __init__(self, concepts: Sequence[Concept], share: float, rng: np.random.Generator) -> None:
        self.concepts, self.share = concepts, share
        self._seed = int(rng.integers(2**31))

    def __len__(self) -> int:
        return len(self.concepts)

    def __getitem__(self, index: int) -> Concept:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The same one whenever it is asked for."""
        concept = self.concepts[index]
        rng = np.random.default_rng([self._seed, index % len(self)])
        if concept.held_out or rng.random() >= self.share:
            return concept
        return vary(rng, concept, self.concepts[int(rng.integers(len(self)))])
