"""A process for each opened engine, and cold starts, which are processes, too.

Its memory and threads are its own, and its death takes nothing with it. The parent asks, the process answers.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.case import Candidate, Case, WorkerConfig, requests
from benchmarks.measure import Latency
from engines.factory import has_nvidia_driver
from engines.interface import Array, to_numpy
from engines.onnx_runtime import OnnxRuntimeEngine
from engines.wrapper import HookedEngine
from export.memory import peak_bytes
from mige_rt.bundle import TOKENIZER_FILE, read_manifest
from mige_rt.denoise import LoopInputs, Step
from mige_rt.errors import NotFiniteError
from mige_rt.graphs import GraphName
from mige_rt.pipeline import MigePipeline
from mige_rt.tokenizer import load_tokenizer

MESSAGE_LENGTH = 500  # characters of an error that are kept


class CandidateError(Exception):
    """A candidate cannot be measured; the message says why."""


class InvalidOutputError(CandidateError):
    """What the candidate made is no image."""


@dataclass(frozen=True)
class OpenedEngine:
    """A worker's engine: device and precision as they are, not as they were asked for."""

    model: str
    device: str
    precision: str


@dataclass(frozen=True)
class Memory:
    """Bytes; None where the system does not say, or has no GPU."""

    host: int | None  # the peak that the process had resident since its start
    gpu: int | None = None  # held by the process after its first image, beyond the CUDA context


@dataclass(frozen=True)
class RunOutput:
    """What a candidate makes of a case, as it is timed; and the same again with its graphs traced."""

    name: str  # the candidate's, with the precision that it has
    precision: str
    images: list[NDArray[np.uint8]]  # [H,W,3] each
    memory: Memory
    latents: NDArray[np.float32]  # [B,c,h,w], the final ones
    tokens: int  # of the batch's longest prompt
    graphs: dict[str, tuple[int, float]]  # calls and seconds of each, the device synchronized around every call


class Worker:
    """The parent's end. Every method raises CandidateError when the process does, or is no more."""

    def __init__(self, config: WorkerConfig) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_process)
        try:
            self.pid, self.opened = self._call(_open, config)
        except CandidateError:
            self._pool.shutdown()
            raise

    def run(self, candidate: Candidate, case: Case) -> RunOutput:
        return self._call(_ask, "run", candidate, case)

    def seconds(self, candidate: Candidate, case: Case) -> float:
        """Of one batch, from prompts and images to the finished images."""
        return self._call(_ask, "seconds", candidate, case)

    def kill(self) -> None:
        """End the process, whatever it does."""
        for process in multiprocessing.active_children():
            if process.pid == self.pid:
                process.kill()
        self._pool.shutdown()

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise CandidateError("its process was killed, most likely for lack of memory") from None


def prepare_process() -> None:
    """The start of a process: Ctrl-C is the parent's to handle, and the parent's end is its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _open(config: WorkerConfig) -> tuple[int, OpenedEngine]:
    global _state  # noqa: PLW0603 - a process has one
    with _candidate_errors():
        _state = WorkerState(config)
    return os.getpid(), _state.opened


def _ask(method: str, candidate: Candidate, case: Case) -> Any:
    with _candidate_errors():
        return getattr(_state, method)(candidate, case)


@contextlib.contextmanager
def _candidate_errors() -> Iterator[None]:
    """Whatever a runtime raises, in one line, so that the other candidates go on."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()) or repr(error)
        error_type = InvalidOutputError if isinstance(error, NotFiniteError) else CandidateError
        raise error_type(text[:MESSAGE_LENGTH]) from None


