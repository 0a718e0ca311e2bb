"""Metrics of samples and of kinds of samples, and the thresholds that a kind has to reach.

A model is limited by its VAE, so results are compared with the ground truth's reconstruction by the VAE.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from engines.interface import to_numpy
from mige_rt.pipeline import MigePipeline
from mige_rt.postprocessing import to_image
from mige_rt.preprocessing import vae_pixels
from trainer.evaluate.identity import Gallery, flattened
from trainer.evaluate.intervals import Estimate, estimate
from trainer.evaluate.metrics import mean_squared_error, psnr, within
from trainer.synthetic.sample import Sample
from trainer.synthetic.tasks import KINDS

# Of 255, in every channel. An edit has to be recognizable: a colour word covers a range of 10 levels each way.
EDITED_TOLERANCE = 24
KEPT_TOLERANCE = 8

EVALUATED_KINDS = (*KINDS, "another_ground")  # the last is the README's first example: no place is named
SUBJECT_KINDS = ("add", "replace", "generate")  # a subject comes from a reference image, to a place of its own
COVERED, COVERED_OF_KIND = (
    1 / 2,
    {"recolour": 3 / 4, "recolour_subject": 3 / 4, "remove": 3 / 4, "move": 0.3, "resize": 0.3},
)
KEPT = 0.95
TIMES_CHANCE, OF_TRUTH, OF_TRUTH_IN_PLACE = 20, 1 / 3, 1 / 2
ABOVE_FLAT = 6.0  # dB, where the subject stays at its place
VAE_BATCH = 8  # images that the VAE is given at once, if the engine takes as many


@dataclass(frozen=True, kw_only=True)
class SampleMetrics:
    """The metrics of one sample. Most are mappings from the image that is measured to its value.

    The keys: `result`, the model's image; `truth`, the ground truth; `vae`, the ground truth's reconstruction by the
    VAE; `source`, the unchanged source (its reconstruction, where pixels are compared); `flat`, the ground truth with
    its subject in one colour, the mean, so that only shape and mean colour tell what it is.

    Attributes:
        error: Mean squared error against the ground truth, in squared levels of 255.
        psnr: The same as PSNR, in dB.
        edited: Number of pixels that the instruction changes.
        right: How many of those agree with the reconstructed ground truth.
        untouched: Number of pixels that the instruction leaves alone.
        kept: How many of those agree with the reconstructed ground truth.
        asked: Number of visible subjects that the instruction brings in or changes.
        found: How many of those are recognized.
        subject_psnr: PSNR inside the masks of those, in dB; without keys where there are none.
    """

    error: Mapping[str, float]
    psnr: Mapping[str, float]
    edited: int
    right: Mapping[str, int]
    untouched: int
    kept: Mapping[str, int]
    asked: int
    found: Mapping[str, int]
    subject_psnr: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class KindMetrics:
    """The metrics of one kind of samples; mappings have SampleMetrics' keys, without those of no meaning for the kind.

    Attributes:
        samples: Number of samples.
        error: Mean over samples, in squared levels of 255.
        psnr: Mean over samples, in dB.
        covered: The share of the distance in error from the source to the reconstructed ground truth that the result
            covers.
        right: Share of all edited pixels.
        kept: Share of all untouched pixels.
        asked: Number of subjects asked for.
        found: Share of the subjects asked for.
        found_beyond_flat: The share of the result less that of the truth in one colour.
        subject_psnr: Mean over samples with subjects asked for, in dB.
        beyond_flat: The subject_psnr of the result less that of the truth in one colour, in dB.
    """

    samples: int
    error: Mapping[str, Estimate]
    psnr: Mapping[str, Estimate]
    covered: Estimate | None
    right: Mapping[str, Estimate]
    kept: Mapping[str, Estimate]
    asked: int
    found: Mapping[str, Estimate]
    found_beyond_flat: Estimate | None
    subject_psnr: Mapping[str, Estimate]
    beyond_flat: Estimate | None


@dataclass(frozen=True)
class Threshold:
    """What a metric of a kind has to reach.

    Attributes:
        kind: Of samples.
        metric: In words.
        value: None where it cannot be computed.
        required: The least value that passes; with `exclusive`, it has to be more.
        unit: A share or dB.
        exclusive: Whether reaching `required` is not enough.
    """

    kind: str
    metric: str
    value: float | None
    required: float
    unit: Literal["share", "dB"] = "share"
    exclusive: bool = False

    @property
    def met(self) -> bool:
        """Whether the value reaches what is required."""
        if self.value is None:
            return False
        return self.value > self.required if self.exclusive else self.value >= self.required


def reconstruct(pipe: MigePipeline, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Encode and decode images by the engine's VAE.

    Args:
        pipe: The model.
        images: uint8 [side,side,3].

    Returns:
        As many images of the same size.
    """
    reconstructions = []
    batch_size = min(VAE_BATCH, pipe.max_batch_size)
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        pixels = np.stack([vae_pixels(Image.fromarray(p), p.shape[1], p.shape[0], "crop") for p in batch])
        encoded = pipe.engine.run("vae_encoder", {"pixels_vae": pipe.engine.array(pixels)})
        decoded = pipe.engine.run("vae_decoder", {"latents": encoded["latent_mean"]})
        reconstructions += [np.asarray(to_image(image)) for image in to_numpy(decoded["pixels"])]
    return reconstructions


