"""`mige-rt bench-serve --soak`: the server under load, with clients that go, bad bodies and kills."""

import asyncio
import random
import struct
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import aiohttp

from benchmarks.serving.bench import OnProgress
from benchmarks.serving.load import (
    KINDS,
    Answer,
    Call,
    client_session,
    image_call,
    poisson_arrivals,
    send,
    send_in_turn,
)
from benchmarks.serving.results import Percentiles
from benchmarks.serving.server_process import ServerProcess
from export.environment import environment
from export.formatting import amount, json_text, markdown_table, seconds
from mige_rt.errors import InputError

_CALLS = 24  # different ones, each of which is made alone first
_LOAD = 0.6  # of the images that the server makes one after another
_BAD, _CANCELLED = 0.1, 0.15  # shares of the calls
_SAMPLE_SECONDS = 0.25  # between two looks at the memory


@dataclass(frozen=True, kw_only=True)
class SoakOptions:
    """What to do to the server, and what it must bear.

    Attributes:
        server: Options of `mige-rt serve`.
        minutes: That calls come for.
        kills: Of the engine worker, evenly spread.
        max_batch: Of the server.
        num_inference_steps: None: 4 to 8, so that images leave at different steps.
        max_growth_mb: By which the peak of the memory in the last third may be above that in the first.
        seed: Of the arrivals.
        command: That was typed.
    """

    server: tuple[str, ...] = ()
    minutes: float = 10.0
    kills: int = 20
    max_batch: int = 8
    num_inference_steps: int | None = None
    max_growth_mb: int = 50
    seed: int = 0
    command: str = "mige-rt bench-serve --soak 10"

    def calls(self) -> list[Call]:
        """Of all kinds, the same ones each time."""
        steps = [self.num_inference_steps or 4 + i % 5 for i in range(_CALLS)]
        return [image_call(KINDS[i % 3], i, {"num_inference_steps": steps[i]}) for i in range(_CALLS)]


