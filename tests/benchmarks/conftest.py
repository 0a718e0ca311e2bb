import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from benchmarks.bench import BenchOptions, bench
from benchmarks.bench_results import BenchResults
from benchmarks.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
QUICK = {"iterations": 3, "warmup": 0, "cold_starts": 1, "compile": False, "peak_side": 128}


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


@pytest.fixture
def browser(chromium: Chrome) -> Chrome:
    """A browser that shows no page, and has logged nothing."""
    chromium.get("about:blank")
    chromium.get_log("browser")  # which empties it
    return chromium


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chrome]:
    if BROWSER is None or DRIVER is None:
        pytest.skip("no Chromium with its driver is installed here (Debian: chromium, chromium-driver)")
    options = Options()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(flag)
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--enable-unsafe-swiftshader")  # WebGL without a GPU
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()
