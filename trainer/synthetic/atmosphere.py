"""Light and weather over a whole image. Each is one fixed change, so that its words alone say what it does."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw


@dataclass(frozen=True)
class Light:
    """Colours become grey + saturation * (colour - grey), then gain * colour + lift (red, green, blue; 0..255)."""

    gain: tuple[float, float, float]
    lift: tuple[float, float, float] = (0, 0, 0)
    saturation: float = 1


TIMES: dict[str, Light] = {
    "night": Light((0.26, 0.3, 0.46), (0, 4, 22), 0.7),
    "dusk": Light((0.62, 0.46, 0.62), (26, 8, 36)),
    "dawn": Light((0.74, 0.68, 0.68), (62, 40, 44), 0.8),
    "sunset": Light((0.95, 0.66, 0.42), (26, 8, 0)),
}
LOOKS: dict[str, Light] = {
    "brighter": Light((0.62, 0.62, 0.62), (97, 97, 97)),
    "darker": Light((0.5, 0.5, 0.5)),
    "warmer": Light((0.95, 0.92, 0.66), (13, 8, 0)),
    "colder": Light((0.66, 0.92, 0.95), (0, 8, 13)),
    "black and white": Light((1, 1, 1), saturation=0),
}
LIGHTS = TIMES | LOOKS


@dataclass(frozen=True)
class Weather:
    """veil: colour that all is mixed with, `thickness` of it at the top and at the bottom; pieces: drops or flakes."""

    veil: tuple[int, int, int]
    thickness: tuple[float, float]
    pieces: int = 0
    piece: tuple[float, float] = (0, 0)  # breadth and length of one, fractions of the image's side
    strength: float = 0  # of a piece's whiteness


_DROP, _FLAKE = (0.024, 0.12), (0.05, 0.05)
WEATHERS: dict[str, Weather] = {
    "rain": Weather((112, 122, 138), (0.35, 0.35), 36, _DROP, 0.55),
    "heavy rain": Weather((88, 96, 112), (0.5, 0.5), 80, _DROP, 0.6),
    "snow": Weather((236, 240, 246), (0.12, 0.4), 36, _FLAKE, 0.95),
    "heavy snow": Weather((236, 240, 246), (0.3, 0.7), 80, _FLAKE, 0.95),
    "fog": Weather((214, 218, 222), (0.6, 0.35)),
    "thick fog": Weather((214, 218, 222), (0.85, 0.65)),
}


def relight(image: np.ndarray, name: str) -> np.ndarray:
    """An image, uint8 [h,w,3], in one of LIGHTS."""
    light = LIGHTS[name]
    grey = image @ np.array([0.3, 0.59, 0.11], np.float32)[:, None]
    colour = grey + light.saturation * (image - grey)
    changed = colour * np.array(light.gain, np.float32) + np.array(light.lift, np.float32)
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


@lru_cache(maxsize=16)
def _pieces(name: str, side: int) -> np.ndarray:
    """How white each pixel is with drops or flakes, float32 [side,side,1]; drawn large, then reduced."""
    weather, large = WEATHERS[name], 4 * side
    sheet = Image.new("L", (large, large))
    pen = ImageDraw.Draw(sheet)
    breadth, length = (large * fraction for fraction in weather.piece)
    for x, y in np.random.default_rng(0).uniform(-0.1, 1.1, (weather.pieces, 2)) * large:
        if breadth == length:
            pen.ellipse((x, y, x + breadth, y + breadth), fill=255)
        else:
            pen.line((x, y, x - length / 4, y + length), fill=255, width=round(breadth))
    small = np.asarray(sheet.resize((side, side), Image.Resampling.BOX), np.float32)
    return small[..., None] / 255 * weather.strength


def cover(image: np.ndarray, name: str) -> np.ndarray:
    """An image, uint8 [side,side,3], in one of WEATHERS; drops and flakes fall at the same places in every image."""
    weather, side = WEATHERS[name], len(image)
    thickness = np.linspace(*weather.thickness, side, dtype=np.float32)[:, None, None]
    veiled = image * (1 - thickness) + np.array(weather.veil, np.float32) * thickness
    white = _pieces(name, side)
    return np.rint(veiled * (1 - white) + 250 * white).astype(np.uint8)


def apply(image: np.ndarray, name: str) -> np.ndarray:
    """An image, uint8 [side,side,3], in the light or the weather of that name."""
    change: Callable[[np.ndarray, str], np.ndarray] = relight if name in LIGHTS else cover
    return change(image, name)
