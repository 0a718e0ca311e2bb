"""Real plans, built with TensorRT for RTX, which needs no GPU for it; running them is for tests/gpu."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from engines.plans import SIDECAR, Machine, NoPlanError, check_plans, find_plans, read_plans
from export import build_plans as tensorrt
from export.build_plans import PLAN_OPTIONS, PORTABLE, build, profile
from export.plan_job import PlanJob
from export.plan_worker import BuildError, work
from mige_rt.bundle import MANIFEST, OpenedModel, check_files, read_manifest
from mige_rt.cli import main
from mige_rt.errors import InputError, NotAvailableError
from mige_rt.graphs import GRAPHS, AxisRange

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (or not made for this system)")

Bundles = Callable[[str], Path]


@pytest.fixture
def bundle(bundles: Bundles, tmp_path: Path) -> Path:
    """A bundle of our own to build in."""
    return Path(shutil.copytree(bundles("fp32"), tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the smallest graph alone."""
    monkeypatch.setattr(tensorrt, "GRAPHS", {"conditioner": GRAPHS["conditioner"]})


def limited(limit: str, size: int) -> tuple[str, ...]:
    """The worker under a limit of the system."""
    code = f"""if True:
        import resource, tensorrt_rtx, export.plan_worker
        resource.setrlimit(resource.{limit}, ({size}, {size}))
        export.plan_worker.main()
    """
    return sys.executable, "-c", code


