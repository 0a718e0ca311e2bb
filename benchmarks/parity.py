"""How far one engine's pictures are from another's, from the same noise: per graph, in the latents, in the pictures.

Every graph is compared by itself, on what it is really given while the reference makes a picture, so that an error
shows where it is made and not only where it ends up.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image as Picture

from benchmarks.tolerance import Figure, Tolerance, at_least, at_most, finite, shown, tolerance
from engines.interface import Array, Engine, to_numpy
from export.validate import make_watched, measure
from mige_rt.errors import InputError, NotAvailableError
from mige_rt.graphs import GRAPHS, TensorSpec
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams
from trainer.evaluate.metrics import psnr


@dataclass(frozen=True)
class Side:
    """What was compared: the model's name, and the engine that ran it."""

    model: str
    engine: str
    device: str
    precision: str

    @staticmethod
    def of(pipe: MigePipeline) -> "Side":
        return Side(pipe.model_name, pipe.engine.name, pipe.engine.device, pipe.engine.precision)

    def __str__(self) -> str:
        return f"{self.engine} on {self.device} in {self.precision} ({self.model})"


@dataclass(frozen=True)
class GraphError:
    """The error of one output of a graph over its calls for one picture.

    rms: of all calls together, relative to what the reference gave; worst: of the worst call by itself, which for the
    denoiser is a step with a small prediction.
    """

    graph: str
    output: str
    rms: float
    worst: float
    calls: int


@dataclass(frozen=True)
class PictureParity:
    """One picture by both engines. name: the request's; largest: the largest difference of a pixel's channel, of 255.

    What is not finite, or of another shape, has infinite errors.
    """

    name: str
    prompt: str
    task: str
    seed: int
    graphs: tuple[GraphError, ...]
    latents: float  # relative RMS error of the final latents
    psnr: float  # dB
    similarity: float  # SSIM
    largest: int
    reference: Picture
    candidate: Picture

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def decibels(self) -> str:
        """The PSNR in words."""
        return f"{self.psnr:.1f} dB" if self.max else "no difference"

    def to_json(self) -> dict[str, Any]:
        """Without the pictures; an infinite error is null."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["reference"], fields["candidate"]
        graphs = [{**vars(error), "rms": finite(error.rms), "worst": finite(error.worst)} for error in self.graphs]
        return {**fields, "graphs": graphs, "latents": finite(self.latents)}


@dataclass(frozen=True)
class Parity:
    """A comparison. asked: how many pictures it was to have; fewer were made where it was interrupted."""

    reference: Side
    candidate: Side
    asked: int
    pictures: tuple[PictureParity, ...]

    @property
    def tolerance(self) -> Tolerance:
        return tolerance(self.reference.precision, self.candidate.precision)

    @property
    def complete(self) -> bool:
        return len(self.pictures) == self.asked

    @property
    def figures(self) -> list[Figure]:
        """The worst of every figure over the pictures: each graph's outputs, the final latents, the pictures."""
        limits = self.tolerance
        errors: dict[str, list[tuple[float, str]]] = {}
        for picture in self.pictures:
            for error in picture.graphs:
                errors.setdefault(f"{error.graph}: {error.output}", []).append((error.rms, picture.title))
        faintest = min(self.pictures, key=lambda p: p.psnr)
        strangest = min(self.pictures, key=lambda p: p.similarity)
        return [
            *(at_most(what, *max(found), limits.graph) for what, found in errors.items()),
            at_most("final latents", *max((p.latents, p.title) for p in self.pictures), limits.latents),
            at_least("PSNR", faintest.psnr, faintest.title, limits.psnr, faintest.decibels),
            at_least("SSIM", strangest.similarity, strangest.title, limits.similarity, f"{strangest.similarity:.4f}"),
            shown("largest pixel difference, of 255", *max((p.max, p.title) for p in self.pictures)),
        ]

    @property
    def ok(self) -> bool:
        """Whether every figure is within its tolerance, of the pictures that were made."""
        return all(figure.ok for figure in self.figures)

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": vars(self.reference),
            "candidate": vars(self.candidate),
            "tolerance": vars(self.tolerance),
            "ok": self.ok,
            "complete": self.complete,
            "asked": self.asked,
            "figures": [figure.to_json() for figure in self.figures],
            "pictures": [picture.to_json() for picture in self.pictures],
        }


