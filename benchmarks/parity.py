"""How far one engine's images are from another's, from the same noise; and each graph by itself, on equal inputs."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from skimage.metrics import structural_similarity

from engines.interface import Array, Engine, to_numpy
from export import validate
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, GraphName, TensorSpec
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams
from trainer.evaluate.metrics import psnr

OnProgress = Callable[[str, int, int], None]
Requests = Mapping[str, ResolvedRequest]
Pair = tuple[NDArray[Any], NDArray[Any]]

# Least structural similarity of the images. Measured on the default model on a CPU, the lowest of 24 images of 20
# steps: fp32 1.0000, fp16 0.9995, bf16 0.9970, int8 0.9964.
SSIM: Mapping[str, float] = {"fp32": 0.999, "fp16": 0.99, "bf16": 0.95, "int8": 0.95, "fp8": 0.95, "int8-sq": 0.95}


@dataclass(frozen=True)
class Tolerance:
    """What two engines may differ by: relative RMS errors at most, PSNR (dB) and structural similarity at least."""

    graph: float
    latents: float
    psnr: float
    ssim: float


def tolerance(*precisions: str) -> Tolerance:
    """The widest of some precisions' tolerances: those that exports are validated by (`export.validate`), and SSIM."""
    errors = (max(limits[p] for p in precisions) for limits in (validate.TOLERANCES, validate.LATENT_TOLERANCES))
    similarities = (min(limits[p] for p in precisions) for limits in (validate.MIN_PSNR, SSIM))
    return Tolerance(*errors, *similarities)


@dataclass(frozen=True)
class Metric:
    """The worst of one metric over all images. limit: empty where it is not judged; at: the image that it is of."""

    name: str
    value: float
    text: str
    limit: str
    at: str
    ok: bool


def _relative_error(name: str, value: float, at: str, limit: float) -> Metric:
    text = f"{value:.1e}" if isfinite(value) else "not finite"
    return Metric(name, value, text, f"at most {limit:.2g}", at, value <= limit)


@dataclass(frozen=True)
class ImageErrors:
    """What is not finite, or of another shape, has infinite errors."""

    latents: float  # relative RMS error of the final ones
    psnr: float  # dB
    ssim: float
    max_difference: int  # of a pixel's channel, of 255

    @staticmethod
    def of(latents: Pair, images: Sequence[Pair]) -> "ImageErrors":
        """The worst over a batch of images uint8 [H,W,3]; each of a pair with what was expected in its place."""
        differences = (np.abs(a.astype(np.int16) - b.astype(np.int16)).max() for a, b in images)
        rms, psnrs = validate.measure(*latents)[0], (psnr(a, b) for a, b in images)
        return ImageErrors(rms, min(psnrs), min(_ssim(a, b) for a, b in images), int(max(differences)))

    @property
    def decibels(self) -> str:
        return f"{self.psnr:.1f} dB" if self.max_difference else "no difference"

    def metrics(self, limits: Tolerance, at: str = "") -> list[Metric]:
        latents = _relative_error("final latents", self.latents, at, limits.latents)
        psnr = Metric("PSNR", self.psnr, self.decibels, f"at least {limits.psnr:g}", at, self.psnr >= limits.psnr)
        ssim, limit = f"{self.ssim:.4f}", f"at least {limits.ssim:g}"
        return [latents, psnr, Metric("SSIM", self.ssim, ssim, limit, at, self.ssim >= limits.ssim)]


@dataclass(frozen=True)
class GraphError:
    """The relative error of one output of a graph over its calls for one image."""

    graph: str
    output: str
    rms: float  # of all calls together
    worst: float  # of the worst call by itself, which for the denoiser is a step with a small prediction
    calls: int


