"""The machine itself, and the tests that need a GPU."""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_stay.record import Record, Stay

TESTS = Path(__file__).parents[2] / "tests" / "gpu"
_OUTCOME = re.compile(r"^(\S*::.*?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")


def measure_machine(stay: Stay, record: Record) -> None:
    """The card, the packages, and the card's peaks."""
    with record.entry("card") as entry:
        import torch

        entry.update({"torch": torch.__version__, "cuda": torch.version.cuda})
        if stay.cuda:
            properties = torch.cuda.get_device_properties(stay.device)
            entry.update({"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"})
            entry.update({"processors": properties.multi_processor_count, "memory_gb": properties.total_memory / 1e9})
    with record.entry("environment") as entry:
        from export.environment import environment

        entry.update(environment())
    with record.entry("peaks") as entry:
        from benchmarks.peaks import measure_peaks

        entry.update(vars(measure_peaks(stay.device, 64 if stay.rehearsal else None)))


def measure_tests(stay: Stay, record: Record) -> None:
    """Each test of tests/gpu, as it ends."""
    import pytest  # noqa: F401 - without it the part is left out

    command = [sys.executable, "-u", "-m", "pytest", str(TESTS), "-v", "--color=no", "-p", "no:cacheprovider"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS.parents[1]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if outcome := _OUTCOME.match(line):
                with record.entry(outcome[1]) as entry:
                    entry.update({"outcome": outcome[2].lower(), "ok": outcome[2] not in ("FAILED", "ERROR")})
    with record.entry("pytest") as entry:
        entry.update({"exit_code": process.returncode, "ok": process.returncode == 0})