@dataclass
class SoakResults:
    """What happened.

    Attributes:
        options: Of the soak.
        calls: For images, those that were cancelled not counted.
        images: That were made, all of them compared with those made alone.
        refused: Calls answered with 429, which were never accepted.
        lost: What calls that were accepted were answered instead of an image.
        wrong: Images that are not those made alone.
        cancelled: Calls whose client went before the answer.
        bad_bodies: That were sent.
        bad_bodies_accepted: What those were answered that had no status from 400 to 499.
        kills: Of the worker.
        restarts: Of the worker, as the server counts them.
        left: Images that the server still counts as waiting or running when all is over.
        tracebacks: In the server's log.
        latencies: Of the images, in seconds.
        memory: (seconds, bytes) of the server's processes together.
        complete: Whether it was not interrupted.
    """

    options: SoakOptions
    calls: int = 0
    images: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: int = 0
    cancelled: int = 0
    bad_bodies: int = 0
    bad_bodies_accepted: list[str] = field(default_factory=list)
    kills: int = 0
    restarts: int = 0
    left: int = 0
    tracebacks: int = 0
    latencies: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    complete: bool = False

    @property
    def peaks(self) -> tuple[int, int]:
        """Most bytes that the server held in the first third, and in the last one."""
        end = 60 * self.options.minutes
        first = [size for when, size in self.memory if when <= end / 3]
        last = [size for when, size in self.memory if when >= 2 * end / 3]
        return max(first, default=0), max(last, default=0)

    @property
    def failures(self) -> list[str]:
        """A sentence for each thing that is not as it should be."""
        growth = (self.peaks[1] - self.peaks[0]) / 1e6
        is_wrong = {
            f"{len(self.lost)} requests that were accepted were lost, such as: {self.lost[:1]}": self.lost,
            f"{self.wrong} images are not those that are made alone": self.wrong,
            f"{len(self.bad_bodies_accepted)} bad bodies were not refused, such as: {self.bad_bodies_accepted[:1]}": (
                self.bad_bodies_accepted
            ),
            f"the worker was killed {self.kills} times and started again {self.restarts} times": (
                self.complete and self.kills != self.restarts
            ),
            f"{self.left} images are still counted as waiting or running": self.left,
            f"the log holds {self.tracebacks} tracebacks": self.tracebacks,
            f"memory has grown by {growth:.0f} MB; at most {self.options.max_growth_mb} are allowed": (
                growth > self.options.max_growth_mb
            ),
        }
        return [sentence for sentence, applies in is_wrong.items() if applies]

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["latencies"] = self.latencies and asdict(Percentiles.of(self.latencies))
        values["memory"] = [list(sample) for sample in self.memory[:: max(1, len(self.memory) // 200)]]
        first, last = self.peaks
        about = {"date": date.today().isoformat(), "environment": environment()}
        return {**about, **values, "memory_peaks": [first, last], "failures": self.failures}


def soak(options: SoakOptions, on_progress: OnProgress = lambda what, done, total: None) -> SoakResults:
    """Put a server under load. Ctrl-C ends it with what was seen, `complete` false.

    Raises:
        InputError: The server does not start, or does not make an image.
    """
    results = SoakResults(options)
    limits = ("--max-batch", str(options.max_batch), "--max-queue", "256")
    with suppress(KeyboardInterrupt), ServerProcess(*limits, *options.server) as server:
        on_progress("images alone", 0, 0)
        answers = asyncio.run(send_in_turn(server.url, options.calls()))
        for answer, _ in answers:
            if answer.status != 200:
                raise InputError(f"the server answers {answer.status} to a call alone: {answer.body.decode()}")
        expected = [answer.image for answer, _ in answers]
        asyncio.run(_Soak(server, results, expected, mean(took for _, took in answers), on_progress).run())
        results.restarts = int(server.metric("worker_restarts_total"))
        results.left = _images_left(server)
        results.tracebacks = sum("Traceback" in line for line in server.log)
        results.complete = True
    return results


def _images_left(server: ServerProcess) -> int:
    """Images that are still waiting or running a little after the last answer."""
    for _ in range(50):
        left = int(server.metric("num_queue_reqs") + server.metric("num_running_reqs"))
        if not left:
            break
        time.sleep(0.1)
    return left


@dataclass
class _Soak:
    """A soak in progress: the running server, and the images that it made when nothing else was running."""

    server: ServerProcess
    results: SoakResults
    expected: Sequence[str]
    lone_seconds: float
    on_progress: OnProgress

    def __post_init__(self) -> None:
        self._calls = self.results.options.calls()

    async def run(self) -> None:
        """Everything at once, until the last answer has come."""
        options = self.results.options
        rng = random.Random(options.seed)
        due = poisson_arrivals(_LOAD / self.lone_seconds, 60 * options.minutes, rng)
        async with client_session() as session:
            watchers = [asyncio.create_task(self._watch_memory()), asyncio.create_task(self._report_progress())]
            async with asyncio.TaskGroup() as group:
                group.create_task(self._kill_workers(session))
                begin = time.monotonic()
                for when in due:
                    await asyncio.sleep(begin + when - time.monotonic())
                    group.create_task(self._send_any(session, random.Random(rng.random())))
            for watcher in watchers:
                watcher.cancel()

    async def _send_any(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        share = rng.random()
        if share < _BAD:
            await self._send_bad(session, rng.choice(BAD_BODIES))
        elif share < _BAD + _CANCELLED:
            await self._send_and_go(session, rng.randrange(_CALLS), rng.uniform(0, 3 * self.lone_seconds))
        else:
            await self._send_good(session, rng.randrange(_CALLS))

    async def _send_good(self, session: aiohttp.ClientSession, number: int) -> None:
        begin, results = time.monotonic(), self.results
        answer = await self._send(session, number)
        results.calls += 1
        if answer.status == 200:
            results.images += 1
            results.latencies.append(time.monotonic() - begin)
            results.wrong += answer.image != self.expected[number]
        elif answer.status == 429:
            results.refused += 1
        else:
            results.lost.append(f"{answer.status} {answer.body.decode(errors='replace')}")

    async def _send_and_go(self, session: aiohttp.ClientSession, number: int, after: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._send(session, number), after)
        self.results.cancelled += 1

    async def _send_bad(self, session: aiohttp.ClientSession, call: Call) -> None:
        answer = await send(session, self.server.url, call)
        self.results.bad_bodies += 1
        if not 400 <= answer.status < 500:
            self.results.bad_bodies_accepted.append(f"{answer.status} {answer.body.decode(errors='replace')}")

    async def _send(self, session: aiohttp.ClientSession, number: int) -> Answer:
        return await send(session, self.server.url, self._calls[number])

    async def _kill_workers(self, session: aiohttp.ClientSession) -> None:
        options, begin = self.results.options, time.monotonic()
        for i in range(options.kills):
            when = 60 * options.minutes * (i + 0.5) / options.kills
            await asyncio.sleep(begin + when - time.monotonic())
            while not await self._is_ready(session):
                await asyncio.sleep(0.1)
            self.server.worker().kill()
            self.results.kills += 1
            await asyncio.sleep(0.5)  # until the server knows
        while not await self._is_ready(session):
            await asyncio.sleep(0.1)

    async def _is_ready(self, session: aiohttp.ClientSession) -> bool:
        async with session.get(f"{self.server.url}/ready") as response:
            return response.status == 200

    async def _watch_memory(self) -> None:
        begin = time.monotonic()
        while True:
            self.results.memory.append((time.monotonic() - begin, self.server.memory()))
            await asyncio.sleep(_SAMPLE_SECONDS)

    async def _report_progress(self) -> None:
        total = round(60 * self.results.options.minutes)
        for second in range(total):
            self.on_progress(f"{self.results.images} images, {self.results.kills} kills", second, total)
            await asyncio.sleep(1)


def write_soak(results: SoakResults, folder: Path) -> None:
    """Write soak.json and soak.md into an existing folder."""
    data = results.to_json()
    (folder / "soak.json").write_text(json_text(data), encoding="utf-8")
    first, last = results.peaks
    rows = {
        "minutes of load": f"{results.options.minutes:g}",
        "requests, cancelled ones not counted": str(results.calls),
        "images, each compared with the one made alone": str(results.images),
        "of them other than made alone": str(results.wrong),
        "requests refused before they were accepted (429)": str(results.refused),
        "accepted requests lost": str(len(results.lost)),
        "requests whose client went": str(results.cancelled),
        "bad bodies": str(results.bad_bodies),
        "of them not refused with a 4xx": str(len(results.bad_bodies_accepted)),
        "kills of the worker": str(results.kills),
        "restarts of the worker": str(results.restarts),
        "p50 and p99 of the latency": " and ".join(seconds(data["latencies"][name]) for name in ("p50", "p99"))
        if results.latencies
        else "",
        "memory, peak of the first third and of the last": f"{amount(first)} and {amount(last)}",
    }
    table = markdown_table([{"what": what, "": value} for what, value in rows.items()])
    verdict = "\n".join(f"- FAILED: {sentence}" for sentence in results.failures) or "All is as it should be."
    interrupted = "" if results.complete else "**interrupted: what was seen until then**\n\n"
    text = f"# mige-rt bench-serve --soak\n\n`{results.options.command}`\n\n{interrupted}{verdict}\n\n{table}\n"
    (folder / "soak.md").write_text(text, encoding="utf-8")


def _huge_png() -> bytes:
    """A PNG whose header promises more than a gigapixel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def _form(image: bytes, *, end: bytes = b"--x--\r\n") -> Call:
    text = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nmake it blue\r\n'
    file = b'--x\r\nContent-Disposition: form-data; name="image"; filename="image.png"\r\n\r\n' + image + b"\r\n"
    return Call("/v1/images/edits", text + file + end, "multipart/form-data; boundary=x")


BAD_BODIES = (
    _form(_huge_png()),
    _form(b'{"prompt": "a cat"}'),
    _form(b"", end=b""),
    Call("/v1/images/generations", b'{"prompt": "a cat", "steps": 5}'),
    Call("/v1/images/generations", b'{"prompt": "a <imagehere>"}'),
    Call("/v1/images/generations", b'{"prompt": "\xff"}'),
    Call("/v1/images/generations", b'{"prompt": 5}'),
    Call("/v1/images/generations", b"[" * 100_000),
    Call("/v1/images/edits", b"a=b", "application/x-www-form-urlencoded"),
)
