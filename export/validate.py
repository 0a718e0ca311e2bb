"""Exported graphs compared with PyTorch in float32: each by itself, then all together as a pipeline.

ONNX Runtime's CPU computes half precision in float32 and has no kernels for bfloat16. So a graph in fp16 or bf16 is
compared twice: its file by ONNX Runtime, which shows that it is wired right (bfloat16 is computed in float32), and its
modules by PyTorch in its precision, which shows what rounding does and would show an overflow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from engines.interface import Array, EngineOptions, to_numpy
from engines.onnx_runtime import OnnxRuntimeEngine, computes_in_bf16
from engines.outputs import OutputCheck
from engines.pytorch import PyTorchEngine
from engines.wrapper import EngineWrapper, HookedEngine
from export.chunks import CHUNK_BYTES, run_onnx
from export.context import ExportContext
from export.inputs import RealInputs, Sizes, random_feed, sample_requests, shapes_of
from export.precision import PreciseGraph, graph_precision
from export.reference import Feed, Outputs, run_module, run_reference
from export.results import Check
from mige_rt.bundle import TOKENIZER_FILE, Manifest, open_model, read_manifest
from mige_rt.config import Precision
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, GraphName
from mige_rt.pipeline import MigePipeline
from mige_rt.postprocessing import to_image
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams
from mige_rt.tokenizer import load_tokenizer
from trainer.checkpoints.model_folder import load_model
from trainer.checkpoints.weights import Checkpoint
from trainer.evaluate.metrics import psnr

# Relative RMS errors of a graph's outputs: two to ten times the worst measured on the default model, over all graphs,
# shapes and inputs, by two CPU cores with AVX-512: fp32 2.7e-5, of the VAE at 256 pixels, the others 2e-6; fp16 5.4e-3,
# of the image encoder on noise, on images 3e-4, the others 3.4e-3; bf16 9.4e-3; int8 7.7e-2, of the text encoder, the
# others 3e-2. Full-size graphs are deeper: 3e-4 in fp16 for the denoiser, 1.4e-2 in int8. Of fp8 and int8-sq the
# denoiser alone is quantised, the others have fp16's tolerance: fp8 2.1e-2 on images, int8-sq 1.4e-2.
TOLERANCES: Mapping[str, float] = {
    "fp32": 1e-4,
    "fp16": 1.5e-2,
    "bf16": 4e-2,
    "int8": 0.15,
    "fp8": 0.1,
    "int8-sq": 0.1,
}
# The same on random inputs, where that may be more: a trained denoiser's activations have outliers there that
# calibration has not seen. Measured with the default model: int8 0.15, fp8 0.19, int8-sq 0.34.
RANDOM_TOLERANCES: Mapping[str, float] = {"int8": 0.3, "fp8": 0.4, "int8-sq": 0.6}
# Relative RMS errors of final latents. Measured after STEPS steps, the worst of 3 images: fp32 5e-7, fp16 3.2e-4,
# bf16 1.0e-2, int8 1.6e-2; after 20 steps, of 24 images, by `benchmarks.parity`: 1.3e-6, 2.7e-3, 2.1e-2, 2.8e-2.
# After STEPS steps fp8 3.8e-2, int8-sq 2.6e-2.
LATENT_TOLERANCES: Mapping[str, float] = {
    "fp32": 1e-4,
    "fp16": 1e-2,
    "bf16": 5e-2,
    "int8": 0.1,
    "fp8": 0.1,
    "int8-sq": 0.1,
}
# Least PSNR of the images in dB; above 40 dB no difference is seen (measured: no difference, 71, 54, 50 dB; fp8 44,
# int8-sq 49 dB).
MIN_PSNR: Mapping[str, float] = {"fp32": 40.0, "fp16": 30.0, "bf16": 30.0, "int8": 30.0, "fp8": 30.0, "int8-sq": 30.0}
STEPS = 4  # of the solver, in the pipeline's comparison

OnProgress = Callable[[str], None]  # what is being done
OnRun = Callable[[str, Mapping[str, Array], Callable[[], dict[str, Array]]], dict[str, Array]]


def measure(ours: NDArray[Any], expected: NDArray[Any], *, relative: bool = True) -> tuple[float, float, float]:
    """rms, worst and cosine, see `Check`."""
    if ours.shape != expected.shape or not np.isfinite(ours).all():
        return np.inf, np.inf, 0.0
    a, b = ours.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norm, error = float(np.linalg.norm(b)), a - b
    rms = float(np.linalg.norm(error)) / (norm or 1.0) if relative else float(np.sqrt(np.mean(error**2)))
    norms = float(np.linalg.norm(a)) * norm
    return rms, float(np.abs(error).max()), float(a @ b) / norms if norms else float(rms == 0)


@dataclass(frozen=True, eq=False)
class Case:
    """What a graph is compared on: its inputs, and the sizes of their named axes."""

    inputs: Literal["random", "real"]
    sizes: Sizes
    feed: Feed


def make_cases(context: ExportContext, graph: GraphName) -> list[Case]:
    """What to compare a graph on.

    For a small model four shapes, with random and real inputs; otherwise two small shapes, the larger with real inputs
    as well.
    """
    shapes = list(shapes_of(graph, context.config, context.target.ranges, small=context.small).values())
    with_real = shapes if context.small else shapes[-1:]
    feeds = RealInputs(context.checkpoint, context.tokenize).feeds(graph, with_real)
    return [
        *(Case("random", sizes, random_feed(graph, context.config, sizes)) for sizes in shapes),
        *(Case("real", sizes, feed) for sizes, feed in zip(with_real, feeds, strict=True)),
    ]


def validate_graph(
    context: ExportContext, graph: GraphName, cases: Sequence[Case], on_progress: OnProgress = lambda what: None
) -> list[Check]:
    """Compare a graph's ONNX file with the checkpoint's weights in PyTorch in float32.

    A small model's graph is run whole. Otherwise the reference is run first, and ONNX Runtime on a part of the graph at
    a time.
    """
    precision, small = graph_precision(context.target.precision, graph), context.small
    on_progress("PyTorch")
    expected = run_reference(context.checkpoint, graph, [case.feed for case in cases])
    on_progress("ONNX Runtime")
    widen = precision == "bf16"
    outputs = run_onnx(
        context.target.onnx_path(graph),
        [case.feed for case in cases],
        limit=None if small else CHUNK_BYTES,
        widen=widen,
    )
    runs: list[tuple[str, list[Outputs]]] = [("onnxruntime in float32" if widen else "onnxruntime", outputs)]
    if precision == "bf16" or (precision == "fp16" and small):
        on_progress(f"PyTorch in {precision}")
        module = PreciseGraph(graph, context.module(graph), precision)
        # PyTorch's CPU is slow in half precision, and ONNX Runtime has run every case in fp16 itself.
        tried = cases if small and precision == "bf16" else cases[:1]
        runs.append(("pytorch", [run_module(graph, module, case.feed) for case in tried]))
    limits = {"real": TOLERANCES[precision], "random": RANDOM_TOLERANCES.get(precision, TOLERANCES[precision])}
    return [
        _check(
            Compared(graph, case.sizes, case.inputs, spec.name, run_by),
            output[spec.name],
            reference[spec.name],
            limits[case.inputs],
        )
        for run_by, outputs in runs
        for case, output, reference in zip(cases, outputs, expected, strict=False)
        for spec in GRAPHS[graph].outputs
    ]


@dataclass(frozen=True)
class Compared:
    """What is compared; see `Check`."""

    graph: str
    shape: Sizes
    inputs: str
    output: str
    run_by: str


def _check(compared: Compared, ours: NDArray[Any], expected: NDArray[Any], limit: float) -> Check:
    rms, worst, cosine = measure(ours, expected)
    return Check(**vars(compared), rms=rms, worst=worst, cosine=cosine, limit=limit, ok=rms <= limit)


class _PreciseEngine(EngineWrapper):
    """The modules as they are exported, in PyTorch: what bf16 graphs compute, where ONNX Runtime cannot run them."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        model = load_model(folder, dtype=None)
        super().__init__(PyTorchEngine(model, "cpu", manifest.precision))
        self.graphs = {
            graph: PreciseGraph(graph, model.graph(graph), "bf16" if computes_in_bf16(entry) else manifest.precision)
            for graph, entry in manifest.graphs.items()
        }

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feed = {name: to_numpy(values) for name, values in inputs.items()}
        return {**run_module(graph, self.graphs[graph], feed)}


