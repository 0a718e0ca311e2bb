"""A folder with a few images of one new thing, as samples to fine-tune a model on.

Each image is the target of samples whose prompt is the folder's, or that of the text file beside it (`cat-1.txt` for
`cat-1.png`). Where the prompt has an `<imagehere>`, there is a sample for each of the next REFERENCES images in the
order of their names, around the end: that image stands for the thing, so that the model learns to draw it as it looks
elsewhere, and not to copy. Several placeholders take the images that follow. A single image stands for itself. Where
the prompt has none, there is one sample for each image.
"""

from pathlib import Path

from mige_rt.errors import InputError
from mige_rt.instruction import check_length, count_placeholders
from mige_rt.requests import complete_instruction
from trainer.data.manifest import ManifestSample

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
REFERENCES = 9  # of each image


def instance_samples(folder: Path, prompt: str | None) -> list[ManifestSample]:
    """The samples of a folder, for the task subject.

    Args:
        folder: The images' folder; files of other kinds are passed over.
        prompt: Of images without a text file.

    Raises:
        InputError: There is no image in the folder, or an image without a prompt that can be used.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give one with images of the new thing")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not images:
        raise InputError(f"{folder} holds no image; {', '.join(SUFFIXES)} are expected")
    samples: list[ManifestSample] = []
    for number, image in enumerate(images):
        text = _prompt(image, prompt)
        placeholders = count_placeholders(text)
        others = [*images[number + 1 :], *images[:number]] or [image]
        for first in range(min(len(others), REFERENCES) if placeholders else 1):
            references = tuple(str(others[(first + k) % len(others)]) for k in range(placeholders))
            try:
                completed, references = complete_instruction(text, references, None)
            except InputError as error:
                raise InputError(f"the prompt of {image} cannot be used: {error}") from error
            samples.append(
                ManifestSample(
                    id=f"{image.name}-{first}",
                    task="subject",
                    prompt=completed,
                    images=references,
                    source=None,
                    target=str(image),
                    size=None,
                    scores={},
                )
            )
    return samples


def _prompt(image: Path, default: str | None) -> str:
    path = image.with_suffix(".txt")
    try:
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else default
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); write the image's prompt as UTF-8") from error
    if text is None:
        raise InputError(f"{image} has no prompt: give --instance-prompt, or write the prompt to {path}")
    check_length(text)
    return text
