"""Edit an image as told, with two guidance scales: `python examples/edit.py [FOLDER]`."""

import sys
from pathlib import Path

from PIL import Image

from mige_rt import MigePipeline

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main(out: Path) -> None:
    """Write an image for each guidance scale into a folder."""
    pipe = MigePipeline.from_pretrained()
    source = Image.open(DOCS / "scene.png")
    for guidance_scale in (1.5, 5.0):  # how strongly the prompt counts
        result = pipe(
            "make the background blue",
            source=source,
            num_inference_steps=30,
            guidance_scale=guidance_scale,
            image_guidance_scale=1.5,  # how strongly the source counts
            seed=0,
        )
        path = out / f"edit-{guidance_scale}.png"
        result.images[0].save(path)
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
