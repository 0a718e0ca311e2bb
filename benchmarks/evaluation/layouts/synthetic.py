"""The project's synthetic world, as `python -m trainer.synthetic.manifest --held-out` writes it.

Its manifest says in `truth` what is where, so subjects are cut out by the ground truth's mask, not by a detector. It
has captions for generation alone.
"""

from pathlib import Path
from typing import Any

from benchmarks.evaluation.sample import Benchmark, BenchmarkSample, ImageFile, MaskFile, Subject
from mige_rt.errors import InputError
from mige_rt.instruction import PLACEHOLDER, Task
from mige_rt.requests import RequestRecord, check_task, parse_request, read_lines
from trainer.data.manifest import MANIFEST

ROWS: tuple[Task, ...] = ("subject", "edit", "compose")


def open_synthetic(folder: Path) -> Benchmark:
    """Read a folder of synthetic samples. Raises InputError when it is none."""
    path = folder / MANIFEST
    samples = []
    for number, line in read_lines(path):
        try:
            samples.append(_sample(folder, parse_request(line), number))
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} line {number} is no synthetic sample ({error}); make the folder by python -m "
                "trainer.synthetic.manifest"
            ) from error
    return Benchmark(
        layout="synthetic",
        title="synthetic world",
        compared="the ground truth",
        samples=tuple(samples),
        rows=ROWS,
        notes=("subjects are cut out by the ground truth's mask, whose shape alone tells a good deal",),
    )


def _sample(folder: Path, record: RequestRecord, number: int) -> BenchmarkSample:
    if record.target is None or record.truth is None:
        raise InputError("target or truth is missing")
    truth, task = ImageFile(folder / record.target), check_task(record.task, record.images, record.source)
    after: list[dict[str, Any]] = record.truth["after"]
    asked = [after[k] for k in record.truth["asked"]]
    subjects = [mark for mark in asked if mark["reference"] is not None and mark["box"] is not None]
    return BenchmarkSample(
        id=record.id or str(number),
        rows=(task,),
        group=record.id or str(number),
        prompt=record.prompt,
        images=tuple(ImageFile(folder / path) for path in record.images),
        source=None if record.source is None else ImageFile(folder / record.source),
        truth=truth,
        similar_to=(truth,),
        caption=_caption(record.prompt, after) if task == "subject" else None,
        mask=None if record.source is None else MaskFile(folder / record.truth["changed"]),
        subject=Subject(subjects[0]["name"], truth, MaskFile(folder / subjects[0]["mask"])) if subjects else None,
    )


def _caption(prompt: str, marks: list[dict[str, Any]]) -> str:
    """The prompt with the subjects' names in place of their images."""
    names = {mark["reference"]: mark["name"] for mark in marks}
    parts = prompt.split(PLACEHOLDER)
    return parts[0] + "".join(names.get(k, "thing") + part for k, part in enumerate(parts[1:]))
