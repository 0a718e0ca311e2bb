import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from PIL import Image
from safetensors import safe_open

import export.exporter
from mige_rt.bundle import DEFAULT_MODEL, MANIFEST, file_entry, read_manifest
from mige_rt.graphs import GraphName
from mige_rt.known_files import CACHE_VARIABLE
from mige_rt.pipeline import MigePipeline
from trainer.preview import first_of_each_kind
from trainer.synthetic.concepts import Concept, load_concepts
from trainer.synthetic.tasks import Sample

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

sys.path.insert(0, str(Path(__file__).parent / "stubs"))
from cuda_stubs import cuda  # noqa: F401, a fixture

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore, and their children
DATA = Path(__file__).parent / "data"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of the whole run, which its processes share (`pytest -n 2`)."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def own_cache(common_folder: Path) -> Iterator[None]:
    """What is remembered of bundles goes to a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(CACHE_VARIABLE, str(common_folder / "cache"))
        yield


@pytest.fixture(scope="session")
def concepts() -> list[Concept]:
    """Twelve concepts of the small world, two of them held out."""
    return load_concepts(DATA / "synthetic")


@pytest.fixture(scope="session")
def pipe() -> MigePipeline:
    """The shipped default model."""
    return MigePipeline.from_pretrained(device="cpu")


@pytest.fixture(scope="session")
def samples(concepts: list[Concept]) -> dict[str, Sample]:
    """The first sample of every kind of task."""
    return {sample.kind: sample for sample in first_of_each_kind(concepts, 64, 0, 1)}


@pytest.fixture(scope="session")
def bundles(common_folder: Path) -> Callable[[str], Path]:
    """Bundles of the default model by precision, validated, exported when first asked for; not to be changed."""

    @cache
    def bundle(precision: str) -> Path:
        out = common_folder / f"bundle-{precision}"
        with FileLock(f"{out}.lock"):
            if not out.exists():
                export.exporter.export_bundle("tiny", out, precision, export.exporter.ExportLimits(4, 4, (32, 128)))
        return out

    return bundle


@pytest.fixture(scope="session")
def change_a_weight() -> Callable[[Path, str, float], None]:
    """Multiplies one weight in a safetensors file, where it lies."""

    def change(path: Path, name: str, factor: float) -> None:
        with safe_open(path, framework="np") as file:
            values = file.get_tensor(name)
        content = path.read_bytes()
        assert content.count(values.tobytes()) == 1
        path.write_bytes(content.replace(values.tobytes(), (values * factor).astype(values.dtype).tobytes()))

    return change


@pytest.fixture
def other_model(change_a_weight: Callable[[Path, str, float], None], tmp_path: Path) -> Callable[..., Path]:
    """Copies of a bundle that are really other models: one weight is multiplied, and the manifest agrees with it."""

    def make(graph: GraphName, weight: str, factor: float, bundle: Path = DEFAULT_MODEL) -> Path:
        folder = Path(shutil.copytree(bundle, tmp_path / f"other-{graph}"))
        change_a_weight(folder / f"onnx/{graph}.safetensors", weight, factor)
        manifest = read_manifest(folder)
        entry = replace(manifest.graphs[graph], weights=file_entry(folder, f"onnx/{graph}.safetensors"))
        changed = replace(manifest, graphs={**manifest.graphs, graph: entry})
        (folder / MANIFEST).write_text(json.dumps(changed.to_json()))
        return folder

    return make


@pytest.fixture
def scene(samples: dict[str, Sample]) -> Image.Image:
    """A 64 x 64 scene to edit."""
    source = samples["replace"].source
    assert source is not None
    return Image.fromarray(source)


@pytest.fixture
def reference(samples: dict[str, Sample]) -> Image.Image:
    """A 64 x 64 image of one thing."""
    return Image.fromarray(samples["generate"].images[0])


@pytest.fixture
def browser(chromium: "Chrome") -> "Chrome":
    """A browser that shows no page, and has logged nothing."""
    chromium.get("about:blank")
    chromium.get_log("browser")  # which empties it
    return chromium


@pytest.fixture(scope="session")
def chromium() -> "Iterator[Chrome]":
    # Here, since machines that only run tests/gpu have no selenium.
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

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
