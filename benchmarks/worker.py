"""A process of its own for each opened engine, and cold starts, which are processes, too.

Its memory and its threads are its own, and its death takes nothing with it. The parent asks, the process answers; only
one works at a time.
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
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.case import SHORT_STEPS, Candidate, Case, WorkerConfig, requests
from benchmarks.measure import Latency
from engines.interface import Array, to_numpy
from engines.onnx_runtime import OnnxRuntimeEngine
from engines.wrapper import HookedEngine
from export.memory import peak_bytes
from mige_rt.bundle import TOKENIZER_FILE, read_manifest
from mige_rt.errors import NotFiniteError
from mige_rt.graphs import GraphName
from mige_rt.pipeline import MigePipeline
from mige_rt.tokenizer import load_tokenizer

MESSAGE_LENGTH = 500  # characters of an error that are kept


class CandidateError(Exception):
    """A candidate cannot be measured; the message says why. invalid_output: what it made is no image."""

    def __init__(self, message: str, invalid_output: bool = False) -> None:
        super().__init__(message, invalid_output)
        self.invalid_output = invalid_output

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class OpenedEngine:
    """A worker's engine: device and precision as they are, not as they were asked for."""

    model: str
    device: str
    precision: str
    torch_threads: int | None  # None where PyTorch is not loaded
    opening_seconds: float


@dataclass(frozen=True)
class Memory:
    """Bytes; None where the system does not say, or has no GPU."""

    host: int | None  # the peak that the process had resident since its start
    gpu: int | None = None  # held by the process after its first image, beyond the CUDA context
    gpu_allocated: int | None = None  # the peak of PyTorch's tensors


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
        """Start the process and open the engine."""
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
    parent = multiprocessing.parent_process()
    if parent is not None:
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
        raise CandidateError(text[:MESSAGE_LENGTH], isinstance(error, NotFiniteError)) from None


class WorkerState:
    """What a worker process holds: the pipeline, and the variant over it."""

    def __init__(self, config: WorkerConfig) -> None:
        start = time.perf_counter()
        self.config = config
        self.pipe = _open_pipeline(config)
        engine = self.pipe.engine
        self.cuda: Any = None if engine.device == "cpu" else import_module("torch.cuda")
        self.free_gpu = self.cuda and self.cuda.mem_get_info()[0]
        self.opening_peak = peak_bytes() or 0
        threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
        seconds = time.perf_counter() - start
        self.opened = OpenedEngine(self.pipe.model_name, engine.device, engine.precision, threads, seconds)

    def run(self, candidate: Candidate, case: Case) -> RunOutput:
        with contextlib.suppress(OSError):  # only Linux has it, and not every container lets it be written
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
        self._prepare(self.pipe, candidate, case)
        images = [np.asarray(i) for i in self._variant(self.pipe).generate(requests(case), case.params(candidate))]
        memory = self._memory()
        tracer = _Tracer(self._synchronize)
        engine = HookedEngine(self.pipe.engine, tracer)
        pipe = MigePipeline(
            self.pipe.config, self.pipe.condition_encoder.tokenize, engine, low_memory=self.config.low_vram
        )
        self._prepare(pipe, candidate, case)
        tracer.graphs.clear()
        self._variant(pipe).generate(requests(case), case.params(candidate))
        latents, precision = to_numpy(tracer.latents).astype(np.float32), self.opened.precision
        return RunOutput(candidate.title(precision), precision, images, memory, latents, tracer.tokens, tracer.graphs)

    def seconds(self, candidate: Candidate, case: Case) -> float:
        self._prepare(self.pipe, candidate, case)
        batch, params, variant = requests(case), case.params(candidate), self._variant(self.pipe)
        self._synchronize()
        start = time.perf_counter()
        variant.generate(batch, params)  # ends with the images on the host
        return time.perf_counter() - start

    def _prepare(self, pipe: MigePipeline, candidate: Candidate, case: Case) -> None:
        """Forget what was encoded; or encode it, where the prompt is to be cached. CUDA graphs stay."""
        pipe.condition_encoder.clear_cache()
        if candidate.prompt_cached:
            self._variant(pipe).generate(
                requests(case), replace(case.params(candidate), num_inference_steps=SHORT_STEPS)
            )

    def _variant(self, pipe: MigePipeline) -> Any:
        if self.config.variant == "ours":
            return pipe
        from benchmarks.baseline import AsPublished

        return AsPublished(pipe, encode_once=self.config.variant == "encode_once")

    def _synchronize(self) -> None:
        if self.cuda:
            self.cuda.synchronize()

    def _memory(self) -> Memory:
        peak = peak_bytes()
        host = None if peak is None else max(peak, self.opening_peak)
        if not self.cuda:
            return Memory(host)
        return Memory(host, self.free_gpu - self.cuda.mem_get_info()[0], self.cuda.max_memory_allocated())


