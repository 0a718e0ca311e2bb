"""Generate images of a subject in a new scene: `python examples/generate.py [FOLDER]`."""

import sys
from pathlib import Path

from PIL import Image

from mige_rt import MigePipeline

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main(out: Path) -> None:
    """Write two images into a folder."""
    pipe = MigePipeline.from_pretrained()  # the default model: 64 x 64 pixels
    result = pipe(
        "a <imagehere> on a plain green background",
        images=[Image.open(DOCS / "subject.png")],
        num_images_per_prompt=2,
        seed=0,  # the second image takes seed 1
    )
    for image, seed in zip(result.images, result.seeds, strict=True):
        path = out / f"generate-{seed}.png"
        image.save(path)
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
