"""What a worker opens and writes."""

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from export import worker
from export.context import ExportJob
from export.exporter import ExportLimits, ExportOptions, axis_ranges, export_bundle, locate_checkpoint
from export.results import GraphResult
from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE, open_model, read_config, read_manifest
from mige_rt.config import DiTConfig, ModelConfig, QFormerConfig, TextConfig, VAEConfig, VisionConfig
from mige_rt.graphs import GRAPHS, GraphName
from trainer.checkpoints import model_folder
from trainer.checkpoints.convert_published import convert
from trainer.checkpoints.mapped_files import release_pages
from trainer.checkpoints.model_folder import SafetensorsCheckpoint, load_model
from trainer.checkpoints.open_checkpoint import open_checkpoint
from trainer.checkpoints.published_names import optional_shapes, our_tensor, published_shapes
from trainer.checkpoints.weights import our_shapes
from trainer.model.vae import make_vae
from trainer.tokenizer import from_spiece

Opened = Counter[str]
SPIECE = Path(__file__).parents[1] / "data" / "reference" / "spiece.model"


@dataclass(frozen=True)
class Published:
    """A checkpoint in the published layout, of random weights, at a size for tests."""

    folder: Path
    config: ModelConfig


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A published checkpoint; not to be changed."""
    config = ModelConfig(
        name="small",
        vision=VisionConfig(side=28, patch=14, width=32, depth=2, heads=4, mlp=48),
        qformer=QFormerConfig(width=24, depth=3, heads=4, mlp=40, queries=4, fusion_heads=4),
        text=TextConfig(vocabulary=1300, width=32, head_width=8, mlp=48, depth=2, heads=4),
        dit=DiTConfig(width=32, depth=2, heads=4, mlp=64, trained_grid=4),
        vae=VAEConfig(widths=(8, 16), layers=1, groups=4),
    )
    folder = tmp_path_factory.mktemp("published")
    generator = torch.Generator().manual_seed(0)
    required, optional = published_shapes(config), optional_shapes(config)
    shapes = required | {key: shape for key, shape in optional.items() if "position_ids" in key}
    state = {key: (0.1 * torch.randn(shape, generator=generator)).bfloat16() for key, shape in shapes.items()}
    torch.save({"state_dict": state}, folder / "model.pth")
    torch.manual_seed(1)
    make_vae(config.vae).save_pretrained(folder / "sd-vae-ft-ema")
    (folder / "t5-v1_1-xxl").mkdir()
    shutil.copy(SPIECE, folder / "t5-v1_1-xxl")
    return Published(folder, config)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """How often the checkpoint was opened, under "checkpoint", and each of its files, under its name."""
    counts: Opened = Counter()

    def counted(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name(*args)] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(worker, "open_checkpoint", counted(open_checkpoint, lambda location: "checkpoint"))
    monkeypatch.setattr(torch, "load", counted(torch.load, lambda path, *_: Path(path).name))
    monkeypatch.setattr(model_folder, "safe_open", counted(model_folder.safe_open, lambda path: path.name))
    return counts


@pytest.fixture(scope="session")
def converted(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published checkpoint as a model folder."""
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(published.folder, out, config=published.config)
    return out


def do(graph: GraphName, checkpoint: Path, config: ModelConfig, bundle: Path, **changes: Any) -> GraphResult:
    """A worker's job, done in this process."""
    location = locate_checkpoint(str(checkpoint), ExportOptions(config=config))
    bundle.mkdir(exist_ok=True)
    (bundle / "onnx").mkdir(exist_ok=True)
    (bundle / TOKENIZER_FILE).parent.mkdir(exist_ok=True)
    if (checkpoint / TOKENIZER_FILE).is_file():
        shutil.copy(checkpoint / TOKENIZER_FILE, bundle / TOKENIZER_FILE)
    else:
        from_spiece(SPIECE).save(str(bundle / TOKENIZER_FILE))
    ranges = axis_ranges(config, ExportLimits(1, 2))
    job = {"precision": "bf16", "validate": True, "small": False} | changes
    result = worker.work(ExportJob(graph, location, bundle, ranges=ranges, **job), lambda phase: None)
    assert isinstance(result, GraphResult)
    return result


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_worker_opens_the_published_checkpoint_once(
    published: Published, tmp_path: Path, graph: GraphName, opened: Opened
) -> None:
    result = do(graph, published.folder, published.config, tmp_path / "bundle")
    assert result.checks and all(check.ok for check in result.checks)
    assert opened == {"checkpoint": 1, "model.pth": 1}


