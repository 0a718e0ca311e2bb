"""Edit with a subject, several images as one batch, with a callback: `python examples/compose_batch.py [FOLDER]`."""

import sys
from pathlib import Path
from typing import Any

from PIL import Image

from mige_rt import MigePipeline

DOCS = Path(__file__).resolve().parents[1] / "docs"
STEPS = 20


def show_progress(pipe: MigePipeline, step: int, timestep: float, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Called at the end of each step, with the arguments that diffusers uses."""
    print(f"step {step + 1} of {STEPS}, t = {timestep:.0f}", file=sys.stderr)
    return callback_kwargs


def main(out: Path) -> None:
    """Write the images of three seeds into a folder."""
    pipe = MigePipeline.from_pretrained()
    scene, subject = Image.open(DOCS / "scene.png"), Image.open(DOCS / "subject.png")
    result = pipe(
        ["replace the thing on the left in <imagehere> with <imagehere>"] * 3,
        images=[[scene, subject]] * 3,  # for each prompt, one image a placeholder
        source=[scene] * 3,
        seed=[7, 8, 9],  # an image depends on its own seed alone, not on the batch
        num_inference_steps=STEPS,
        callback_on_step_end=show_progress,
    )
    for image, seed in zip(result.images, result.seeds, strict=True):
        path = out / f"compose-{seed}.png"
        image.save(path)
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
