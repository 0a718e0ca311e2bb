"""The things of the synthetic data: what each is called, and its images in two drawing styles."""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from mige_rt.errors import InputError
from trainer.synthetic.backgrounds import COLOURS

CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
LEFT_OUT = ("time", "sky & weather", "place-map", "place-geographic")  # clock faces, moons: no objects to move about
SPRITE_SIDE = 96  # a little more than the largest a subject gets in a 128 px scene
MAIN_COLOUR_SHARE = 0.6  # of a thing's pixels that have to agree before it is called by its colour

CutOut = Path | Callable[[], Image.Image]  # a file, or what draws a square RGBA of SPRITE_SIDE pixels; hashable
Style = Literal["fluent", "noto"]
STYLES: tuple[Style, ...] = get_args(Style)


@dataclass(frozen=True)
class Concept:
    """One thing: its English name and its cut-out images.

    Attributes:
        code: Its code points.
        name: In English.
        fluent: Its image in that style.
        noto: Its image in that style; None where it lacks one.
        named: Whether its name tells what it looks like, so that words may call it so.
    """

    code: str
    name: str
    fluent: CutOut
    noto: CutOut | None
    named: bool = True

    def image(self, style: Style) -> CutOut:
        """The cut-out in a style. Raises ValueError where this thing lacks it."""
        path = self.fluent if style == "fluent" else self.noto
        if path is None:
            raise ValueError(f"{self.name} has no {style} image")
        return path

    @property
    def held_out(self) -> bool:
        """One concept in ten is kept for evaluation; decided by its code point, so that it never changes."""
        return zlib.crc32(self.code.encode()) % 10 == 0


def load_concepts(root: Path) -> list[Concept]:
    """The concepts in a folder made by `python -m trainer.synthetic.fetch`, in order of code point.

    Raises InputError if the folder is not one.
    """
    index = root / "emoji.json"
    if not index.is_file():
        raise InputError(
            f"{root} holds no emoji.json; make the folder with: python -m trainer.synthetic.fetch --out {root}"
        )
    fluent = {path.stem.lower().replace("-fe0f", ""): path for path in (root / "fluent").glob("*.webp")}
    noto = {path.stem.lower().replace("-fe0f", ""): path for path in (root / "noto").glob("*.png")}
    concepts = []
    try:
        for entry in json.loads(index.read_text(encoding="utf-8")):
            if entry["category"] not in CATEGORIES or entry["subcategory"] in LEFT_OUT:
                continue
            code = entry["unified"].lower().replace("-fe0f", "")
            if code in fluent:
                name = (entry["name"] or entry["short_name"]).lower().replace("_", " ")
                concepts.append(Concept(code, name, fluent[code], noto.get(code)))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is damaged ({error}); remove {root} and fetch it again") from error
    if not concepts:
        raise InputError(f"{root} holds no image that emoji.json names; fetch it again")
    return sorted(concepts, key=lambda concept: concept.code)


@lru_cache(maxsize=4096)
def _opened(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return centred(file.convert("RGBA"))


@lru_cache(maxsize=16)
def _drawn(draw: Callable[[], Image.Image]) -> Image.Image:
    return draw()


def sprite(cut_out: CutOut) -> Image.Image:
    """A concept's image as a square RGBA of SPRITE_SIDE pixels; not to be changed."""
    return _opened(cut_out) if isinstance(cut_out, Path) else _drawn(cut_out)


def centred(image: Image.Image) -> Image.Image:
    """An RGBA image, cut to its visible box and put in the middle of a square of SPRITE_SIDE pixels."""
    box = image.getchannel("A").point([0] * 8 + [255] * 248).getbbox() or (0, 0, *image.size)
    image = image.crop(box)
    scale = SPRITE_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGBA", (SPRITE_SIDE, SPRITE_SIDE))
    square.paste(
        image.resize(size, Image.Resampling.LANCZOS), ((SPRITE_SIDE - size[0]) // 2, (SPRITE_SIDE - size[1]) // 2)
    )
    return square


@lru_cache(maxsize=4096)
def main_colour(cut_out: CutOut) -> str | None:
    """The colour word for most of a concept's image; None where no colour has MAIN_COLOUR_SHARE of it."""
    image = sprite(cut_out)
    hue, saturation, value = np.moveaxis(np.asarray(image.convert("RGB").convert("HSV")), -1, 0)[
        :, np.asarray(image)[..., 3] > 128
    ]
    # Borders of the hues, in 256ths of a turn. Dull red is pink or, where it is dark, brown.
    names = np.array(["red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "red"])
    named = names[np.searchsorted([10, 25, 48, 112, 138, 180, 205, 228], hue, side="right")].astype("<U9")
    dull = (named == "red") & (saturation < 150)
    named[dull] = np.where(value[dull] >= 200, "pink", "brown")
    named[(named == "orange") & (value < 190)] = "brown"
    pale = saturation < 50
    named[pale] = np.where(value[pale] > 200, "white", "grey")
    named[value < 80] = "black"
    found, counts = np.unique(named, return_counts=True)
    return str(found[counts.argmax()]) if counts.max() >= MAIN_COLOUR_SHARE * counts.sum() else None


def _tinted(rgb: np.ndarray, colour: str) -> np.ndarray:
    """float32 [h,w,3] in one hue: black stays black, middle grey becomes the colour, and white a pale shade of it."""
    light = rgb @ np.array([0.3, 0.59, 0.11], np.float32)[:, None] / 255  # [h,w,1]
    base = np.array(COLOURS[colour], np.float32)
    return np.where(light < 0.6, base * light / 0.6, base + (255 - base) * (light - 0.6))


def paste(
    scene: np.ndarray,
    cut_out: CutOut,
    centre: tuple[float, float],
    size: int,
    flip: bool = False,
    tint: str | None = None,
) -> np.ndarray:
    """Draw a sprite of `size` pixels onto scene, uint8 [side,side,3], in place; returns its mask, bool [side,side].

    flip: mirrored. tint: one of COLOURS, in whose hue the sprite is drawn.
    """
    image = sprite(cut_out).resize(
        (size, size), Image.Resampling.BOX if size * 2 <= SPRITE_SIDE else Image.Resampling.BILINEAR
    )
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = scene.shape[0]
    left, top = round(centre[0] - size / 2), round(centre[1] - size / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + size, side), min(top + size, side)
    pixels = np.asarray(image)[y0 - top : y1 - top, x0 - left : x1 - left].astype(np.float32)
    rgb, alpha = pixels[..., :3], pixels[..., 3:] / 255
    if tint is not None:
        rgb = _tinted(rgb, tint)
    patch = scene[y0:y1, x0:x1]
    patch[...] = np.rint(patch * (1 - alpha) + rgb * alpha).astype(np.uint8)
    mask = np.zeros(scene.shape[:2], bool)
    mask[y0:y1, x0:x1] = alpha[..., 0] > 0.5
    return mask
