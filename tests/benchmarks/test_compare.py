"""`mige-rt compare`: what passes, what fails and where it is said to, and what is left of a comparison cut short."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from benchmarks.compare import write_grid
from benchmarks.parity import ImageErrors, ImageParity, compare_pipelines, tolerance
from engines.interface import EngineOptions
from engines.pytorch import PyTorchEngine
from export import validate
from export.inputs import SAMPLES
from mige_rt.bundle import DEFAULT_MODEL, open_model
from mige_rt.cli import main
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import read_requests
from mige_rt.sampling_params import SamplingParams
from trainer.contact_sheet import CELL

ASSETS = Path(__file__).parents[1] / "data" / "synthetic"
REQUESTS = read_requests(SAMPLES / "requests.jsonl")
EDIT = {"3-recolour": REQUESTS["3-recolour"]}
SHORT = SamplingParams(num_inference_steps=2)
OUTPUTS = {f"{graph}: {port.name}" for graph in GRAPHS for port in GRAPHS[graph].outputs}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """One edit and one new picture."""
    lines = (SAMPLES / "requests.jsonl").read_text().splitlines()
    for number in (1, 5):
        (tmp_path / f"picture-{number}.png").write_bytes((SAMPLES / f"picture-{number}.png").read_bytes())
    (tmp_path / "prompts.jsonl").write_text("\n".join([lines[0], "", lines[2]]) + "\n")
    return tmp_path / "prompts.jsonl"


def _run(out: Path, *options: str | Path) -> Result:
    words = ["compare", "--device", "cpu", "--steps", "2", "--seeds", "1", "--out", out, *options]
    return CliRunner().invoke(main, [str(word) for word in words])


def _content(out: Path) -> dict:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((out / "compare.json").read_text(), parse_constant=refuse)


def _failed(content: dict) -> set[str]:
    return {metric["name"] for metric in content["metrics"] if not metric["ok"]}


# --- verdicts ---


def test_the_shipped_model_passes(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _run(out, "--prompts", prompts, "--candidate", "onnxruntime", "--seeds", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    assert "onnxruntime on cpu in fp32 (tiny) is what pytorch on cpu in fp32 (tiny) computes" in result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.md", "grid.png"]

    content = _content(out)
    assert content["ok"] and content["complete"]
    assert (content["reference"]["engine"], content["candidate"]["engine"]) == ("pytorch", "onnxruntime")
    assert content["command"].startswith("mige-rt compare --candidate onnxruntime --device cpu --prompts ")
    assert [(p["name"], p["seed"]) for p in content["images"]] == [
        *(("1-generate", 1), ("1-generate", 2), ("3-recolour", 3), ("3-recolour", 4))
    ]
    metrics = {metric["name"]: metric for metric in content["metrics"]}
    assert metrics.keys() >= OUTPUTS | {"final latents", "PSNR", "SSIM", "largest pixel difference, of 255"}
    # Two runtimes round differently: an error of nothing would mean that one was compared with itself.
    assert all(0 < metrics[port]["value"] < 5e-6 for port in OUTPUTS)
    calls = {error["graph"]: error["calls"] for error in content["images"][2]["graphs"]}
    assert calls["denoiser"] == 2 and calls["vae_encoder"] == 1 and calls["vae_decoder"] == 1

    text = (out / "compare.md").read_text()
    assert all(f"| {name} " in text for name in metrics) and "(grid.png)" in text and content["verdict"] in text
    assert "FAILED" not in text + result.stderr
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 2 * 3 * CELL and grid.height > 2 * CELL


@pytest.mark.parametrize(
    ("graph", "weight"),
    [
        ("conditioner", "kv_linears.3.weight"),
        ("image_encoder", "projection.weight"),
        ("denoiser", "x_embedder.proj.weight"),
    ],
)
def test_another_model_fails_in_the_graph_that_differs(
    other_model: Callable[..., Path], prompts: Path, tmp_path: Path, graph: str, weight: str
) -> None:
    out = tmp_path / "out"
    changed = other_model(graph, weight, 1.5)
    models = ["--model", changed, "--reference-model", DEFAULT_MODEL, "--candidate", "onnxruntime"]
    result = _run(out, "--prompts", prompts, *models)
    assert result.exit_code == 1, result.output
    content = _content(out)
    assert not content["ok"] and content["complete"]
    assert {port for port in _failed(content) if port in OUTPUTS} == {
        port for port in OUTPUTS if port.startswith(graph)
    }
    assert "final latents" in _failed(content)
    assert f"not what pytorch on cpu in fp32 (tiny) computes: out of tolerance are {graph}: " in result.stderr
    assert "FAILED" in (out / "compare.md").read_text()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the weights are kept in half precision
def test_a_model_that_overflows_fails_and_is_shown(
    other_model: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    out, changed = tmp_path / "out", other_model("denoiser", "final_layer.linear.weight", 1e36)
    models = ["--model", changed, "--reference-model", DEFAULT_MODEL, "--candidate", "onnxruntime", "--trust"]
    result = _run(out, "--prompts", prompts, *models)
    assert result.exit_code == 1, result.output
    content = _content(out)
    assert {"denoiser: prediction", "final latents", "PSNR", "SSIM"} <= _failed(content)
    assert all(image["latents"] is None for image in content["images"])
    assert "not finite" in (out / "compare.md").read_text()


def test_half_precision_has_its_own_tolerance(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _run(out, "--prompts", prompts, "--candidate", "pytorch", "--precision", "bf16")
    assert result.exit_code == 0, result.output
    content = _content(out)
    assert content["tolerance"]["graph"] == validate.TOLERANCES["bf16"]
    errors = [metric["value"] for metric in content["metrics"] if metric["name"] in OUTPUTS]
    assert max(errors) > validate.TOLERANCES["fp32"]  # what passes here would fail there


def test_engines_of_two_kinds_of_arrays_are_compared(pipe: MigePipeline) -> None:
    engine = PyTorchEngine.open(open_model(DEFAULT_MODEL), EngineOptions(device="cpu", precision="bf16"))
    engine.device = "cpu:0"  # as on a GPU: tensors in and out, in bfloat16 between graphs, which NumPy does not have
    tensors = MigePipeline(pipe.config, pipe.condition_encoder.tokenize, engine)
    for reference, candidate in ((pipe, tensors), (tensors, pipe)):
        found = compare_pipelines(reference, candidate, EDIT, 1, SHORT)
        assert found.ok and len(found.images[0].graphs) == len(OUTPUTS), found.metrics


def test_the_wider_tolerance_of_two_precisions_counts() -> None:
    assert tolerance("fp32", "int8") == tolerance("int8", "fp32") == tolerance("int8")
    one, other = tolerance("fp32"), tolerance("fp16")
    assert one.graph < other.graph and one.latents < other.latents
    assert one.psnr > other.psnr and one.ssim > other.ssim


def test_settings_of_one_engine_can_be_compared(pipe: MigePipeline) -> None:
    same = compare_pipelines(pipe, pipe, EDIT, 1, SHORT, SHORT)
    assert same.ok and same.images[0].errors.latents == 0 and same.images[0].errors.max_difference == 0
    assert not same.images[0].graphs
    other = compare_pipelines(
        pipe,
        pipe,
        EDIT,
        1,
        SHORT,
        replace(SHORT, guidance_scale=9),
    )
    assert not other.ok and other.images[0].errors.max_difference > 10


def test_models_of_two_sizes_are_not_compared(pipe: MigePipeline) -> None:
    wider = replace(pipe.config, name="wider", dit=replace(pipe.config.dit, width=384))
    with pytest.raises(InputError, match=r"tiny and wider are models of different sizes"):
        compare_pipelines(
            pipe,
            MigePipeline(wider, pipe.condition_encoder.tokenize, pipe.engine),
            EDIT,
            1,
            SHORT,
        )


# --- what cannot be used, and what is cut short ---


def test_bad_input_costs_2_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "make it blue"}\n{"prompt": "a <imagehere>"}\n')
    (tmp_path / "exists").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for out, options, words in (
        ("out", ["--candidate", "tensorrt"], "tensorrt"),
        ("out", ["--candidate", "steam"], "steam"),
        ("out", ["--model", tmp_path / "none"], "none is no model folder"),
        ("out", ["--precision", "int8", "--candidate", "onnxruntime"], "exported in fp32"),
        ("out", ["--prompts", tmp_path / "empty.jsonl"], "holds no line"),
        ("out", ["--prompts", tmp_path / "bad.jsonl"], "bad.jsonl line 2: the prompt has 1 <imagehere> and 0 images"),
        ("out", ["--prompts", tmp_path / "none.jsonl"], "none.jsonl"),
        ("out", ["--seeds", "0"], "0"),
        ("out", ["--steps", "1"], "steps"),
        ("exists", [], "exists already"),
        ("none/out", [], "cannot be written"),
    ):
        result = _run(tmp_path / out, *options)
        said = " ".join(result.output.split())
        assert result.exit_code == 2 and words in said, result.output
        assert sorted(tmp_path.rglob("*")) == before


def _interrupt_after(done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the user pressed Ctrl-C when so many pictures were compared."""

    @contextmanager
    def progress(description: str) -> Iterator[Callable[[str, int, int], None]]:
        def advance(description: str, now: int, total: int) -> None:
            if now == done:
                raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr(sys.modules["mige_rt.cli.compare"], "progress", progress)


