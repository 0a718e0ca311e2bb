from pathlib import Path

import pytest

from benchmarks.bench import Plan, bench
from benchmarks.case import Effort
from benchmarks.findings import Findings
from benchmarks.report import write_report
from mige_rt.bundle import DEFAULT_MODEL

QUICK = {"effort": Effort(runs=3, warmups=0, cold_starts=1), "compile": False, "peak_side": 128}


@pytest.fixture(scope="session")
def found() -> Findings:
    """A real bench of the default model, very short."""
    engines = ("pytorch", "onnxruntime", "tensorrt")
    return bench(Plan((DEFAULT_MODEL,), engines, "cpu", steps=(4,), command="mige-rt bench --steps 4", **QUICK))


@pytest.fixture(scope="session")
def report(found: Findings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(found, folder)
    return folder
