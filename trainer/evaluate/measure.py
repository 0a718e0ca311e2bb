"""What is measured of each sample, and the figures of a kind of samples with the bars that they have to pass.

A model is limited by its VAE, so results are compared with the ground truth's own round trip through it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from engines.interface import to_numpy
from mige_rt.pipeline import MigePipeline
from mige_rt.postprocessing import to_image
from mige_rt.preprocessing import vae_pixels
from trainer.evaluate.identity import Gallery, flattened
from trainer.evaluate.metrics import Estimate, estimate, psnr, squared_error, within
from trainer.synthetic.sample import Sample

# Of 255, in every channel. An edit has to be recognisable: a colour word covers a range of 10 levels each way.
EDITED_TOLERANCE = 24
KEPT_TOLERANCE = 8

SUBJECT_KINDS = ("add", "replace", "generate")  # a subject comes in from a picture of its own
EASIER_KINDS = ("recolour", "recolour_subject", "remove")
COVERED, COVERED_EASIER = 1 / 2, 3 / 4
KEPT = 0.95
TIMES_CHANCE, OF_TRUTH = 20, 1 / 3
ENCODED = 8  # pictures that the VAE is given at once, where it takes as many


@dataclass(frozen=True)
class Measured:
    """One sample's figures, some of them by what is looked at.

    result: the model's picture; truth: the ground truth; vae: the ground truth through the VAE; source: the picture to
    edit, left as it is (pixels are compared after the VAE); flat: the ground truth, its subject in its mean colour, so
    that nothing but its shape and that colour tells what it is.

    error, psnr: against the ground truth. right, kept: numbers of pixels, of those `edited` and those `untouched`.
    found: how many subjects, of those `asked`, that the instruction brings in or changes.
    """

    error: Mapping[str, float]
    psnr: Mapping[str, float]
    edited: int
    right: Mapping[str, int]
    untouched: int
    kept: Mapping[str, int]
    asked: int
    found: Mapping[str, int]


@dataclass(frozen=True)
class Figures:
    """The figures of one kind, by what is looked at as in Measured; without those that make no sense for it.

    error: squared levels of 255; psnr: dB, the mean over samples. covered: the share of the distance in error from the
    source to the ground truth through the VAE that the result covers. right, kept, found: shares of all edited pixels,
    untouched pixels, and subjects asked for. asked: how many those were.
    """

    samples: int
    error: Mapping[str, Estimate]
    psnr: Mapping[str, Estimate]
    covered: Estimate | None
    right: Mapping[str, Estimate]
    kept: Mapping[str, Estimate]
    asked: int
    found: Mapping[str, Estimate]


@dataclass(frozen=True)
class Bar:
    """What a figure of a kind has to reach; figure is None where it cannot be computed."""

    kind: str
    what: str
    figure: float | None
    needed: float

    @property
    def met(self) -> bool:
        return self.figure is not None and self.figure >= self.needed


def through_vae(pipe: MigePipeline, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """uint8 [side,side,3] pictures as the engine's VAE gives them back."""
    made = []
    at_once = min(ENCODED, pipe.max_batch_size)
    for first in range(0, len(pictures), at_once):
        batch = pictures[first : first + at_once]
        pixels = np.stack([vae_pixels(Image.fromarray(p), p.shape[1], p.shape[0], "crop") for p in batch])
        encoded = pipe.engine.run("vae_encoder", {"pixels_vae": pipe.engine.array(pixels)})
        decoded = pipe.engine.run("vae_decoder", {"latents": encoded["latent_mean"]})
        made += [np.asarray(to_image(picture)) for picture in to_numpy(decoded["pixels"])]
    return made


def measure(
    sample: Sample,
    result: np.ndarray,
    truth_vae: np.ndarray,
    source_vae: np.ndarray | None,
    gallery: Gallery,
    baselines: bool = True,
) -> Measured:
    """result, truth_vae, source_vae: uint8 [side,side,3], the model's picture, and the ground truth and the source
    through the VAE. gallery: the concepts among which subjects are looked for, in the result alone without
    baselines."""
    plain = {"result": result, "vae": truth_vae} | ({} if sample.source is None else {"source": sample.source})
    coded = {"result": result} | ({} if source_vae is None else {"source": source_vae})
    looked_at = {"truth": sample.target, **plain} if baselines else {"result": result}
    marks = [sample.after[i] for i in sample.asked if sample.after[i].box is not None]
    found = {name: sum(gallery.found(picture, mark) for mark in marks) for name, picture in looked_at.items()}
    if baselines:
        found["flat"] = sum(gallery.found(flattened(sample.target, mark.mask), mark) for mark in marks)
    return Measured(
        error={name: squared_error(picture, sample.target) for name, picture in plain.items()},
        psnr={name: psnr(picture, sample.target) for name, picture in plain.items()},
        edited=int(sample.changed.sum()),
        right={n: int(within(p, truth_vae, EDITED_TOLERANCE)[sample.changed].sum()) for n, p in coded.items()},
        untouched=int((~sample.changed).sum()),
        kept={n: int(within(p, truth_vae, KEPT_TOLERANCE)[~sample.changed].sum()) for n, p in coded.items()},
        asked=len(marks),
        found=found,
    )


def figures(measured: Sequence[Measured]) -> Figures:
    """The figures of the samples of one kind."""

    def over(field: str, among: str | None = None) -> dict[str, Estimate]:
        below = None if among is None else [getattr(m, among) for m in measured]
        names = getattr(measured[0], field)
        estimates = {name: estimate([getattr(m, field)[name] for m in measured], below) for name in names}
        return {name: found for name, found in estimates.items() if found is not None}

    covered = None
    if "source" in measured[0].error:
        covered = estimate(
            [m.error["source"] - m.error["result"] for m in measured],
            [m.error["source"] - m.error["vae"] for m in measured],
        )
    return Figures(
        samples=len(measured),
        error=over("error"),
        psnr=over("psnr"),
        covered=covered,
        right=over("right", "edited"),
        kept=over("kept", "untouched"),
        asked=sum(m.asked for m in measured),
        found=over("found", "asked"),
    )


def bars(kind: str, of_kind: Figures, chance: float) -> list[Bar]:
    """What a kind has to reach. chance: of finding a subject first; where it leaves no room for TIMES_CHANCE, every
    subject has to be found."""
    made = []
    if "source" in of_kind.error:
        needed = COVERED_EASIER if kind in EASIER_KINDS else COVERED
        made.append(Bar(kind, "distance covered", of_kind.covered and of_kind.covered.value, needed))
    if "result" in of_kind.kept:
        made.append(Bar(kind, "untouched pixels kept", of_kind.kept["result"].value, KEPT))
    if kind in SUBJECT_KINDS and of_kind.found:
        found, truth = of_kind.found["result"].value, of_kind.found["truth"].value
        made.append(Bar(kind, f"found first, {TIMES_CHANCE} times chance", found, min(TIMES_CHANCE * chance, 1.0)))
        made.append(Bar(kind, "found first, a third of the ground truth", found, OF_TRUTH * truth))
    return made
