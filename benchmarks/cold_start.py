"""Cold starts: from the start of a `mige-rt run` to its picture."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.candidates import Case, Home, requests
from benchmarks.measure import Latency
from benchmarks.worker import CandidateError


def cold_start(home: Home, case: Case, starts: int) -> Latency:
    """Seconds of the command itself for one picture, in a process of its own; its files are in the system's cache.

    Raises CandidateError when the command fails.
    """
    request = requests(case)[0]
    with tempfile.TemporaryDirectory(prefix="mige-rt-bench-") as name:
        folder = Path(name)
        paths = []
        for number, picture in enumerate(request.images):
            paths.append(folder / f"{number}.png")
            picture.save(paths[-1])
        assert request.source is not None
        request.source.save(folder / "source.png")
        command = [sys.executable, "-m", "mige_rt.cli", "run", "--prompt", request.prompt]
        command += [word for path in paths for word in ("--image", str(path))]
        command += ["--source", str(folder / "source.png"), "--out", str(folder / "out.png")]
        command += ["--model", str(home.model), "--engine", home.engine, "--device", home.device]
        command += ["--precision", home.precision, "--seed", str(request.seed), "--steps", str(case.steps)]
        command += ["--text-scale", str(case.guidance_scale), "--source-scale", str(case.image_guidance_scale)]
        command += ["--size", f"{case.size[0]}x{case.size[1]}"]
        # The package that is being measured, wherever the command is started.
        paths_of = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths_of.rstrip(os.pathsep)}
        seconds = []
        for _ in range(starts):
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            seconds.append(time.perf_counter() - start)
            if done.returncode:
                raise CandidateError(" ".join(done.stderr.split())[-500:])
    return Latency.of(seconds)