def compare_pipelines(
    reference: MigePipeline,
    candidate: MigePipeline,
    requests: Mapping[str, ResolvedRequest],
    seeds: int,
    settings: SamplingParams,
    candidate_settings: SamplingParams | None = None,
) -> Parity:
    """All of `compare_each`, as one comparison."""
    pictures = tuple(compare_each(reference, candidate, requests, seeds, settings, candidate_settings))
    return Parity(Side.of(reference), Side.of(candidate), len(requests) * seeds, pictures)


def compare_each(
    reference: MigePipeline,
    candidate: MigePipeline,
    requests: Mapping[str, ResolvedRequest],
    seeds: int,
    settings: SamplingParams,
    candidate_settings: SamplingParams | None = None,
) -> Iterator[PictureParity]:
    """Make each request's pictures, of its own seed and the `seeds` - 1 after it, by both, from the same noise.

    settings: as the reference has them; candidate_settings: the candidate's, where they are what is compared. What
    either leaves open is filled in by the reference's defaults. Raises InputError when the two models' sizes differ,
    scikit-image is missing, or either cannot make a picture.
    """
    similarity = load_similarity()
    sizes = [dataclasses.replace(p.config, name="", defaults=candidate.config.defaults) for p in (reference, candidate)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{reference.model_name} and {candidate.model_name} are models of different sizes; give two of one model"
        )
    for name, request in requests.items():
        own = reference.complete(settings, request.task)
        theirs = reference.complete(candidate_settings or settings, request.task)
        for seed in range(request.seed, request.seed + seeds):
            chosen = dataclasses.replace(request, seed=seed)
            latents, made = make_watched(candidate, chosen, theirs)
            if candidate.engine.max_cuda_graphs and np.isfinite(latents).all():
                (made,) = candidate.make([chosen], theirs)  # with captured steps, which cannot be watched
            both = _Both(candidate.engine)
            same = candidate.engine is reference.engine  # two settings are compared, the graphs are the same
            expected, truth = make_watched(reference, chosen, own, *(() if same else (both.run,)))
            a, b = np.asarray(made), np.asarray(truth)
            if a.shape != b.shape:
                raise InputError(f"the pictures of {name} have the sizes {made.size} and {truth.size}; give one size")
            yield PictureParity(
                name,
                request.prompt,
                request.task,
                seed,
                both.graph_errors(),
                measure(latents, expected)[0],
                psnr(a, b),
                similarity(a, b),
                int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max()),
                truth,
                made,
            )


class _Both:
    """Makes every call of the reference's engine to the candidate's as well, with the same inputs."""

    def __init__(self, candidate: Engine) -> None:
        self.candidate = candidate
        self.errors: dict[tuple[str, str], list[tuple[float, float]]] = {}  # of each call, and the output's norm

    def run(self, graph: str, inputs: Mapping[str, Array], run: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        outputs = run()
        given = {port.name: self.candidate.array(_as_port(port, inputs[port.name])) for port in GRAPHS[graph].inputs}
        theirs = self.candidate.run(graph, given)
        for port in GRAPHS[graph].outputs:
            expected = _as_port(port, outputs[port.name])
            rms, _, _ = measure(_as_port(port, theirs[port.name]), expected)
            norm = float(np.linalg.norm(expected.astype(np.float64)))
            self.errors.setdefault((graph, port.name), []).append((rms, norm or 1.0))
        return outputs

    def graph_errors(self) -> tuple[GraphError, ...]:
        found = []
        for port, calls in self.errors.items():
            errors, norms = np.array(calls).T
            together = float(np.linalg.norm(errors * norms) / np.linalg.norm(norms))
            found.append(GraphError(*port, together, float(errors.max()), len(calls)))
        return tuple(found)


def _as_port(port: TensorSpec, values: Array) -> NDArray[Any]:
    """A NumPy array of the port's own type: what graphs hand to each other may be of the engine's, and NumPy has no
    bfloat16."""
    if port.dtype == "float32" and not isinstance(values, np.ndarray):
        values = values.float()
    return to_numpy(values).astype(port.dtype, copy=False)


def load_similarity() -> Callable[[NDArray[Any], NDArray[Any]], float]:
    """SSIM of two uint8 pictures [H,W,3], by scikit-image (Wang et al. 2004, windows of 7 x 7)."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise NotAvailableError(
            f"comparing pictures needs scikit-image ({error}); install it with: pip install 'mige-rt[bench]'"
        ) from error
    return lambda a, b: float(np.mean(structural_similarity(a, b, channel_axis=-1, data_range=255)))
