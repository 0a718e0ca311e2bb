"""The shipped model, exported as a user would."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open

from engines.onnx_runtime import computes_in_bf16
from export import exporter
from export.context import ExportJob
from export.exporter import ExportLimits, ExportOptions, axis_ranges, export_bundle, locate_checkpoint
from mige_rt.bundle import DEFAULT_MODEL, MANIFEST, read_manifest
from mige_rt.cli import main
from mige_rt.config import PRESETS
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS
from mige_rt.pipeline import MigePipeline
from trainer.evaluate.metrics import psnr

Bundles = Callable[[str], Path]
EXPORT = [sys.executable, "-m", "mige_rt.cli", "export", "--no-validate"]


@pytest.fixture
def copy(bundles: Bundles, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(bundles("fp32"), tmp_path / "bundle"))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 40), ("fp16", 30), ("int8", 30)])
def test_a_bundle_makes_pytorchs_image(
    bundles: Bundles, scene: Image.Image, reference: Image.Image, precision: str, limit: float
) -> None:
    ours = MigePipeline.from_pretrained(bundles(precision), device="cpu")
    theirs = MigePipeline.from_pretrained(engine="pytorch", device="cpu")
    assert (ours.engine.name, ours.engine.precision) == ("onnxruntime", precision)
    prompt = "replace the thing in <imagehere> with <imagehere>"
    made = [
        np.asarray(p(prompt, [scene, reference], scene, seed=3, num_inference_steps=8).images[0])
        for p in (ours, theirs)
    ]
    assert psnr(made[0], made[1]) >= limit
    made = [
        np.asarray(p("a <imagehere>", [reference], seed=4, num_inference_steps=8).images[0]) for p in (ours, theirs)
    ]
    assert psnr(made[0], made[1]) >= limit


def test_the_report_has_a_comparison_of_every_graph_and_of_images(bundles: Bundles) -> None:
    report = json.loads((bundles("fp32") / "report.json").read_text())
    assert list(report["graphs"]) == list(GRAPHS)
    for result in (*report["graphs"].values(), report["pipeline"]):
        assert result["checks"] and all(check["ok"] for check in result["checks"])
    assert read_manifest(bundles("fp32")).validated


def test_graphs_take_any_number_of_pictures_words_and_any_size(bundles: Bundles) -> None:
    for graph in GRAPHS:
        model = onnx.load(bundles("fp32") / f"onnx/{graph}.onnx", load_external_data=False)
        named = {dim.dim_param for port in model.graph.input for dim in port.type.tensor_type.shape.dim}
        wanted = {axis for port in GRAPHS[graph].inputs for axis in port.axes} & {"N", "M", "B", "R", "L", "h", "w"}
        assert wanted <= named, graph
        assert [port.name for port in model.graph.input] == [port.name for port in GRAPHS[graph].inputs]
        assert [port.name for port in model.graph.output] == [port.name for port in GRAPHS[graph].outputs]


def test_nothing_tells_of_the_machine_it_was_made_on(bundles: Bundles) -> None:
    for path in bundles("fp32").rglob("*"):
        if path.is_file() and path.suffix in (".onnx", ".json"):
            content = path.read_bytes()
            assert b".py" not in content and b"site-packages" not in content, path.name
            assert str(Path(__file__).parents[2]).encode() not in content, path.name


def test_weights_are_kept_as_the_checkpoint_has_them(bundles: Bundles) -> None:
    with safe_open(bundles("fp32") / "onnx/denoiser.safetensors", framework="np") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {np.dtype(np.float16)}  # noqa: SIM118
    size = sum(path.stat().st_size for path in bundles("fp32").rglob("*") if path.is_file())
    assert size < 20 * 2**20


def test_equal_inputs_give_equal_graphs_and_manifest(bundles: Bundles, tmp_path: Path) -> None:
    unvalidated = ExportOptions(validate=False)
    export_bundle("tiny", tmp_path / "again", "fp32", ExportLimits(4, 4, (32, 128)), options=unvalidated)
    for path in (bundles("fp32")).rglob("*"):
        name = path.relative_to(bundles("fp32"))
        if path.is_file() and name.name not in ("report.json", MANIFEST) and "engines" not in name.parts:
            assert (tmp_path / "again" / name).read_bytes() == path.read_bytes(), name
    manifests = [json.loads((folder / MANIFEST).read_text()) for folder in (bundles("fp32"), tmp_path / "again")]
    assert manifests[0] | {"validated": False} == manifests[1]


def test_a_bundle_can_be_exported_again_and_run_by_pytorch(bundles: Bundles, scene: Image.Image) -> None:
    pipes = [MigePipeline.from_pretrained(m, engine="pytorch", device="cpu") for m in (bundles("fp16"), DEFAULT_MODEL)]
    made = [
        np.asarray(p("make the background blue", source=scene, seed=1, num_inference_steps=4).images[0]) for p in pipes
    ]
    assert psnr(made[0], made[1]) > 50
    assert "int8" in refusal(lambda: MigePipeline.from_pretrained(bundles("int8"), engine="pytorch", device="cpu"))


def test_damage_is_named(copy: Path) -> None:
    path = copy / "onnx/denoiser.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    said = refusal(lambda: MigePipeline.from_pretrained(copy))
    assert "denoiser.safetensors was changed" in said
    assert read_manifest(copy).graphs["denoiser"].weights.sha256 in said and f"{len(content)} bytes" in said
    path.write_bytes(content[:-10])
    assert f"has {len(content) - 10} bytes" in refusal(lambda: MigePipeline.from_pretrained(copy))
    path.unlink()
    assert "denoiser.safetensors is missing" in refusal(lambda: MigePipeline.from_pretrained(copy))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 3}, "has schema 3, this version of mige-rt reads 2: upgrade"),
        ({"schema": 1}, "has schema 1, this version of mige-rt reads 2: export the bundle again with: mige-rt export"),
        ({"tokenizer": {"path": "../tokenizer.json", "bytes": 1, "sha256": ""}}, "outside the bundle"),
        ({"tokenizer": {"path": "/etc/passwd", "bytes": 1, "sha256": ""}}, "outside the bundle"),
        ({"graphs": {}}, "graphs vae_encoder"),
        ({"ranges": {"B": {"min": 1}}}, "is damaged"),
        ({"ranges": {}}, "a range for each"),
        ({"validated": "x"}, "validated is 'x', expected true or false"),
        ({"precision": []}, "precision is [], expected 'fp32'"),
        ({"versions": {"torch": 2}}, "versions.torch is 2, expected a string"),
        ({"model": {}}, "missing config"),
    ],
)
def test_a_manifest_that_cannot_be_used(copy: Path, change: dict, said: str) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(content | change))
    assert said in refusal(lambda: MigePipeline.from_pretrained(copy))


def test_auto_passes_over_what_cannot_run_here(copy: Path) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    for graph in content["graphs"].values():
        graph["precision"] = dict.fromkeys(graph["precision"], "bfloat16")
    (copy / MANIFEST).write_text(json.dumps(content | {"precision": "bf16"}))
    assert MigePipeline.from_pretrained(copy, device="cpu", precision="fp32").engine.name == "pytorch"
    assert "does not compute in bf16" in refusal(
        lambda: MigePipeline.from_pretrained(copy, engine="onnxruntime", device="cpu")
    )


def test_limits_are_said_with_the_option_that_raises_them(
    bundles: Bundles, scene: Image.Image, reference: Image.Image
) -> None:
    pipe = MigePipeline.from_pretrained(bundles("fp32"), device="cpu")
    said = refusal(lambda: pipe(["a red apple"] * 5, num_inference_steps=2))
    assert "5 images made at once" in said and "1 to 4" in said and "--max-batch" in said
    said = refusal(lambda: pipe("a red apple", width=192, height=64, num_inference_steps=2))
    assert "192 pixels of width" in said and "32 to 128" in said and "--sizes" in said
    pipe(
        " ".join(["<imagehere>"] * 17), images=[reference.copy() for _ in range(17)], num_inference_steps=2
    )  # one image
    many = [reference.rotate(5 * k) for k in range(17)]
    said = refusal(lambda: pipe(" ".join(["<imagehere>"] * 17), images=many, num_inference_steps=2))
    assert "17 images that prompts refer to" in said and "--max-references" in said
    assert pipe("a red apple", width=128, height=32, num_inference_steps=2).images[0].size == (128, 32)


def test_what_cannot_be_asked_for(bundles: Bundles, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "expected one of fp32, fp16, bf16, int8" in refusal(lambda: export_bundle("tiny", out, "fp4"))
    assert "is no path here" in refusal(lambda: export_bundle("nobody/nothing", out, "fp32"))
    assert "multiples of 8 pixels" in refusal(lambda: export_bundle("tiny", out, "fp32", ExportLimits(4, 4, (30, 60))))
    assert "at most 63" in refusal(lambda: export_bundle("tiny", out, "fp32", ExportLimits(16, 16)))
    asked = "exported in fp32, and fp16 was asked for"
    assert asked in refusal(
        lambda: MigePipeline.from_pretrained(bundles("fp32"), engine="onnxruntime", precision="fp16")
    )
    assert not list(tmp_path.iterdir())
    result = CliRunner().invoke(main, ["export", "--out", str(out), "--size", "64", "--sizes", "32-64"])
    assert result.exit_code == 2 and "either --size or --sizes" in result.output


def test_a_fixed_size_is_fixed_but_for_the_encoder_of_references() -> None:
    ranges = axis_ranges(PRESETS["xl"], ExportLimits(1, 2, (1024, 1024)))
    assert (ranges["h"].min, ranges["h"].max) == (128, 128)
    assert (ranges["eh"].min, ranges["eh"].opt, ranges["eh"].max) == (64, 64, 128)
    assert ranges["N"].max == 2 and ranges["R"].max == 3


def test_a_killed_export_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    process = subprocess.Popen([*EXPORT, "--out", str(tmp_path / "out")])
    while not list(tmp_path.glob("out.partial-*/onnx")):
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    for left in tmp_path.iterdir():
        assert "no model" in refusal(lambda folder=left: MigePipeline.from_pretrained(folder))


def test_a_graph_that_fails_ends_the_one_that_was_begun_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker at a time, as for large models: the first graph fails, any other ends by itself, and says so."""
    worker = (
        "import json, pathlib, sys, time\n"
        "job = json.load(sys.stdin)\n"
        "if job['graph'] == 'vae_encoder': sys.exit(print(json.dumps({'error': 'it is damaged'})))\n"
        "time.sleep(5)\n"
        "pathlib.Path(job['bundle'], job['graph']).touch()\n"
    )
    monkeypatch.setattr(exporter, "WORKER", (sys.executable, "-c", worker))
    job = ExportJob(None, locate_checkpoint("tiny"), tmp_path, "fp32", {}, validate=False, small=False)
    for _ in range(3):  # a thread takes the next graph before or after the failure is noticed
        run = partial(
            exporter._Jobs(job, accept_failures=False, on_progress=None).run_graphs, dict.fromkeys(GRAPHS, "fp32")
        )
        assert "vae_encoder: it is damaged" in refusal(run)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [100_000, pytest.param(800_000, marks=pytest.mark.long)])