def test_a_worker_opens_each_file_of_a_model_folder_once(
    published: Published, converted: Path, tmp_path: Path, opened: Opened
) -> None:
    do("denoiser", converted, published.config, tmp_path / "bundle")
    files = {path.name for path in SafetensorsCheckpoint(open_model(converted)).files}
    assert opened == {"checkpoint": 1} | dict.fromkeys(files, 1)


def test_a_worker_opens_each_file_of_a_bundle_once(tmp_path: Path, opened: Opened) -> None:
    do("denoiser", DEFAULT_MODEL, read_config(DEFAULT_MODEL), tmp_path / "bundle")
    used = ("vae_encoder", "image_encoder", "text_encoder", "conditioner", "denoiser")
    assert opened == {"checkpoint": 1} | {f"{graph}.safetensors": 1 for graph in used}


@pytest.mark.parametrize("graph", ["vae_encoder", "image_encoder"])
def test_published_weights_give_the_files_that_their_model_folder_gives(
    published: Published, converted: Path, tmp_path: Path, graph: GraphName
) -> None:
    for folder, checkpoint in (("direct", published.folder), ("converted", converted)):
        do(graph, checkpoint, published.config, tmp_path / folder, precision="fp32", validate=False)
    for name in (f"onnx/{graph}.onnx", f"onnx/{graph}.safetensors"):
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes(), name


def test_published_weights_are_exported_without_another_copy(
    published: Published, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    written: set[str] = set()

    def look(what: str, done: int, total: int) -> None:
        paths = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
        written.update(path.parts[0].partition(".partial-")[0] + "/" + "/".join(path.parts[1:]) for path in paths)

    options = ExportOptions(config=published.config, validate=False)
    limits = ExportLimits(1, 2)
    result = export_bundle(str(published.folder), tmp_path / "out", "fp32", limits, options=options, on_progress=look)
    bundle = {f"out/onnx/{graph}.{suffix}" for graph in GRAPHS for suffix in ("onnx", "safetensors")}
    assert f"out/{TOKENIZER_FILE}" in written  # the test's own premise
    assert {path for path in written if not path.startswith("temporary/")} <= bundle | {f"out/{TOKENIZER_FILE}"}
    assert not any(path.endswith((".safetensors", ".pth", ".bin")) for path in written - bundle)

    assert read_manifest(tmp_path / "out") == result.manifest
    assert (tmp_path / "out" / TOKENIZER_FILE).read_bytes() == (converted / TOKENIZER_FILE).read_bytes()
    state = torch.load(published.folder / "model.pth", weights_only=True)["state_dict"]
    exported = load_model(tmp_path / "out", dtype=None).state_dict()
    assert all(torch.equal(exported[name], our_tensor(state, name)) for name in our_shapes(published.config))


def test_exporting_does_not_import_the_synthetic_data() -> None:
    code = """if True:
        import sys
        import export.build_plans, export.exporter, export.rehearse, export.table, export.worker
        print(*(name for name in sys.modules if name.startswith(("trainer.synthetic", "trainer.preview"))))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system alone reclaims the pages of mapped files")
def test_pages_that_are_released_take_no_memory_and_are_read_again(tmp_path: Path) -> None:
    from safetensors import safe_open

    def mapped_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    size = 64 * 2**20
    save_file({"weight": torch.ones(size, dtype=torch.uint8)}, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        weight = file.get_tensor("weight")
        before = mapped_bytes()
        assert int(weight.sum()) == size
        assert mapped_bytes() - before > 0.9 * size
        release_pages([tmp_path / "weights.safetensors"])
        assert mapped_bytes() - before < 0.1 * size
        assert int(weight.sum()) == size
