"""Exported graphs compared with PyTorch in float32: each by itself, then all together as a pipeline.

ONNX Runtime's CPU computes half precision in float32 and has no kernels for bfloat16. So a graph in fp16 or bf16 is
compared twice: its file by ONNX Runtime, which shows that it is wired right (bfloat16 is computed in float32), and its
modules by PyTorch in its precision, which shows what rounding does and would show an overflow.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image as Picture

from engines.interface import Array, EngineOptions, to_numpy
from engines.onnx_runtime import OnnxRuntimeEngine
from engines.pytorch import PyTorchEngine
from engines.wrapper import HookedEngine
from export.chunks import CHUNK_BYTES, run_onnx
from export.inputs import RealInputs, Sizes, random_feed, sample_requests, shapes_of
from export.precision import PreciseGraph
from export.reference import run_module, run_reference
from mige_rt.bundle import TOKENIZER_FILE, open_model, read_config
from mige_rt.config import Precision
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, AxisRange
from mige_rt.pipeline import MigePipeline
from mige_rt.postprocessing import to_image
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams
from mige_rt.tokenizer import load_tokenizer
from trainer.checkpoints.model_folder import load_model
from trainer.preview import psnr

# Relative RMS errors of a graph's outputs: two to ten times the worst measured on the default model, over all graphs,
# shapes and inputs, by two CPU cores with AVX-512: fp32 2.7e-5, of the VAE at 256 pixels, the others 2e-6; fp16 5.4e-3,
# of the image encoder on noise, on pictures 3e-4, the others 3.4e-3; bf16 9.4e-3; int8 7.7e-2, of the text encoder, the
# others 3e-2. Full-size graphs are deeper: 3e-4 in fp16 for the denoiser, 1.4e-2 in int8.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-4, "fp16": 1.5e-2, "bf16": 4e-2, "int8": 0.15}
# Relative RMS errors of final latents. Measured after STEPS steps, the worst of 3 pictures: fp32 5e-7, fp16 3.2e-4,
# bf16 1.0e-2, int8 1.6e-2; after 20 steps, of 24 pictures, by `benchmarks.parity`: 1.3e-6, 2.7e-3, 2.1e-2, 2.8e-2.
LATENTS: Mapping[str, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.1}
# Least PSNR of the pictures in dB; above 40 dB no difference is seen (measured: no difference, 71, 54, 50 dB).
PICTURES: Mapping[str, float] = {"fp32": 40.0, "fp16": 30.0, "bf16": 30.0, "int8": 30.0}
STEPS = 4  # of the solver, in the pipeline's comparison

OnProgress = Callable[[str], None]
OnRun = Callable[[str, Mapping[str, Array], Callable[[], dict[str, Array]]], dict[str, Array]]


@dataclass(frozen=True)
class Check:
    """One output compared with PyTorch's in float32, all numbers of the batch together.

    rms: the error's root mean square, relative to the output's; worst: the largest absolute error; cosine: of the two
    outputs as vectors. For pictures (graph `pipeline`, output `pictures`), values are 0 to 1 and rms is not relative,
    so that psnr = -20 log10(rms) dB. What is not finite, or of another shape, has infinite errors.
    """

    graph: str  # or `pipeline`
    shape: dict[str, int]  # the sizes of the named axes
    inputs: str  # random, real; for the pipeline the task
    output: str
    run_by: str  # onnxruntime; onnxruntime in float32; pytorch
    rms: float
    worst: float
    cosine: float
    limit: float  # of rms
    ok: bool
    psnr: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(ours: NDArray, expected: NDArray, relative: bool = True) -> tuple[float, float, float]:
    """rms, worst and cosine, see `Check`."""
    if ours.shape != expected.shape or not np.isfinite(ours).all():
        return np.inf, np.inf, 0.0
    a, b = ours.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norm, error = float(np.linalg.norm(b)), a - b
    rms = float(np.linalg.norm(error)) / (norm or 1.0) if relative else float(np.sqrt(np.mean(error**2)))
    together = float(np.linalg.norm(a)) * norm
    return rms, float(np.abs(error).max()), float(a @ b) / together if together else float(rms == 0)


def validate_graph(
    graph: str,
    folder: Path,
    onnx_path: Path,
    precision: Precision,
    ranges: Mapping[str, AxisRange],
    small: bool,
    on_progress: OnProgress = lambda what: None,
) -> list[Check]:
    """Compare a graph's ONNX file with the weights of `folder`, a model folder or a bundle, in PyTorch in float32.

    small: at four shapes, with random and real inputs, the whole graph at once. Otherwise at two small shapes, the
    larger with real inputs as well, the reference run first, and ONNX Runtime on a part of the graph at a time.
    """
    config = read_config(folder)
    shapes = shapes_of(graph, config, ranges, small)
    cases = [("random", sizes, random_feed(graph, config, sizes)) for sizes in shapes.values()]
    on_progress("real inputs")
    real = list(shapes.values())[0 if small else -1 :]
    feeds = RealInputs(folder).feeds(graph, real)
    cases += [("real", sizes, feed) for sizes, feed in zip(real, feeds, strict=True)]
    on_progress("PyTorch")
    expected = run_reference(folder, graph, [feed for _, _, feed in cases])

    on_progress("ONNX Runtime")
    widen = precision == "bf16"
    made = run_onnx(onnx_path, [feed for _, _, feed in cases], None if small else CHUNK_BYTES, widen)
    runs = [("onnxruntime in float32" if widen else "onnxruntime", made)]
    if precision == "bf16" or (precision == "fp16" and small):
        on_progress(f"PyTorch in {precision}")
        module = PreciseGraph(graph, getattr(load_model(folder, dtype=None, only=[graph]), graph), precision)
        # PyTorch's CPU is slow in half precision.
        tried = cases if small else cases[:1]
        runs.append(("pytorch", [run_module(graph, module, feed) for _, _, feed in tried]))
    return [
        _check(graph, sizes, inputs, port.name, run_by, output[port.name], reference[port.name], TOLERANCES[precision])
        for run_by, outputs in runs
        for (inputs, sizes, _), output, reference in zip(cases, outputs, expected, strict=False)
        for port in GRAPHS[graph].outputs
    ]


def _check(
    graph: str, sizes: Sizes, inputs: str, output: str, run_by: str, ours: NDArray, expected: NDArray, limit: float
) -> Check:
    rms, worst, cosine = measure(ours, expected)
    return Check(graph, sizes, inputs, output, run_by, rms, worst, cosine, limit, rms <= limit)


class _PreciseEngine(PyTorchEngine):
    """The modules as they are exported, in PyTorch: what a bf16 bundle computes, where ONNX Runtime cannot run it."""

    def __init__(self, folder: Path, precision: Precision) -> None:
        super().__init__(load_model(folder, dtype=None), "cpu", precision)
        self.graphs = {graph: PreciseGraph(graph, getattr(self.model, graph), precision) for graph in GRAPHS}

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return run_module(graph, self.graphs[graph], inputs)


def validate_pipeline(model_folder: Path, bundle_folder: Path, precision: Precision) -> list[Check]:
    """Make a picture of each task from the same noise by PyTorch in float32 and by the bundle on the CPU, and compare
    the final latents and the pictures. For small models: both are in memory at once."""
    config = read_config(model_folder)
    tokenize = load_tokenizer(model_folder / TOKENIZER_FILE)
    reference = PyTorchEngine.open(open_model(model_folder), EngineOptions(device="cpu", precision="fp32"))
    if precision == "bf16":
        ours = _PreciseEngine(bundle_folder, precision)
    else:
        ours = OnnxRuntimeEngine.open(open_model(bundle_folder), EngineOptions(device="cpu", precision=precision))
    pipes = [MigePipeline(config, tokenize, engine) for engine in (ours, reference)]
    checks = []
    for request in _one_of_each_task():
        (latents, made), (expected, right) = (
            make_watched(pipe, request, SamplingParams(num_inference_steps=STEPS)) for pipe in pipes
        )
        picture, truth = np.asarray(made), np.asarray(right)
        sizes = {"B": 1, "h": latents.shape[2], "w": latents.shape[3]}
        checks.append(
            _check("pipeline", sizes, request.task, "latents", ours.name, latents, expected, LATENTS[precision])
        )
        rms, worst, cosine = measure(picture / 255, truth / 255, relative=False)
        limit = 10 ** (-PICTURES[precision] / 20)
        errors = (rms, worst, cosine, limit, rms <= limit, psnr(picture, truth))
        checks.append(Check("pipeline", sizes, request.task, "pictures", ours.name, *errors))
    return checks


def make_watched(
    pipe: MigePipeline,
    request: ResolvedRequest,
    settings: SamplingParams,
    on_run: OnRun = lambda graph, inputs, run: run(),
) -> tuple[NDArray, Picture]:
    """The final latents, [1,c,h,w], unscaled, and the picture, as the pipeline makes them; on_run: see HookedEngine.

    Where the model overflowed, black and white stand in the picture for what is not finite, and the latents tell.
    """
    latents = pixels = np.empty(0)

    def keep(graph: str, inputs: Mapping[str, Array], run: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        nonlocal latents, pixels
        outputs = on_run(graph, inputs, run)
        if graph == "vae_decoder":
            latents, pixels = to_numpy(inputs["latents"]), to_numpy(outputs["pixels"])
        return outputs

    watched = HookedEngine(pipe.engine, keep)
    try:
        (picture,) = MigePipeline(
            pipe.config, pipe.condition_encoder.tokenize, watched, low_memory=pipe.runner.low_memory
        ).generate([request], settings)
    except InputError:
        if np.isfinite(pixels).all():
            raise
        picture = to_image(np.nan_to_num(pixels[0], nan=-1, posinf=1, neginf=-1))
    return latents, picture


def _one_of_each_task() -> list[ResolvedRequest]:
    found: dict[str, ResolvedRequest] = {}
    for request in sample_requests():
        found.setdefault(request.task, request)
    return list(found.values())
