"""The metrics of one image, and those of a folder as JSON lines to which a stopped run adds."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.evaluation import metrics
from benchmarks.evaluation.encoders import Encoders
from benchmarks.evaluation.sample import AnyImageFile, BenchmarkSample
from mige_rt.atomic import atomic_file
from mige_rt.errors import InputError
from mige_rt.images import decode_image
from mige_rt.validation import validate

Extraction = Literal["found", "not found"]
CACHED_IMAGES = 64  # embeddings of images that are compared with, such as those of a subject of DreamBench


@dataclass(frozen=True)
class Score:
    """What was measured of one image.

    Attributes:
        image: Its name.
        sha256: Of its file.
        metrics: By name.
        baseline: The same of the unchanged source, where an edit has a ground truth.
        subject: Whether the subject was found; None: none was looked for.
        notes: What could not be measured, and why.
        masks: Digest of the files of its sample's masks; None: there are none; empty: an earlier version wrote this.
    """

    image: str
    sha256: str
    metrics: dict[str, float]
    baseline: dict[str, float] = field(default_factory=dict)
    subject: Extraction | None = None
    notes: tuple[str, ...] = ()
    masks: str | None = ""


class Scorer:
    """Measures images by the encoders that are here."""

    def __init__(self, encoders: Encoders) -> None:
        self._encoders = encoders
        self._cache: dict[tuple[str, AnyImageFile], NDArray[np.float32]] = {}

    def score(self, name: str, path: Path, sample: BenchmarkSample) -> Score:
        """Measure an image.

        Args:
            name: Of the image.
            path: Its file.
            sample: What it was made for.

        Raises:
            InputError: The image, or one that it is compared with, cannot be read.
        """
        content = path.read_bytes()
        image = decode_image(content, str(path))
        notes: list[str] = []
        truth = None if sample.truth is None else sample.truth.open()
        source = None if sample.source is None else sample.source.open()
        values = self._whole(image, sample, truth, source, notes)
        extraction = self._subject(image, sample, values, notes)
        baseline: dict[str, float] = {}
        if source is not None and truth is not None and sample.truth != sample.source:
            baseline = self._whole(source, sample, truth, source, [])
            self._subject(source, sample, baseline, [])
        return Score(
            name, sha256(content).hexdigest(), values, baseline, extraction, tuple(notes), _masks_digest(sample)
        )

    def _whole(
        self,
        image: Image.Image,
        sample: BenchmarkSample,
        truth: Image.Image | None,
        source: Image.Image | None,
        notes: list[str],
    ) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, encoder in self._encoders.similarities.items():
            (vector,) = encoder.embed_images([image])
            others = np.stack([self._embedded(name, other) for other in sample.similar_to])
            values[name] = metrics.mean_similarity(vector, others)
        values |= self._texts(image, sample, source)
        if truth is not None:
            if abs(image.width * truth.height - truth.width * image.height) > max(*image.size, *truth.size):
                notes.append(f"resized from {_size(image)} to {_size(truth)}, another shape")
            pixels, expected = (metrics.as_pixels(x, truth.size) for x in (image, truth))
            values |= {"L1": metrics.l1(pixels, expected), "L2": metrics.l2(pixels, expected)}
            if self._encoders.lpips is not None:
                values["LPIPS"] = self._encoders.lpips.distance(pixels, expected)
        if sample.mask is not None and source is not None:
            try:
                edited = sample.mask.open(source.size)
            except InputError as error:
                notes.append(f"no background shift: {error}")
            else:
                pixels, before = (metrics.as_pixels(x, source.size) for x in (image, source))
                shift = metrics.background_shift(pixels, before, edited)
                values |= {} if shift is None else {"background shift": shift}
        return values

    def _texts(self, image: Image.Image, sample: BenchmarkSample, source: Image.Image | None) -> dict[str, float]:
        clip, values = self._encoders.clip, dict[str, float]()
        if clip is None or sample.caption is None:
            return values
        (vector,), texts = clip.embed_images([image]), clip.embed_texts([sample.caption])
        values["CLIP-T"] = float(texts[0] @ vector)
        if sample.source_caption is not None and source is not None:
            (before,), captions = clip.embed_images([source]), clip.embed_texts([sample.source_caption])
            direction = metrics.directional_similarity((before, vector), (captions[0], texts[0]))
            values |= {} if direction is None else {"CLIP-dir": direction}
        return values

    def _subject(
        self, image: Image.Image, sample: BenchmarkSample, values: dict[str, float], notes: list[str]
    ) -> Extraction | None:
        """Add the similarities of the subject by itself; where it is not found, the whole image counts."""
        if sample.subject is None or not self._encoders.similarities:
            return None
        reference = sample.subject.reference.open()
        if sample.subject.mask is not None:
            try:
                mask = sample.subject.mask.open(reference.size)
            except InputError as error:
                notes.append(f"no metrics of the subject: {error}")
                return None
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            image = image if image.size == reference.size else image.resize(reference.size, Image.Resampling.BICUBIC)
            image, reference = metrics.cut_out(image, mask, box), metrics.cut_out(reference, mask, box)
            extraction: Extraction = "found"
        elif self._encoders.subjects is not None:
            match = self._encoders.subjects.find(image, sample.subject.words)
            extraction = "not found" if match is None else "found"
            image = image if match is None else metrics.cut_out(image, *match)
        else:
            return None
        for name, encoder in self._encoders.similarities.items():
            vectors = encoder.embed_images([image, reference])
            values[metrics.SUBJECT + name] = float(vectors[0] @ vectors[1])
        return extraction

    def _embedded(self, name: str, image: AnyImageFile) -> NDArray[np.float32]:
        """The vector of an image that others are compared with."""
        if (name, image) not in self._cache:
            if len(self._cache) >= CACHED_IMAGES:
                self._cache.pop(next(iter(self._cache)))
            (self._cache[name, image],) = self._encoders.similarities[name].embed_images([image.open()])
        return self._cache[name, image]


class ScoresFile:
    """Scores as JSON lines behind a line that says what they depend on."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Open the file, or begin it anew where it is of other encoders.

        Args:
            path: The file.
            header: `benchmark` and `results`, which have to be the same, and whatever else the scores depend on.

        Raises:
            InputError: It holds scores of another benchmark or other results, or something else.
        """
        self._path = path
        self.scores: dict[str, Score] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        except UnicodeDecodeError as error:
            raise InputError(f"{path} holds no scores ({error}); remove it, or give another --out") from error
        before = _parsed(lines[0]) if lines else None
        if isinstance(before, dict):
            for name in ("benchmark", "results"):
                if before.get(name) != header[name]:
                    raise InputError(f"{path} holds scores of another {name}; give another --out")
        if before == header:
            for line in lines[1:]:
                content = _parsed(line)
                if content is not None:  # the last line of a run that was killed may be cut
                    score = validate(Score, content, str(path))
                    self.scores[score.image] = score
        with atomic_file(path) as file:
            current = [json.dumps(header), *(json.dumps(asdict(score)) for score in self.scores.values())]
            file.write_text("".join(f"{line}\n" for line in current), encoding="utf-8")

    def is_current(self, name: str, path: Path, sample: BenchmarkSample) -> bool:
        """Whether an image was measured, and it and its sample's masks are still the same."""
        score = self.scores.get(name)
        if score is None or score.sha256 != sha256(path.read_bytes()).hexdigest():
            return False
        return not score.notes if score.masks == "" else score.masks == _masks_digest(sample)

    def add(self, score: Score) -> None:
        """Write a score down at once."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(score)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.scores[score.image] = score


def _masks_digest(sample: BenchmarkSample) -> str | None:
    """Of the files of a sample's masks; None where there are none. Without a mask a metric is missing, nothing else."""
    digest = None
    for mask in (sample.mask, sample.subject and sample.subject.mask):
        if mask is not None:
            with suppress(OSError):  # the note has the reason
                digest = sha256((digest or "").encode() + mask.path.read_bytes()).hexdigest()
    return digest


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