def test_ctrl_c_keeps_what_was_done(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt_after(1, monkeypatch)
    out = tmp_path / "out"
    result = _run(out, "--prompts", prompts)
    assert result.exit_code == 130, result.output
    content = _content(out)
    assert not content["complete"] and content["requested"] == 2 and len(content["images"]) == 1
    assert "incomplete" in content["verdict"] and "1 of 2 images" in (out / "compare.md").read_text()
    assert "incomplete" in result.stderr
    assert (out / "grid.png").is_file()


def test_ctrl_c_before_anything_was_done_leaves_nothing(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt_after(0, monkeypatch)
    assert _run(tmp_path / "out", "--prompts", prompts).exit_code == 1
    assert not list(tmp_path.glob("out*"))


# --- the files ---


def _parity(number: int, difference: int) -> ImageParity:
    """Two pictures that differ in the red of their upper half."""
    truth = np.full((64, 64, 3), (100, 150, 200), np.uint8)
    made = truth.copy()
    made[:32, :, 0] += np.uint8(difference)
    both = Image.fromarray(truth), Image.fromarray(made)
    errors = ImageErrors(0.0, 50.0 - number, 1.0, difference)
    return ImageParity(f"p{number}", "words", "edit", 0, (), errors, *both)


@pytest.mark.parametrize(("difference", "gain"), [(0, 64), (3, 64), (9, 16), (150, 1)])
def test_a_difference_is_amplified_alike_in_every_picture(tmp_path: Path, difference: int, gain: int) -> None:
    assert write_grid([_parity(0, difference), _parity(1, difference // 3)], tmp_path / "grid.png") == gain
    with Image.open(tmp_path / "grid.png") as grid:
        seen = {colour for _, colour in grid.getcolors(10**6) or []}
    assert {
        (100, 150, 200),
        (100 + difference, 150, 200),
        (difference * gain, 0, 0),
        (difference // 3 * gain, 0, 0),
    } <= seen


def test_of_many_pictures_the_grid_has_the_worst(tmp_path: Path) -> None:
    for number in (24, 30):
        write_grid([_parity(k, k) for k in range(number)], tmp_path / f"{number}.png")
    with Image.open(tmp_path / "24.png") as all_of_them, Image.open(tmp_path / "30.png") as some:
        assert all_of_them.size == some.size
        colours = {colour for number, colour in some.getcolors(10**6) or [] if number > 1000}  # not those at edges
        assert (129, 150, 200) in colours and (105, 150, 200) not in colours