@dataclass(frozen=True)
class ImageParity:
    """One image by both engines."""

    name: str  # the request's
    prompt: str
    task: str
    seed: int
    graphs: tuple[GraphError, ...]
    errors: ImageErrors
    reference: Image
    candidate: Image

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def metrics(self, limits: Tolerance) -> list[Metric]:
        at, largest = self.title, self.errors.max_difference
        of_graphs = [_relative_error(f"{g.graph}: {g.output}", g.rms, at, limits.graph) for g in self.graphs]
        difference = Metric("largest pixel difference, of 255", largest, f"{largest}", "", at, True)
        return [*of_graphs, *self.errors.metrics(limits, at), difference]

    def to_json(self) -> dict[str, Any]:
        """Without the images."""
        about = {"name": self.name, "prompt": self.prompt, "task": self.task, "seed": self.seed}
        return {**about, **asdict(self.errors), "graphs": [asdict(error) for error in self.graphs]}


def same_sizes(config: ModelConfig, other: ModelConfig) -> bool:
    """Whether models differ in name and defaults alone."""
    return config == dataclasses.replace(other, name=config.name, defaults=config.defaults)


def engine_id(pipe: MigePipeline) -> dict[str, str]:
    """What is compared: the model's name, and the engine that runs it."""
    engine = pipe.engine
    return {"model": pipe.model_name, "engine": engine.name, "device": engine.device, "precision": engine.precision}


@dataclass(frozen=True)
class Parity:
    """A comparison. requested: how many images it was to have; fewer were made where it was interrupted."""

    reference: Mapping[str, str]  # see engine_id
    candidate: Mapping[str, str]
    requested: int
    images: tuple[ImageParity, ...]

    @property
    def tolerance(self) -> Tolerance:
        return tolerance(self.reference["precision"], self.candidate["precision"])

    @property
    def metrics(self) -> list[Metric]:
        """The worst of every metric over the images: each graph's outputs, the final latents, the images."""
        columns: dict[str, list[Metric]] = {}
        for metric in (metric for image in self.images for metric in image.metrics(self.tolerance)):
            columns.setdefault(metric.name, []).append(metric)  # a prompt without images runs no image encoder
        similar = ("PSNR", "SSIM")  # of which less is worse
        return [max(column, key=lambda m: -m.value if m.name in similar else m.value) for column in columns.values()]

    @property
    def ok(self) -> bool:
        """Whether every metric is within its tolerance, of the images that were made."""
        return all(metric.ok for metric in self.metrics)

    @property
    def complete(self) -> bool:
        return len(self.images) == self.requested

    @property
    def verdict(self) -> str:
        """In a sentence, with the metrics that are out of tolerance."""
        failed = [metric.name for metric in self.metrics if not metric.ok]
        engines = (self.candidate, self.reference)
        candidate, reference = ("{engine} on {device} in {precision} ({model})".format(**one) for one in engines)
        text = f"{candidate} is {'not ' if failed else ''}what {reference} computes"
        text += f": out of tolerance are {', '.join(failed)}" if failed else ""
        return text if self.complete else f"{text} (incomplete: it was interrupted)"

    def to_json(self) -> dict[str, Any]:
        """Without the images."""
        names = ("reference", "candidate", "requested", "complete", "ok", "verdict")
        lists = {"metrics": [asdict(metric) for metric in self.metrics], "images": [i.to_json() for i in self.images]}
        return {**{name: getattr(self, name) for name in names}, "tolerance": asdict(self.tolerance), **lists}


