from pathlib import Path

import pytest

from benchmarks.bench import BenchOptions, bench
from benchmarks.bench_results import BenchResults
from benchmarks.report import write_report

QUICK = {"iterations": 3, "warmup": 0, "cold_starts": 2, "compile": False, "peak_side": 128}


@pytest.fixture(scope="session")
def results() -> BenchResults:
    """A real bench of the default model, very short."""
    engines = ("pytorch", "onnxruntime", "tensorrt")
    command = "mige-rt bench --steps 4"
    return bench(BenchOptions(engines=engines, device="cpu", num_inference_steps=(4,), command=command, **QUICK))


@pytest.fixture(scope="session")
def report(results: BenchResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(results, folder)
    return folder