def validate_pipeline(checkpoint: Checkpoint, bundle: Path, precision: Precision) -> list[Check]:
    """Compare the bundle's final latents and images, one of each task, with those of PyTorch.

    Both start from the same noise. The bundle runs on the CPU, PyTorch in float32. For small models: both are in memory
    at once.

    Args:
        checkpoint: the weights that the bundle was exported from.
        bundle: its folder.
        precision: what it computes in.

    Returns:
        Two checks for each task: of the latents, and of the images.
    """
    tokenize = load_tokenizer(bundle / TOKENIZER_FILE)
    reference = PyTorchEngine(checkpoint.load(dtype=torch.float32))
    manifest = read_manifest(bundle)
    if any(computes_in_bf16(entry) for entry in manifest.graphs.values()):
        ours = _PreciseEngine(bundle, manifest)
    else:
        ours = OnnxRuntimeEngine.open(open_model(bundle), EngineOptions(device="cpu", precision=precision))
    pipes = [MigePipeline(checkpoint.config, tokenize, engine) for engine in (ours, reference)]
    image_limit = 10 ** (-MIN_PSNR[precision] / 20)
    checks: list[Check] = []
    for request in _one_of_each_task():
        (latents, image), (expected, truth) = (
            make_watched(pipe, request, SamplingParams(num_inference_steps=STEPS)) for pipe in pipes
        )
        sizes = {"B": 1, "h": latents.shape[2], "w": latents.shape[3]}
        compared = Compared("pipeline", sizes, request.task, "latents", ours.name)
        checks.append(_check(compared, latents, expected, LATENT_TOLERANCES[precision]))
        checks.append(
            _check_images(replace(compared, output="images"), np.asarray(image), np.asarray(truth), image_limit)
        )
    return checks


