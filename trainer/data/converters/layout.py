"""What the converters of published datasets share: what they are given, and what they yield."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from PIL.Image import Image

from mige_rt.errors import InputError
from mige_rt.instruction import EditScope, Task, count_placeholders, rewrite_instruction
from trainer.data.filters import SCORES

ImageData = bytes | Path | Image  # an image file's content, its path, or an image that was cut out of one


@dataclass(frozen=True)
class ConvertOptions:
    """How a dataset is read.

    Attributes:
        image_column: Of the target; None: the layout's own.
        source_column: Of the image to edit; None: the layout's own.
        caption_column: Of the instruction; None: the layout's own.
        score_columns: By the name of a score (see `trainer.data.filters`), where the layout has no such column.
        scope: How the rewriting rule completes an instruction that does not name the image, where the dataset does not
            say what kind of edit it is.
    """

    image_column: str | None = None
    source_column: str | None = None
    caption_column: str | None = None
    score_columns: Mapping[str, str] = field(default_factory=dict)
    scope: EditScope = "local"


@dataclass(frozen=True)
class ConvertedSample:
    """A sample of a published dataset.

    Attributes:
        task: Which of the three uses it is.
        prompt: Multimodal: with one placeholder for each image.
        images: In the order of the placeholders; those that are the source are the same object.
        source: None for the task subject.
        target: The image that should be made.
        scores: By name.
    """

    task: Task
    prompt: str
    images: tuple[ImageData, ...]
    source: ImageData | None
    target: ImageData
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejection:
    """A sample that a converter leaves out.

    Attributes:
        reason: A few words, the same for all samples that are left out for it.
    """

    reason: str


# Called with the downloaded dataset's folder or file; raises InputError where it has not the layout.
Converter = Callable[[Path, ConvertOptions], Iterator[ConvertedSample | Rejection]]


def edit_sample(
    source: ImageData | None,
    instruction: object,
    target: ImageData | None,
    scope: EditScope,
    scores: Mapping[str, float] | None = None,
) -> ConvertedSample | Rejection:
    """An edit, whose instruction is made multimodal by the paper's rewriting rule (MIGE, section 3.1).

    Args:
        source: None: there is none, and the sample is left out.
        instruction: What is no text, or a blank one, is none.
        target: None: as for the source.
        scope: How the rule completes an instruction that does not name the image.
        scores: By name.
    """
    if source is None or target is None:
        return Rejection("no image")
    if not isinstance(instruction, str) or not instruction.strip():
        return Rejection("no instruction")
    prompt = rewrite_instruction(instruction, scope)
    return ConvertedSample("edit", prompt, (source,) * count_placeholders(prompt), source, target, scores or {})


def check_score_names(columns: Mapping[str, str]) -> None:
    """Raises InputError where a score is named that no filter knows."""
    for name in columns:
        if name not in SCORES:
            raise InputError(f"{name!r} is no score that is filtered by; expected one of {', '.join(SCORES)}")


def read_scores(row: Mapping[str, object], columns: Mapping[str, str], where: Path) -> dict[str, float]:
    """The scores that a row has, by name.

    Args:
        row: By column.
        columns: The column of each score.
        where: Begins an error's message.

    Raises:
        InputError: One is no number.
    """
    values = {name: row[column] for name, column in columns.items() if row[column] is not None}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}: the score {columns[name]} is {value!r}; a number is expected")
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def check_columns(wanted: Sequence[str], known: Sequence[str], where: Path) -> None:
    """Raises InputError that names the first column that is not there, and the nearest one that is."""
    for name in wanted:
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            hint = f", did you mean {nearest[0]}?" if nearest else "."
            raise InputError(f"{where} has no column {name!r}{hint} It has {', '.join(known)}; name them by options")
