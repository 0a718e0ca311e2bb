"""How far one engine's images are from another's, from the same noise: per graph, in the latents, in the images.

Every graph is compared by itself, on what it is really given while the reference makes an image, so that an error
shows where it is made and not only where it ends up.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from engines.interface import Array, Engine, to_numpy
from export import validate
from mige_rt.errors import InputError, NotAvailableError
from mige_rt.graphs import GRAPHS, GraphName, TensorSpec
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams
from trainer.evaluate.metrics import psnr

Requests = Mapping[str, ResolvedRequest]
Pair = tuple[NDArray[Any], NDArray[Any]]

# Least structural similarity of the images. Measured on the default model on a CPU, the lowest of 24 images of 20
# steps: fp32 1.0000, fp16 0.9995, bf16 0.9970, int8 0.9964.
SSIM: Mapping[str, float] = {"fp32": 0.999, "fp16": 0.99, "bf16": 0.95, "int8": 0.95}


@dataclass(frozen=True)
class Tolerance:
    """What two engines may differ by: relative RMS errors at most, PSNR (dB) and structural similarity at least."""

    graph: float
    latents: float
    psnr: float
    ssim: float


def tolerance(*precisions: str) -> Tolerance:
    """The widest of some precisions' tolerances: those that exports are validated by (`export.validate`), and SSIM."""
    return Tolerance(
        max(validate.TOLERANCES[precision] for precision in precisions),
        max(validate.LATENT_TOLERANCES[precision] for precision in precisions),
        min(validate.MIN_PSNR[precision] for precision in precisions),
        min(SSIM[precision] for precision in precisions),
    )


@dataclass(frozen=True)
class Metric:
    """The worst of one metric over all images. limit: empty where it is not judged; at: the image that it is of."""

    name: str
    value: float
    text: str
    limit: str
    at: str
    ok: bool

    @property
    def verdict(self) -> str:
        return "" if not self.limit else "ok" if self.ok else "FAILED"


def relative_error(name: str, value: float, at: str, limit: float) -> Metric:
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
        ssim = load_ssim()
        differences = (np.abs(a.astype(np.int16) - b.astype(np.int16)).max() for a, b in images)
        rms, psnrs = validate.measure(*latents)[0], (psnr(a, b) for a, b in images)
        return ImageErrors(rms, min(psnrs), min(ssim(a, b) for a, b in images), int(max(differences)))

    @property
    def decibels(self) -> str:
        return f"{self.psnr:.1f} dB" if self.max_difference else "no difference"

    def metrics(self, limits: Tolerance, at: str = "") -> list[Metric]:
        psnr_limit, ssim_limit = f"at least {limits.psnr:g}", f"at least {limits.ssim:g}"
        return [
            relative_error("final latents", self.latents, at, limits.latents),
            Metric("PSNR", self.psnr, self.decibels, psnr_limit, at, self.psnr >= limits.psnr),
            Metric("SSIM", self.ssim, f"{self.ssim:.4f}", ssim_limit, at, self.ssim >= limits.ssim),
        ]


@dataclass(frozen=True)
class EngineId:
    """What was compared: the model's name, and the engine that ran it."""

    model: str
    engine: str
    device: str
    precision: str

    @staticmethod
    def of(pipe: MigePipeline) -> "EngineId":
        return EngineId(pipe.model_name, pipe.engine.name, pipe.engine.device, pipe.engine.precision)

    def __str__(self) -> str:
        return f"{self.engine} on {self.device} in {self.precision} ({self.model})"


@dataclass(frozen=True)
class GraphError:
    """The error of one output of a graph over its calls for one image, relative to what the reference gave."""

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
        graphs = [(f"{error.graph}: {error.output}", error.rms) for error in self.graphs]
        of_graphs = [relative_error(name, rms, self.title, limits.graph) for name, rms in graphs]
        largest = self.errors.max_difference
        difference = Metric("largest pixel difference, of 255", largest, f"{largest}", "", self.title, True)
        return [*of_graphs, *self.errors.metrics(limits, self.title), difference]


@dataclass(frozen=True)
class Parity:
    """A comparison. requested: how many images it was to have; fewer were made where it was interrupted."""

    reference: EngineId
    candidate: EngineId
    requested: int
    images: tuple[ImageParity, ...]

    @property
    def tolerance(self) -> Tolerance:
        return tolerance(self.reference.precision, self.candidate.precision)

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

    def to_json(self) -> dict[str, Any]:
        """Without the images."""
        images = [
            {"name": i.name, "prompt": i.prompt, "task": i.task, "seed": i.seed, **asdict(i.errors)}
            | {"graphs": [asdict(error) for error in i.graphs]}
            for i in self.images
        ]
        engines = {"reference": asdict(self.reference), "candidate": asdict(self.candidate)}
        judged = {"tolerance": asdict(self.tolerance), "ok": self.ok, "requested": self.requested}
        return {**engines, **judged, "metrics": [asdict(metric) for metric in self.metrics], "images": images}


def compare_pipelines(
    reference: MigePipeline, candidate: MigePipeline, requests: Requests, seeds: int, *params: SamplingParams
) -> Parity:
    """All of `compare_each`, as one comparison."""
    images = tuple(compare_each(reference, candidate, requests, seeds, *params))
    return Parity(EngineId.of(reference), EngineId.of(candidate), len(requests) * seeds, images)


def compare_each(
    reference: MigePipeline, candidate: MigePipeline, requests: Requests, seeds: int, *params: SamplingParams
) -> Iterator[ImageParity]:
    """Make each request's images by both engines, from the same noise.

    Args:
        reference: What is compared with; what the parameters leave open is filled in by its defaults.
        candidate: What is compared.
        requests: By name.
        seeds: How many images of each: of its own seed and those after it.
        *params: Of both; or of the reference, then of the candidate.

    Raises:
        InputError: The models' sizes differ, scikit-image is missing, or either cannot make an image.
    """
    load_ssim()
    sizes = [dataclasses.replace(p.config, name="", defaults=candidate.config.defaults) for p in (reference, candidate)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{reference.model_name} and {candidate.model_name} are models of different sizes; give two of one model"
        )
    for name, request in requests.items():
        complete = [_with_defaults(each, reference, request) for each in params]
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


def _with_defaults(params: SamplingParams, pipe: MigePipeline, request: ResolvedRequest) -> SamplingParams:
    """So that both models sample alike, whatever their own defaults."""
    return SamplingParams(**vars(params.with_defaults(pipe.config, request.task)))


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
        graph_errors = []
        for output, calls in self.errors.items():
            errors, norms = np.array(calls).T
            together = float(np.linalg.norm(errors * norms) / np.linalg.norm(norms))
            graph_errors.append(GraphError(*output, together, float(errors.max()), len(calls)))
        return tuple(graph_errors)


def _as_spec(spec: TensorSpec, values: Array) -> NDArray[Any]:
    """A NumPy array of the spec's type: graphs hand bfloat16 to each other, which NumPy does not have."""
    tensor: Any = values
    if spec.dtype == "float32" and not isinstance(values, np.ndarray):
        tensor = tensor.float()
    return to_numpy(tensor).astype(spec.dtype, copy=False)


def load_ssim() -> Callable[[NDArray[Any], NDArray[Any]], float]:
    """SSIM of two uint8 images [H,W,3], by scikit-image (Wang et al. 2004, windows of 7 x 7)."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise NotAvailableError(
            f"comparing images needs scikit-image ({error}); install it with: pip install 'mige-rt[bench]'"
        ) from error
    return lambda a, b: float(np.mean(structural_similarity(a, b, channel_axis=-1, data_range=255)))