def _check_images(compared: Compared, ours: NDArray[np.uint8], expected: NDArray[np.uint8], limit: float) -> Check:
    rms, worst, cosine = measure(ours / 255, expected / 255, relative=False)
    decibels = psnr(ours, expected)
    return Check(**vars(compared), rms=rms, worst=worst, cosine=cosine, limit=limit, ok=rms <= limit, psnr=decibels)


def make_watched(
    pipe: MigePipeline,
    request: ResolvedRequest,
    settings: SamplingParams,
    on_run: OnRun = lambda graph, inputs, run: run(),
) -> tuple[NDArray[Any], Image]:
    """The final latents, [1,c,h,w], unscaled, and the image, as the pipeline makes them; on_run: see HookedEngine.

    Where the model overflowed, the image is black or white at what is not finite, and the latents are not finite.
    """
    latents: NDArray[Any] = np.empty(0)
    pixels: NDArray[Any] = np.empty(0)

    def keep(graph: str, inputs: Mapping[str, Array], run: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        nonlocal latents, pixels
        outputs = on_run(graph, inputs, run)
        if graph == "vae_decoder":
            latents, pixels = to_numpy(inputs["latents"]), to_numpy(outputs["pixels"])
        return outputs

    engine, tokenize = HookedEngine(pipe.engine, keep), pipe.condition_encoder.tokenize
    watched = MigePipeline(pipe.config, tokenize, engine, low_memory=pipe.runner.low_memory)
    watched.runner.check = OutputCheck(pipe.config, values=False)  # how far they are off is what is measured
    try:
        (image,) = watched.generate([request], settings)
    except InputError:
        if np.isfinite(pixels).all():
            raise
        image = to_image(np.nan_to_num(pixels[0], nan=-1, posinf=1, neginf=-1))
    return latents, image


def _one_of_each_task() -> list[ResolvedRequest]:
    first: dict[str, ResolvedRequest] = {}
    for request in sample_requests():
        first.setdefault(request.task, request)
    return list(first.values())
