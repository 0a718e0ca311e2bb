"""A process of its own for each opened engine: its memory is its own, its threads are its own, and its death takes
nothing with it. The parent asks, the process answers; only one works at a time."""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.candidates import SHORT, Candidate, Case, Home, requests
from engines.interface import Array, to_numpy
from engines.wrapper import HookedEngine
from export.memory import peak_bytes
from mige_rt.errors import NotFiniteError
from mige_rt.pipeline import MigePipeline

CLOSING = 10  # seconds that a process is given to end by itself


class CandidateError(Exception):
    """A candidate cannot be measured; the message says why. wrong: it made something that is no picture."""

    def __init__(self, why: str, wrong: bool = False) -> None:
        super().__init__(why)
        self.wrong = wrong


@dataclass(frozen=True)
class Opened:
    """What a home turned out to be. device and precision as they are, not as they were asked for."""

    model_name: str
    device: str
    precision: str
    threads: int | None  # PyTorch's, if it is there
    seconds: float  # that opening took


@dataclass(frozen=True)
class Memory:
    """Bytes. host: the most that the process had resident, from its start; None where the system does not say.

    gpu: what the process held of the GPU's memory after its first picture, beyond the CUDA context; gpu_allocated: the
    most that PyTorch's tensors took of it. None without a GPU.
    """

    host: int | None
    gpu: int | None = None
    gpu_allocated: int | None = None


@dataclass(frozen=True)
class Made:
    """pictures uint8 [H,W,3] each, made as they are when they are timed."""

    pictures: list[NDArray[np.uint8]]
    memory: Memory


@dataclass(frozen=True)
class Seen:
    """One run that was looked into. latents float32 [B,c,h,w], final; tokens: L, of the batch's longest prompt;
    graphs: calls and seconds of each, the device waited for around every call."""

    latents: NDArray[np.float32]
    tokens: int
    graphs: dict[str, tuple[int, float]]


class Worker:
    """The parent's end. Every method raises CandidateError when the process says so, or is no more."""

    def __init__(self, home: Home) -> None:
        """Starts the process and opens the engine."""
        context = get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, home), daemon=True)
        self._process.start()
        there.close()
        self.opened: Opened = self._answer()

    def make(self, candidate: Candidate, case: Case) -> Made:
        return self._ask("make", candidate, case)

    def look(self, candidate: Candidate, case: Case) -> Seen:
        return self._ask("look", candidate, case)

    def seconds(self, candidate: Candidate, case: Case) -> float:
        """Of one batch, from the words and pictures to the pictures made."""
        return self._ask("seconds", candidate, case)

    def close(self) -> None:
        self._here.close()
        self._process.join(CLOSING)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, *question: Any) -> Any:
        try:
            self._here.send(question)
        except OSError:
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            good, answer = self._here.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if not good:
            raise CandidateError(*answer)
        return answer

    def _ended(self) -> CandidateError:
        self._process.join(CLOSING)
        code = self._process.exitcode
        return CandidateError(
            "its process was killed, most likely for lack of memory"
            if code == -signal.SIGKILL
            else f"its process ended with exit code {code}"
        )