def left(bundle: Path) -> list[str]:
    return [path.name for path in (bundle / "engines").iterdir()] if (bundle / "engines").exists() else []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_all_six_graphs_become_plans(bundles: Bundles, tmp_path: Path, precision: str) -> None:
    bundle = Path(shutil.copytree(bundles(precision), tmp_path / "bundle"))
    said: list[tuple[str, int, int]] = []
    folder = build(bundle, "tensorrt-rtx", ["8.9"], lambda *progress: said.append(progress))
    (made,) = read_plans(bundle)
    manifest = read_manifest(bundle)
    assert made.folder == folder and left(bundle) == [made.fingerprint]
    assert made.target.version == trt.__version__ and made.target.capabilities == ("8.9",)
    assert made.precision == precision and made.options == vars(PLAN_OPTIONS)
    assert sorted(path.name for path in folder.iterdir()) == sorted([SIDECAR, *(f"{graph}.plan" for graph in GRAPHS)])
    for graph, entry in made.graphs.items():
        assert entry.onnx == manifest.graphs[graph].onnx.sha256
        # The weights, and little beside them.
        assert entry.plan.bytes > manifest.graphs[graph].weights.bytes / 2
        assert entry.seconds > 0 and (entry.peak_bytes is None or entry.peak_bytes > entry.plan.bytes)
    check_plans(bundle, made, everything=True)
    check_files(bundle, manifest)
    machine = Machine("tensorrt-rtx", trt.__version__, "NVIDIA GeForce RTX 4090", "8.9")
    assert find_plans(bundle, manifest, machine) == made
    assert {what.partition(":")[0] for what, _, _ in said} == {*GRAPHS, "done"}
    assert said[-1] == ("done", 6, 6) and any("Building engine" in what for what, _, _ in said)

    # Exported again, the bundle has other graphs, and the plans are of no use.
    content = json.loads((bundle / MANIFEST).read_text())
    content["graphs"]["vae_decoder"]["onnx"]["sha256"] = "0" * 64
    (bundle / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(NoPlanError, match="another vae_decoder than the bundle has now"):
        find_plans(bundle, read_manifest(bundle), machine)


def test_profiles_are_the_bundles_ranges(bundles: Bundles) -> None:
    manifest = read_manifest(bundles("fp32"))
    ranges = {**manifest.ranges, "eh": AxisRange(8, 16, 40), "ew": AxisRange(16, 16, 16), "M": AxisRange(1, 2, 5)}
    of_encoder = profile(replace(manifest, ranges=ranges), "vae_encoder")
    assert of_encoder["pixels_vae"] == ([1, 3, 32, 64], [2, 3, 64, 64], [5, 3, 160, 64])
    largest = manifest.ranges["R"].max, manifest.ranges["L"].max
    assert profile(manifest, "denoiser")["cross_kv"][2] == [2, 6, largest[0], 6, largest[1], 32]


def test_building_again_takes_the_place_of_what_was_there(bundle: Path, small: None) -> None:
    first = build(bundle, "tensorrt-rtx", ["8.9"])
    (first / "conditioner.plan").write_bytes(b"damaged")
    assert build(bundle, "tensorrt-rtx", ["8.9"]) == first
    assert (first / "conditioner.plan").stat().st_size > 10**5
    assert left(bundle) == [first.name]


def test_without_a_gpu_plans_are_portable(bundle: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu(engine: str, device: str) -> int:
        raise NotAvailableError("no GPU")

    monkeypatch.setattr(tensorrt, "find_device", no_gpu)
    result = CliRunner().invoke(main, ["build", "--bundle", str(bundle), "--engine", "tensorrt-rtx"])
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.strip())
    target = json.loads((folder / SIDECAR).read_text())["target"]
    assert target == {"engine": "tensorrt-rtx", "version": trt.__version__, "gpu": None, "capabilities": [*PORTABLE]}
    with pytest.raises(NotAvailableError, match="no GPU"):
        build(bundle, "tensorrt-rtx", device="cuda:1")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--compute-capability", "9.0"],
            "cannot build for compute capability 9.0; it knows 7.5, 8.0.*--engine tensorrt",
        ),
        (["--compute-capability", "ada"], "'ada' is no compute capability; one such as 8.9 is expected"),
        (["--engine", "tensorrt", "--compute-capability", "8.9"], "leave --compute-capability out|pip install"),
        (["--engine", "tensorrt", "--device", "cuda:99"], "PyTorch sees|pip install"),
        (["--bundle", "nowhere"], "nowhere is no bundle"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(bundle: Path, arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(main, ["build", "--bundle", str(bundle), "--engine", "tensorrt-rtx", *arguments])
    assert result.exit_code == 2
    assert re.search(sentence, " ".join(result.output.split()))
    assert left(bundle) == []


def test_run_builds_what_is_missing_if_it_is_told_to(
    bundle: Path, small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine("tensorrt-rtx", trt.__version__, "NVIDIA GeForce RTX 4090", "8.9")

    def opened(model: OpenedModel, *_: object) -> None:
        if left(bundle):
            raise InputError("plans were built")
        find_plans(model.folder, read_manifest(model.folder), machine)

    monkeypatch.setattr("mige_rt.pipeline.open_engine", opened)
    monkeypatch.setattr(tensorrt, "find_device", lambda *_: pytest.fail("there is no GPU"))
    monkeypatch.setattr(tensorrt, "_find_gpu", lambda *_: tensorrt._Gpu(machine.gpu, "8.9", "", 2**33))
    arguments = ["run", "--model", str(bundle), "--engine", "tensorrt-rtx", "--prompt", "a thing"]
    arguments += ["--out", str(tmp_path / "out.png")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and f"mige-rt build --bundle {bundle}" in result.output.replace("\n", "")
    assert left(bundle) == []
    result = CliRunner().invoke(main, [*arguments, "--build"])
    assert "plans were built" in result.output and len(left(bundle)) == 1
    assert not (tmp_path / "out.png").exists()


def test_refittable_plans_need_a_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_gpu(engine: str, device: str) -> int:
        raise NotAvailableError("no GPU")

    monkeypatch.setattr(tensorrt, "find_device", no_gpu)
    arguments = ["build", "--bundle", str(bundle), "--engine", "tensorrt-rtx", "--compute-capability", "8.9"]
    result = CliRunner().invoke(main, [*arguments, "--refittable"])
    assert result.exit_code == 2 and "refittable plans are built on a machine with an NVIDIA GPU" in result.output
    assert left(bundle) == []
    result = CliRunner().invoke(main, ["export", "--out", str(tmp_path / "out"), "--refittable"])
    assert result.exit_code == 2 and "--refittable is for plans" in result.output and not (tmp_path / "out").exists()


def test_int8_is_for_another_engine(bundle: Path) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**content, "precision": "int8"}))
    with pytest.raises(InputError, match="int8 is for ONNX Runtime on the CPU"):
        build(bundle, "tensorrt-rtx", ["8.9"])


def test_full_memory_is_said_in_plain_words(bundle: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "WORKER", limited("RLIMIT_DATA", 40 * 2**20))
    with pytest.raises(InputError, match=r"memory ran out while the plan of conditioner was built .*smaller limits"):
        build(bundle, "tensorrt-rtx", ["8.9"])
    assert left(bundle) == []


def test_a_builder_that_the_system_ends_ran_out_of_memory(
    bundle: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "WORKER", (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    with pytest.raises(InputError, match=r"memory ran out .*the system ended the builder"):
        build(bundle, "tensorrt-rtx", ["8.9"])
    monkeypatch.setattr(tensorrt, "WORKER", (sys.executable, "-c", "raise SystemExit('a bug')"))
    with pytest.raises(RuntimeError, match="ended with exit code 1: a bug"):
        build(bundle, "tensorrt-rtx", ["8.9"])
    assert left(bundle) == []


def test_a_full_disk_is_said_in_plain_words(bundle: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "WORKER", limited("RLIMIT_FSIZE", 10**5))
    with pytest.raises(InputError, match=r"conditioner could not be built.*File too large.*make room on the disk"):
        build(bundle, "tensorrt-rtx", ["8.9"])
    assert left(bundle) == []


def test_a_killed_build_leaves_nothing_that_looks_finished(bundle: Path) -> None:
    code = "from mige_rt.cli import main; main()"
    arguments = ["build", "--bundle", str(bundle), "--engine", "tensorrt-rtx", "--compute-capability", "8.9"]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], start_new_session=True) as process:
        waited = time.monotonic()
        while not list(bundle.glob("engines/*.partial-*/*.plan")):
            assert process.poll() is None and time.monotonic() - waited < 120
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert read_plans(bundle) == []
    (name,) = left(bundle)
    assert ".partial-" in name


def test_a_graph_that_cannot_be_built_is_named(bundle: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("NoSuchThing", ["x"], ["y"], "the_node")], "g", *[[t] for t in tensors]
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "bad.onnx")
    job = PlanJob(
        engine="tensorrt-rtx",
        graph="conditioner",
        onnx=tmp_path / "bad.onnx",
        plan=tmp_path / "bad.plan",
        profile={},
        capabilities=("8.9",),
        workspace=None,
        gpu=None,
        timing_cache=tmp_path / "timing.cache",
        options=PLAN_OPTIONS,
    )
    with pytest.raises(BuildError, match=r"the_node: .+"):
        work(job, lambda phase: None)
