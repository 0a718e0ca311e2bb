"""A results folder: `results.json`, what made the images, and `images/SAMPLE-SEED.png`."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.evaluation.sample import Benchmark
from export.formatting import json_text
from mige_rt.atomic import atomic_file
from mige_rt.errors import InputError, reason
from mige_rt.validation import differing_fields, validate

FILE, IMAGES = "results.json", "images"


@dataclass(frozen=True, kw_only=True)
class RunId:
    """What images depend on.

    Attributes:
        layout: Of the benchmark.
        fingerprint: Of the benchmark, see `Benchmark.fingerprint`.
        model: Its name.
        engine: Its name, as in `--engine`.
        device: The engine's, without its number: cpu, cuda.
        precision: The engine's.
        params: Sampling parameters by task.
    """

    layout: str
    fingerprint: str
    model: str
    engine: str
    device: str
    precision: str
    params: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """In reports."""
        return f"{self.model}, {self.engine} on {self.device} in {self.precision}"


@dataclass(frozen=True)
class Results:
    """A results folder that was opened."""

    folder: Path
    id: RunId

    def image(self, name: str) -> Path:
        """The path of an image, by its name in `Benchmark.image_names`."""
        return self.folder / IMAGES / name


def open_results(folder: Path) -> Results:
    """Read results.json.

    Raises:
        InputError: There is none, or it cannot be used.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder} has no {FILE}; give a folder that `mige-rt eval generate` has made")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); generate again into another folder") from error
    run = validate(RunId, content, str(path))
    return Results(folder, replace(run, device=run.device.partition(":")[0]))  # earlier versions wrote its number


def start_results(folder: Path, run: RunId) -> Results:
    """Begin a results folder, or go on with one.

    Raises:
        InputError: It holds other images, with what differs; or it cannot be written.
    """
    if (folder / FILE).is_file():
        results = open_results(folder)
        for name, now, before in differing_fields(json.loads(json_text(asdict(run))), asdict(results.id)):
            raise InputError(
                f"{folder} holds images of another run: its {name} is {before!r}, and not {now!r}; give another folder"
            )
        return results
    try:
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / FILE) as file:
            file.write_text(json_text(asdict(run)), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({reason(error)}); give a folder of your own") from error
    return Results(folder, run)


def check_benchmark(results: Results, benchmark: Benchmark) -> None:
    """Raises InputError where the results are of another benchmark, or of another version of it."""
    if results.id.layout != benchmark.layout:
        raise InputError(f"{results.folder} holds images of {results.id.layout}; give that one by --benchmark")
    if results.id.fingerprint != benchmark.fingerprint():
        raise InputError(
            f"{results.folder} holds images of a {benchmark.title} with other prompts, captions or seeds; give the "
            "folder that it was generated from"
        )