_state: WorkerState  # a process has one


def _open_pipeline(config: WorkerConfig) -> MigePipeline:
    if config.runtime is None:
        return MigePipeline.from_pretrained(
            config.model,
            engine=config.engine,
            device=config.device,
            precision=config.precision,
            low_memory=config.low_vram,
            compile=config.compile,
        )
    manifest = read_manifest(config.model)
    options: Any = {"set_options": config.runtime.set_options, "split_batch": config.runtime.batch_parallel}
    engine = OnnxRuntimeEngine(config.model, manifest, "cpu", **options)
    return MigePipeline(manifest.model, load_tokenizer(config.model / TOKENIZER_FILE), engine)


class _Tracer:
    """Times each run of a graph, and keeps the final latents and the prompt's length."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize
        self.latents: Any = None
        self.tokens = 0
        self.graphs: dict[str, tuple[int, float]] = {}

    def __call__(self, graph: GraphName, inputs: Mapping[str, Array], run: Callable[[], dict[str, Array]]) -> Any:
        self.latents = inputs["latents"] if graph == "vae_decoder" else self.latents
        self.tokens = int(inputs["text_mask"].shape[-1]) if graph == "denoiser" else self.tokens
        self.synchronize()
        start = time.perf_counter()
        outputs = run()
        self.synchronize()
        calls, seconds = self.graphs.get(graph, (0, 0.0))
        self.graphs[graph] = (calls + 1, seconds + time.perf_counter() - start)
        return outputs


def cold_start(worker: WorkerConfig, case: Case, starts: int) -> Latency:
    """Seconds of `mige-rt run` for one image, from its start to its end; its files are in the system's cache.

    Raises:
        CandidateError: The command fails.
    """
    request = requests(case)[0]
    assert request.source is not None
    options = {"model": worker.model, "engine": worker.engine, "device": worker.device, "precision": worker.precision}
    options |= {"prompt": request.prompt, "seed": request.seed, "steps": case.num_inference_steps}
    options |= {"text-scale": case.guidance_scale, "source-scale": case.image_guidance_scale}
    # The package that is being measured, wherever the command is started.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    seconds = []
    with tempfile.TemporaryDirectory(prefix="mige-rt-bench-") as folder:
        options |= {"size": "{}x{}".format(*case.size), "source": f"{folder}/source.png", "out": f"{folder}/out.png"}
        command = [sys.executable, "-m", "mige_rt.cli", "run"]
        command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        request.source.save(f"{folder}/source.png")
        for number, image in enumerate(request.images):
            image.save(f"{folder}/{number}.png")
            command += ["--image", f"{folder}/{number}.png"]
        for _ in range(starts):
            start = time.perf_counter()
            process = subprocess.run(
                command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
            )
            seconds.append(time.perf_counter() - start)
            if process.returncode:
                raise CandidateError(" ".join(process.stderr.split())[-MESSAGE_LENGTH:])
    return Latency.of(seconds)