def measure(
    sample: Sample,
    result: np.ndarray,
    truth_vae: np.ndarray,
    source_vae: np.ndarray | None,
    gallery: Gallery,
    *,
    baselines: bool = True,
) -> SampleMetrics:
    """The metrics of one sample.

    Args:
        sample: With its ground truth.
        result: The model's image, uint8 [side,side,3].
        truth_vae: The ground truth's reconstruction, uint8 [side,side,3].
        source_vae: The source's reconstruction, uint8 [side,side,3]; None leaves out what is compared with it.
        gallery: The concepts among which subjects are looked up.
        baselines: Look subjects up in the ground truth, its reconstruction and the source, too, not just in the result.
    """
    images = {"result": result, "vae": truth_vae} | ({} if sample.source is None else {"source": sample.source})
    reconstructions = {"result": result} | ({} if source_vae is None else {"source": source_vae})
    looked_up = {"truth": sample.target, **images} if baselines else {"result": result}
    marks = [sample.after[i] for i in sample.asked if sample.after[i].box is not None]
    recognized = {name: sum(gallery.recognizes(image, mark) for mark in marks) for name, image in looked_up.items()}
    compared = dict(images)
    if baselines:
        compared["flat"] = sample.target
        for mark in marks:
            compared["flat"] = flattened(compared["flat"], mark.mask)
        recognized["flat"] = sum(gallery.recognizes(compared["flat"], mark) for mark in marks)
    subjects = np.any([mark.mask for mark in marks], axis=0) if marks else None
    edited, untouched = sample.changed, ~sample.changed
    return SampleMetrics(
        error={name: mean_squared_error(image, sample.target) for name, image in images.items()},
        psnr={name: psnr(image, sample.target) for name, image in images.items()},
        edited=int(edited.sum()),
        right={n: int(within(i, truth_vae, EDITED_TOLERANCE)[edited].sum()) for n, i in reconstructions.items()},
        untouched=int(untouched.sum()),
        kept={n: int(within(i, truth_vae, KEPT_TOLERANCE)[untouched].sum()) for n, i in reconstructions.items()},
        asked=len(marks),
        found=recognized,
        subject_psnr={}
        if subjects is None
        else {name: psnr(image[subjects], sample.target[subjects]) for name, image in compared.items()},
    )


def summarize(measured: Sequence[SampleMetrics]) -> KindMetrics:
    """The metrics of a kind, from those of its samples: one or more, all of that kind."""

    def over_samples(metric: str, denominator: str | None = None) -> dict[str, Estimate]:
        totals = None if denominator is None else [getattr(m, denominator) for m in measured]
        names = getattr(measured[0], metric)
        estimates = {name: estimate([getattr(m, metric)[name] for m in measured], totals) for name in names}
        return {name: value for name, value in estimates.items() if value is not None}

    with_subjects = [m.subject_psnr for m in measured if m.subject_psnr]
    covered = None
    if "source" in measured[0].error:
        covered = estimate(
            [m.error["source"] - m.error["result"] for m in measured],
            [m.error["source"] - m.error["vae"] for m in measured],
        )
    return KindMetrics(
        samples=len(measured),
        error=over_samples("error"),
        psnr=over_samples("psnr"),
        covered=covered,
        right=over_samples("right", "edited"),
        kept=over_samples("kept", "untouched"),
        asked=sum(m.asked for m in measured),
        found=over_samples("found", "asked"),
        found_beyond_flat=estimate([m.found["result"] - m.found["flat"] for m in measured], [m.asked for m in measured])
        if "flat" in measured[0].found
        else None,
        subject_psnr={name: e for name in with_subjects[0] if (e := estimate([p[name] for p in with_subjects]))}
        if with_subjects
        else {},
        beyond_flat=estimate([p["result"] - p["flat"] for p in with_subjects])
        if with_subjects and "flat" in with_subjects[0]
        else None,
    )


def thresholds(kind: str, metrics: KindMetrics, chance: float) -> list[Threshold]:
    """What a kind has to reach.

    Args:
        kind: Of samples.
        metrics: Of that kind.
        chance: Probability of recognizing a subject by chance. Where TIMES_CHANCE times that is more than 1, every
            subject has to be recognized.
    """
    kind_thresholds = []
    if "source" in metrics.error:
        required = COVERED_OF_KIND.get(kind, COVERED)
        kind_thresholds.append(Threshold(kind, "distance covered", metrics.covered and metrics.covered.value, required))
    if "result" in metrics.kept:
        kind_thresholds.append(Threshold(kind, "untouched pixels kept", metrics.kept["result"].value, KEPT))
    if kind in SUBJECT_KINDS and metrics.found:
        result, truth = metrics.found["result"].value, metrics.found["truth"].value
        by_chance = min(TIMES_CHANCE * chance, 1.0)
        kind_thresholds += [
            Threshold(kind, f"subjects found, {TIMES_CHANCE} times chance", result, by_chance),
            Threshold(kind, "subjects found, a third of the ground truth's", result, OF_TRUTH * truth),
        ]
        beyond = metrics.found_beyond_flat
        if beyond is not None:
            metric = "subjects found more often than in one colour, lower end of the interval"
            kind_thresholds.append(Threshold(kind, metric, beyond.low, 0, exclusive=True))
    if kind == "another_ground" and metrics.found:
        result, truth = metrics.found["result"].value, metrics.found["truth"].value
        beyond = metrics.beyond_flat and metrics.beyond_flat.value
        kind_thresholds += [
            Threshold(kind, "subjects found, half of the ground truth's", result, OF_TRUTH_IN_PLACE * truth),
            Threshold(kind, "PSNR of subjects beyond that of one colour", beyond, ABOVE_FLAT, "dB"),
        ]
    return kind_thresholds
