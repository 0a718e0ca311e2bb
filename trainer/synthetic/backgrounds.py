"""What is behind a scene: a drawn pattern in a colour, or a part of a photo."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (206, 58, 52),
    "orange": (238, 146, 52),
    "yellow": (240, 212, 84),
    "green": (92, 170, 88),
    "blue": (66, 122, 206),
    "purple": (140, 90, 186),
    "pink": (240, 160, 190),
    "brown": (136, 98, 66),
    "grey": (148, 150, 154),
    "white": (240, 240, 238),
    "black": (40, 42, 48),
    "turquoise": (74, 186, 186),
}
PATTERNS = ("plain", "shaded", "striped", "checkered", "dotted", "hilly")
PHOTO_SIDE = 256  # pixels of the shorter side that a photo is kept at


@dataclass(frozen=True)
class Background:
    """pattern: one of PATTERNS; colour: one of COLOURS; seed: its offsets, angles and widths."""

    pattern: str
    colour: str
    seed: int


@dataclass(frozen=True)
class Photo:
    """A square part of a photo; seed: which."""

    path: Path
    seed: int


def draw(background: Background | Photo, side: int) -> np.ndarray:
    """uint8 [side,side,3]. The same pattern and seed in another colour differ in colour alone."""
    return (_crop(background, side) if isinstance(background, Photo) else _pattern(background, side)).copy()


@lru_cache(maxsize=64)
def _opened(path: Path) -> Image.Image:
    with Image.open(path) as file:
        file.draft("RGB", (2 * PHOTO_SIDE, 2 * PHOTO_SIDE))
        photo = file.convert("RGB")
    scale = PHOTO_SIDE / min(photo.size)
    return photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)


# An edit draws the same background twice. Its arrays are never handed out, only copies.
@lru_cache(maxsize=4)
def _crop(photo: Photo, side: int) -> np.ndarray:
    rng = np.random.default_rng(photo.seed)
    whole = _opened(photo.path)
    cut = rng.uniform(0.5, 1) * PHOTO_SIDE
    left, top = rng.uniform(0, whole.width - cut), rng.uniform(0, whole.height - cut)
    return np.asarray(whole.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + cut, top + cut)))


@lru_cache(maxsize=4)
def _pattern(background: Background, side: int) -> np.ndarray:
    rng = np.random.default_rng(background.seed)
    base = np.array(COLOURS[background.colour], np.float32)
    base = base + rng.uniform(-10, 10)  # a colour word covers a range of shades
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    phase, width, angle, contrast = (
        rng.uniform(0, 1),
        rng.uniform(0.14, 0.3),
        rng.uniform(0, np.pi),
        rng.uniform(0.1, 0.2),
    )
    match background.pattern:
        case "plain":
            light = np.zeros_like(x)
        case "shaded":
            light = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
        case "striped":
            light = np.sign(np.sin(2 * np.pi * ((x * np.cos(angle) + y * np.sin(angle)) / width + phase))) / 2
        case "checkered":
            light = np.sign(np.sin(2 * np.pi * (x / width + phase)) * np.sin(2 * np.pi * (y / width + phase))) / 2
        case "dotted":
            dx, dy = (x / width + phase) % 1 - 0.5, (y / width + phase) % 1 - 0.5
            light = np.where(dx * dx + dy * dy < 0.09, 0.7, -0.3)
        case "hilly":
            ridge = 0.6 + 0.08 * np.sin(2 * np.pi * (x * (0.6 + width * 3) + phase))
            light = np.where(y > ridge, -0.7, 0.3 - 0.4 * y)
        case _:
            raise ValueError(f"unknown pattern {background.pattern!r}; expected one of {', '.join(PATTERNS)}")
    toward = np.where(light[..., None] > 0, 255.0, 0.0)
    amount = np.abs(light[..., None]) * (2.2 * contrast + 0.1)
    return np.clip(np.rint(base * (1 - amount) + toward * amount), 0, 255).astype(np.uint8)