class WorkerState:
    """What a worker process holds: the pipeline, which every variant runs on."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        # Before the weights are loaded; without a driver there is no GPU, and importing torch would take memory.
        cuda: Any = import_module("torch.cuda") if config.device != "cpu" and has_nvidia_driver() else None
        self.free_gpu = cuda.mem_get_info()[0] if cuda and cuda.is_available() else None
        self.pipe = _open_pipeline(config)
        engine = self.pipe.engine
        self.cuda: Any = None if engine.device == "cpu" else cuda
        self.opening_peak = peak_bytes() or 0
        self.opened = OpenedEngine(self.pipe.model_name, engine.device, engine.precision)

    def run(self, candidate: Candidate, case: Case) -> RunOutput:
        with contextlib.suppress(OSError):  # only Linux has it, and not every container lets it be written
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        batch, params = requests(case), case.params(candidate)
        self.pipe.condition_encoder.clear_cache()
        images = [np.asarray(image) for image in self._variant(self.pipe, candidate).generate(batch, params)]
        peak, gpu = peak_bytes(), self.cuda and self.free_gpu - self.cuda.mem_get_info()[0]
        memory = Memory(None if peak is None else max(peak, self.opening_peak), gpu)
        tracer = GraphTracer(self._synchronize)
        engine, tokenize = HookedEngine(self.pipe.engine, tracer), self.pipe.condition_encoder.tokenize
        pipe = MigePipeline(self.pipe.config, tokenize, engine, low_memory=self.config.low_vram)
        if self.pipe._cuda_graphs is not None:  # a replayed step runs no graph by name: it is timed as the denoiser
            pipe._step = tracer.around_step(self.pipe._step)
        self._variant(pipe, candidate).generate(batch, params)
        latents, precision = to_numpy(tracer.latents).astype(np.float32), self.opened.precision
        return RunOutput(candidate.title(precision), precision, images, memory, latents, tracer.tokens, tracer.graphs)

    def seconds(self, candidate: Candidate, case: Case) -> float:
        self.pipe.condition_encoder.clear_cache()
        batch, params, variant = requests(case), case.params(candidate), self._variant(self.pipe, candidate)
        self._synchronize()
        start = time.perf_counter()
        variant.generate(batch, params)  # ends with the images on the host
        return time.perf_counter() - start

    def _variant(self, pipe: MigePipeline, candidate: Candidate) -> Any:
        if candidate.worker.variant == "ours":
            return pipe
        from benchmarks.baseline import AsPublished

        return AsPublished(pipe, encode_once=candidate.worker.variant == "encode_once")

    def _synchronize(self) -> None:
        if self.cuda:
            self.cuda.synchronize()


_state: WorkerState  # a process has one


def _open_pipeline(config: WorkerConfig) -> MigePipeline:
    if config.runtime is None:
        options: Any = {"engine": config.engine, "device": config.device, "precision": config.precision}
        options |= {"low_memory": config.low_vram, "compile": config.compile}
        return MigePipeline.from_pretrained(config.model, **options)
    manifest = read_manifest(config.model)
    options = {"set_options": config.runtime.set_options, "split_batch": config.runtime.batch_parallel}
    engine = OnnxRuntimeEngine(config.model, manifest, "cpu", **options)
    return MigePipeline(manifest.model, load_tokenizer(config.model / TOKENIZER_FILE), engine)


class GraphTracer:
    """Times each run of a graph, and keeps the final latents and the prompt's length."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize
        self.latents: Any = None
        self.tokens = 0
        self.graphs: dict[str, tuple[int, float]] = {}

    def __call__(self, graph: GraphName, inputs: Mapping[str, Array], run: Callable[[], dict[str, Array]]) -> Any:
        self.latents = inputs["latents"] if graph == "vae_decoder" else self.latents
        self.tokens = int(inputs["text_mask"].shape[-1]) if graph == "denoiser" else self.tokens
        return self._timed(graph, run)

    def around_step(self, step: Step) -> Step:
        """A step of the loop that is timed whole, as the denoiser."""

        def timed(inputs: LoopInputs, *arrays: Array) -> tuple[Array, Array]:
            self.tokens = int(inputs.text_mask.shape[-1])
            return self._timed("denoiser", lambda: step(inputs, *arrays))

        return timed

    def _timed(self, graph: GraphName, run: Callable[[], Any]) -> Any:
        self.synchronize()
        start = time.perf_counter()
        outputs = run()
        self.synchronize()
        calls, seconds = self.graphs.get(graph, (0, 0.0))
        self.graphs[graph] = (calls + 1, seconds + time.perf_counter() - start)
        return outputs


def cold_start(worker: WorkerConfig, case: Case, starts: int) -> Latency:
    """Seconds of `mige-rt run` for one image, its files in the system's cache. Raises CandidateError when it fails."""
    request = requests(case)[0]
    options = {"model": worker.model, "engine": worker.engine, "device": worker.device, "precision": worker.precision}
    options |= {"prompt": request.prompt, "seed": request.seed, "steps": case.num_inference_steps}
    options |= {"text-scale": case.guidance_scale, "source-scale": case.image_guidance_scale}
    # The package that is being measured, wherever the command is started.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment, seconds = {**os.environ, "PYTHONPATH": path}, []
    with tempfile.TemporaryDirectory(prefix="mige-rt-bench-") as folder:
        files = [f"{folder}/{number}.png" for number in range(case.references)]
        for file, image in zip(files, request.images, strict=True):
            image.save(file)
        # The last image is the source, see `case.requests`.
        options |= {"size": "{}x{}".format(*case.size), "source": files[-1], "out": f"{folder}/out.png"}
        command = [sys.executable, "-m", "mige_rt.cli", "run", "--overwrite"]
        command += [*(word for file in files for word in ("--image", file))]
        command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        for _ in range(starts):
            start = time.perf_counter()
            process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            seconds.append(time.perf_counter() - start)
            if process.returncode:
                raise CandidateError(" ".join(process.stderr.split())[-MESSAGE_LENGTH:])
    return Latency.of(seconds)