def _serve(connection: Connection, home: Home) -> None:
    """The process: opens the home, then answers until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with connection, contextlib.suppress(EOFError, OSError):  # the parent ended
        try:
            rooms = _Rooms(home)
        except Exception as error:  # whatever a runtime raises, the others go on
            connection.send((False, (_words(error),)))
            return
        connection.send((True, rooms.opened))
        while True:
            name, *question = connection.recv()
            try:
                answer = (True, getattr(rooms, name)(*question))
            except Exception as error:  # as above
                answer = (False, (_words(error), isinstance(error, NotFiniteError)))
            connection.send(answer)


def _words(error: Exception) -> str:
    """An exception in one line."""
    said = " ".join(str(error).split())
    return f"{said[:497]}..." if len(said) > 500 else said or repr(error)


class _Rooms:
    """What a process holds: the pipeline, or a baseline over it."""

    def __init__(self, home: Home) -> None:
        start = time.perf_counter()
        self.home = home
        self.pipe = MigePipeline.from_pretrained(
            home.model, home.engine, home.device, home.precision, low_memory=home.low_vram, compile=home.compile
        )
        engine = self.pipe.engine
        self.cuda = engine.device != "cpu"
        self.free = self._free()
        self.loading = peak_bytes() or 0
        self.opened = Opened(
            self.pipe.model_name, engine.device, engine.precision, _threads(), time.perf_counter() - start
        )

    def make(self, candidate: Candidate, case: Case) -> Made:
        self._forget_peaks()
        self._prepare(self.pipe, candidate, case)
        pictures = self._program(self.pipe).make(requests(case), candidate.settings(case))
        return Made([np.asarray(picture) for picture in pictures], self._peaks())

    def look(self, candidate: Candidate, case: Case) -> Seen:
        seen = _Look(self._wait)
        watched = HookedEngine(self.pipe.engine, seen)
        pipe = MigePipeline(self.pipe.config, self.pipe.encoder.tokenize, watched, low_memory=self.home.low_vram)
        self._prepare(pipe, candidate, case)
        seen.reset()
        self._program(pipe).make(requests(case), candidate.settings(case))
        return Seen(to_numpy(seen.latents).astype(np.float32), seen.tokens, seen.graphs)

    def seconds(self, candidate: Candidate, case: Case) -> float:
        self._prepare(self.pipe, candidate, case)
        batch, settings = requests(case), candidate.settings(case)
        program = self._program(self.pipe)
        self._wait()
        start = time.perf_counter()
        program.make(batch, settings)  # ends with the pictures on the host
        return time.perf_counter() - start

    def _prepare(self, pipe: MigePipeline, candidate: Candidate, case: Case) -> None:
        """Forget what was encoded; or, where the prompt is to be remembered, encode it. Captured steps are kept."""
        pipe.encoder.forget()
        if candidate.cached:
            self._program(pipe).make(requests(case), replace(candidate.settings(case), steps=SHORT))

    def _program(self, pipe: MigePipeline) -> Any:
        if self.home.program == "ours":
            return pipe
        from benchmarks.baseline import AsPublished

        return AsPublished(pipe, encode_once=self.home.program == "encode_once")

    def _wait(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def _free(self) -> int | None:
        if not self.cuda:
            return None
        import torch

        return torch.cuda.mem_get_info()[0]

    def _forget_peaks(self) -> None:
        with contextlib.suppress(OSError):  # only Linux has it, and not every container lets it be written
            Path("/proc/self/clear_refs").write_text("5")
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def _peaks(self) -> Memory:
        host = peak_bytes()
        most = None if host is None else max(host, self.loading)
        if self.free is None:
            return Memory(most)
        import torch

        return Memory(most, self.free - torch.cuda.mem_get_info()[0], torch.cuda.max_memory_allocated())


class _Look:
    """What a watched engine is seen to do: each graph timed, the final latents and the prompt's length kept."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.reset()

    def reset(self) -> None:
        self.latents: Array = None
        self.tokens = 0
        self.graphs: dict[str, tuple[int, float]] = {}

    def __call__(
        self, graph: str, inputs: Mapping[str, Array], run: Callable[[], dict[str, Array]]
    ) -> dict[str, Array]:
        if graph == "vae_decoder":
            self.latents = inputs["latents"]
        elif graph == "denoiser":
            self.tokens = int(inputs["text_mask"].shape[-1])
        self.wait()
        start = time.perf_counter()
        outputs = run()
        self.wait()
        calls, seconds = self.graphs.get(graph, (0, 0.0))
        self.graphs[graph] = (calls + 1, seconds + time.perf_counter() - start)
        return outputs


def _threads() -> int | None:
    import sys

    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()
