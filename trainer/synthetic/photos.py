"""Photos for backgrounds, from packages that are installed; the synthetic data can do without them.

They are kept in the assets' folder, in `photos`, with a list of where each is from. None comes with this repository.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mige_rt.atomic import atomic_folder
from mige_rt.errors import InputError
from trainer.synthetic.backgrounds import PHOTO_SIDE


@dataclass(frozen=True)
class Origin:
    """An installed package's photos. folder: absolute, or in the Python package of the first part's name."""

    package: str
    licence: str
    folder: str
    patterns: tuple[str, ...] = ("*.jpg",)

    def photos(self) -> list[Path]:
        """In order of name; none where the package is not installed."""
        folder = Path(self.folder)
        if not folder.is_absolute():
            module = importlib.util.find_spec(folder.parts[0])
            if module is None or module.origin is None:
                return []
            folder = Path(module.origin).parent.joinpath(*folder.parts[1:])
        return sorted(path for pattern in self.patterns for path in folder.glob(pattern))


ORIGINS = (
    Origin("Debian lomiri-wallpapers-16.04", "CC-BY, CC-BY-SA or CC0", "/usr/share/backgrounds", ("*_by_*.jpg",)),
    Origin("Debian mate-backgrounds", "GPL-2+", "/usr/share/backgrounds/mate/nature"),
    Origin("scikit-learn", "CC-BY", "sklearn/datasets/images"),
    Origin(
        "scikit-image", "see its data/README", "skimage/data", ("chelsea.png", "coffee.png", "grass.png", "rocket.jpg")
    ),
)


def load_photos(root: Path) -> list[Path]:
    """The photos in a folder of assets, in order of name; none where none were fetched."""
    return sorted((root / "photos").glob("*.jpg"))


def fetch_photos(root: Path) -> Path:
    """Fill root/photos with reduced copies of what is installed, and a list of their origins; returns that folder.

    Raises InputError when nothing is installed, or the folder exists.
    """
    found = [(origin, path) for origin in ORIGINS for path in origin.photos()]
    if not found:
        packages = ", ".join(origin.package for origin in ORIGINS)
        raise InputError(f"no photos are installed; they come with any of: {packages}")
    with atomic_folder(root / "photos") as folder:
        (folder / "origins.txt").write_text("".join(_kept(folder, *each) for each in found), encoding="utf-8")
    return root / "photos"


def _kept(folder: Path, origin: Origin, path: Path) -> str:
    """Write a reduced copy; returns its line in the list of origins."""
    name = f"{path.stem}.jpg"
    with Image.open(path) as file:
        photo = file.convert("RGB")
    scale = min(1, 2 * PHOTO_SIDE / min(photo.size))
    size = (round(photo.width * scale), round(photo.height * scale))
    photo.resize(size, Image.Resampling.LANCZOS).save(folder / name, quality=92)
    return f"{name}\t{origin.package}\t{origin.licence}\n"