def compare_pipelines(
    reference: MigePipeline,
    candidate: MigePipeline,
    requests: Requests,
    seeds: int,
    *params: SamplingParams,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Parity:
    """Make each request's images by both engines, from the same noise. Ctrl-C keeps images that were compared, if any.

    Args:
        reference: What is compared with, whose defaults fill in what the parameters leave open.
        candidate: What is compared.
        requests: By name.
        seeds: How many images of each: of its own seed and those after it.
        *params: Of both; or of the reference, then of the candidate.
        on_progress: Is told how many images are done.

    Raises:
        InputError: The models' sizes differ, or either cannot make an image.
    """
    images, total = list[ImageParity](), len(requests) * seeds
    try:
        on_progress("images", 0, total)
        for image in _compare_each(reference, candidate, requests, seeds, params):
            images.append(image)
            on_progress("images", len(images), total)
    except KeyboardInterrupt:
        if not images:
            raise
    return Parity(engine_id(reference), engine_id(candidate), total, tuple(images))


def _compare_each(
    reference: MigePipeline, candidate: MigePipeline, requests: Requests, seeds: int, params: Sequence[SamplingParams]
) -> Iterator[ImageParity]:
    if not same_sizes(reference.config, candidate.config):
        raise InputError(
            f"{reference.model_name} and {candidate.model_name} are models of different sizes; give two of one model"
        )
    for name, request in requests.items():
        # So that both models sample alike, whatever their own defaults.
        complete = [SamplingParams(**vars(each.with_defaults(reference.config, request.task))) for each in params]
        for seed in range(request.seed, request.seed + seeds):
            seeded = dataclasses.replace(request, seed=seed)
            latents, image = validate.make_watched(candidate, seeded, complete[-1])
            if candidate.engine.max_cuda_graphs and np.isfinite(latents).all():
                (image,) = candidate.generate([seeded], complete[-1])  # with CUDA graphs, which cannot be traced
            both = _BothEngines(candidate.engine)
            same = candidate.engine is reference.engine  # two sets of parameters are compared, the graphs are the same
            hook = () if same else (both.run,)
            expected, truth = validate.make_watched(reference, seeded, complete[0], *hook)
            if image.size != truth.size:
                raise InputError(f"the images of {name} have the sizes {image.size} and {truth.size}; give one size")
            errors = ImageErrors.of((latents, expected), [(np.asarray(image), np.asarray(truth))])
            yield ImageParity(name, request.prompt, request.task, seed, both.graph_errors(), errors, truth, image)


class _BothEngines:
    """Makes every call of the reference's engine to the candidate's as well, with the same inputs."""

    def __init__(self, candidate: Engine) -> None:
        self.candidate = candidate
        self.errors: dict[tuple[GraphName, str], list[tuple[float, float]]] = {}  # of each call, and the output's norm

    def run(self, graph: Any, inputs: Mapping[str, Array], run: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        outputs = run()
        given = {spec.name: self.candidate.array(_as_spec(spec, inputs[spec.name])) for spec in GRAPHS[graph].inputs}
        results = self.candidate.run(graph, given)
        for spec in GRAPHS[graph].outputs:
            expected = _as_spec(spec, outputs[spec.name])
            rms, _, _ = validate.measure(_as_spec(spec, results[spec.name]), expected)
            norm = float(np.linalg.norm(expected.astype(np.float64)))
            self.errors.setdefault((graph, spec.name), []).append((rms, norm or 1.0))
        return outputs

    def graph_errors(self) -> tuple[GraphError, ...]:
        graphs = []
        for output, calls in self.errors.items():
            errors, norms = np.array(calls).T
            rms = float(np.linalg.norm(errors * norms) / np.linalg.norm(norms))
            graphs.append(GraphError(*output, rms, float(errors.max()), len(calls)))
        return tuple(graphs)


def _as_spec(spec: TensorSpec, values: Array) -> NDArray[Any]:
    """A NumPy array of the spec's type: graphs hand bfloat16 to each other, which NumPy does not have."""
    tensor: Any = values
    widened = spec.dtype == "float32" and not isinstance(values, np.ndarray)
    return to_numpy(tensor.float() if widened else tensor).astype(spec.dtype, copy=False)


def _ssim(image: NDArray[Any], truth: NDArray[Any]) -> float:
    """Structural similarity of two uint8 images [H,W,3] (Wang et al. 2004, windows of 7 x 7)."""
    return float(np.mean(structural_similarity(image, truth, channel_axis=-1, data_range=255)))