def test_a_full_disk_is_said(tmp_path: Path, room: int) -> None:
    """A file that may not grow past `room` bytes stands for it: the system's answer is of the same kind.

    The smaller stops the tokenizer, the larger a graph's weights.
    """
    run = subprocess.run(
        [*EXPORT, "--out", str(tmp_path / "out")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert run.returncode == 2 and "make room" in run.stderr
    assert not list(tmp_path.iterdir())


def test_info_shows_what_is_inside(bundles: Bundles) -> None:
    result = CliRunner().invoke(main, ["info", str(bundles("fp16")), "--json", "--verify"])
    content = json.loads(result.output)
    assert content["graphs"]["text_encoder"]["precision"]["residual"] == "float32"
    assert content["checks"]["images"]["rms"] < content["checks"]["images"]["limit"]
    assert content["verified"] and content["ranges"]["B"] == {"min": 1, "opt": 1, "max": 4}
    shown = CliRunner().invoke(main, ["info", str(bundles("fp16"))]).output
    assert "denoiser" in shown and "compared with PyTorch" in shown and "float16" in shown
    assert CliRunner().invoke(main, ["info", "nowhere"]).exit_code == 2


def test_t5_can_be_bfloat16_in_an_fp16_bundle(tmp_path: Path, scene: Image.Image) -> None:
    """For plans: its feed-forward products need no float32 then, which take a fifth of its memory at full size."""
    out = tmp_path / "bundle"
    export_bundle(
        "tiny", out, "fp16", ExportLimits(1, 1), options=ExportOptions(bf16_text_encoder=True, validate=False)
    )
    manifest = read_manifest(out)
    for graph, entry in manifest.graphs.items():
        with safe_open(out / entry.weights.path, framework="pt") as file:
            types = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, it is no dict
        assert types == ({"BF16"} if graph == "text_encoder" else {"F16"}), graph
        assert computes_in_bf16(entry) == (graph == "text_encoder")
    pipe = MigePipeline.from_pretrained(out, device="cpu")  # ONNX Runtime's CPU has no bfloat16
    assert pipe.engine.name == "pytorch"
    with pytest.raises(InputError, match="does not compute in bf16"):
        MigePipeline.from_pretrained(out, engine="onnxruntime", device="cpu")
    exact = MigePipeline.from_pretrained(device="cpu")
    images = [p("make it blue", source=scene, seed=1, num_inference_steps=4).images[0] for p in (exact, pipe)]
    assert psnr(*map(np.asarray, images)) > 25


def test_t5_is_bfloat16_beside_fp16_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="goes with the precision fp16, and int8 was given"):
        export_bundle("tiny", tmp_path / "b", "int8", options=ExportOptions(bf16_text_encoder=True))
    assert not list(tmp_path.iterdir())
