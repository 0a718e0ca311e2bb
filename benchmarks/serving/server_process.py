"""`mige-rt serve` in a process of its own, as whoever measures or tests it sees it."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.request import urlopen

import psutil

from mige_rt.errors import InputError

_PATIENCE = 120  # seconds for what must happen


class ServerProcess:
    """A running server on a free port of loopback.

    Attributes:
        port: Its port.
        log: The lines that it has written to stderr.
    """

    def __init__(self, *options: str) -> None:
        """Start it, and wait until it answers.

        Args:
            options: Of the command.

        Raises:
            InputError: It does not start.
        """
        command = [sys.executable, "-m", "mige_rt.cli", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self.port = self._read_port()
        self._reader.start()

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once; its log is then whole. What it was doing is lost."""
        self.process.kill()
        self.process.wait()
        if self._reader.ident is not None:
            self._reader.join()

    def metrics(self) -> dict[str, float]:
        """All metrics at one moment, by their names without the prefix; labels belong to the name."""
        with urlopen(f"{self.url}/metrics", timeout=_PATIENCE) as response:
            text: str = response.read().decode()
        return {name: float(value) for name, value in re.findall(r"^mige:diffusion_(.+) (\S+)$", text, re.MULTILINE)}

    def metric(self, name: str) -> float:
        """One of them."""
        return self.metrics()[name]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Raises AssertionError when the condition does not come true while the server runs."""
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, "".join(self.log)
            time.sleep(0.05)

    def worker(self) -> psutil.Process:
        """The engine worker, which is the largest of the server's processes once it is ready."""
        return max(psutil.Process(self.process.pid).children(), key=lambda process: process.memory_info().rss)

    def memory(self) -> int:
        """Bytes that the server's processes hold together."""
        server, total = psutil.Process(self.process.pid), 0
        for process in (server, *server.children()):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:  # a worker that was killed
                continue
        return total

    def _read_port(self) -> int:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if match := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                return int(match[1])
        self.kill()
        raise InputError(f"mige-rt serve does not start: {''.join(self.log).strip()}")

    def _read_log(self) -> None:
        self.log.extend(self.process.stderr or ())
