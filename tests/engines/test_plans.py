"""Plans in a bundle: fingerprints, what fits, what is stale or damaged. No plan is built or run here."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engines.plans import (
    SIDECAR,
    Machine,
    NoPlanError,
    PlanEntry,
    Plans,
    Target,
    check_plans,
    find_plans,
    fingerprint,
    misfit,
    read_plans,
    stale,
)
from engines.trt_runtime import find_device, import_runtime, is_out_of_memory
from mige_rt.bundle import DEFAULT_MODEL, FileEntry, GraphEntry, Manifest, file_entry, read_config
from mige_rt.errors import InputError, NotAvailableError
from mige_rt.graphs import GRAPHS, AxisRange, GraphName, resolved_axes

RTX = Target("tensorrt-rtx", "1.7.1", None, ("8.6", "8.9"))
TRT = Target("tensorrt", "11.4.0", "NVIDIA H200", ("9.0",))
ADA = Machine("tensorrt-rtx", "1.7.1", "NVIDIA GeForce RTX 4090", "8.9")
H200 = Machine("tensorrt", "11.4.0", "NVIDIA H200", "9.0")
RANGES = {"R": AxisRange(1, 2, 12), "L": AxisRange(1, 40, 256)}
OPTIONS = {"optimization_level": 3}


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """Of a bundle whose graphs have made-up hashes."""
    config = read_config(DEFAULT_MODEL)
    axes = resolved_axes(config)
    graphs: dict[GraphName, GraphEntry] = {
        graph: GraphEntry(
            FileEntry(f"onnx/{graph}.onnx", 1, f"onnx of {graph}"),
            FileEntry(f"onnx/{graph}.safetensors", 1, f"weights of {graph}"),
            axes[graph],
            {},
            0,
        )
        for graph in GRAPHS
    }
    tokenizer = FileEntry("tokenizer/tokenizer.json", 1, "")
    return Manifest(2, config, "made up", "fp16", True, "dpm_solver_pp_2m", RANGES, graphs, tokenizer, {})


def write(bundle: Path, target: Target, manifest: Manifest) -> Plans:
    """Plans of a few bytes, and their sidecar, as `build` would leave them."""
    name = fingerprint(target, manifest.precision, manifest.ranges, OPTIONS)
    folder = bundle / "engines" / name
    folder.mkdir(parents=True)
    entries = {}
    for graph, entry in manifest.graphs.items():
        (folder / f"{graph}.plan").write_bytes(f"plan of {graph} for {target}".encode())
        entries[graph] = PlanEntry(
            file_entry(folder, f"{graph}.plan"), entry.onnx.sha256, entry.weights.sha256, 1.5, 10**9
        )
    written = Plans(folder, target, manifest.precision, manifest.ranges, OPTIONS, entries)
    (folder / SIDECAR).write_text(json.dumps(written.to_json()))
    return written


def test_a_sidecar_is_read_as_it_was_written(tmp_path: Path, manifest: Manifest) -> None:
    written = [write(tmp_path, target, manifest) for target in (RTX, TRT)]
    assert read_plans(tmp_path) == sorted(written, key=lambda plans: plans.folder)
    assert read_plans(tmp_path / "none") == []


def test_the_fingerprint_tells_apart_what_a_plan_depends_on() -> None:
    others = [
        (replace(RTX, version="1.7.2"), "fp16", RANGES, OPTIONS),
        (replace(RTX, capabilities=("8.9",)), "fp16", RANGES, OPTIONS),
        (replace(RTX, engine="tensorrt"), "fp16", RANGES, OPTIONS),
        (replace(TRT, gpu="NVIDIA H100"), "fp16", RANGES, OPTIONS),
        (TRT, "fp16", RANGES, OPTIONS),
        (RTX, "fp32", RANGES, OPTIONS),
        (RTX, "fp16", {**RANGES, "R": AxisRange(1, 2, 13)}, OPTIONS),
        (RTX, "fp16", RANGES, {"optimization_level": 5}),
        (RTX, "fp16", RANGES, OPTIONS),
    ]
    assert len({fingerprint(*other) for other in others}) == len(others)
    assert fingerprint(RTX, "fp16", dict(reversed(RANGES.items())), OPTIONS) == fingerprint(*others[-1])


@pytest.mark.parametrize(
    ("target", "machine", "reason"),
    [
        (RTX, ADA, None),
        (TRT, H200, None),
        (RTX, replace(ADA, version="1.8.0"), r"built with TensorRT for RTX 1\.7\.1, and 1\.8\.0 is installed"),
        (RTX, replace(ADA, capability="12.0"), r"compute capability 8\.6 8\.9, and this GPU has 12\.0"),
        (TRT, replace(H200, gpu="NVIDIA H100"), "built for NVIDIA H200, and this GPU is NVIDIA H100"),
        (TRT, ADA, "they are TensorRT's"),
    ],
)
def test_a_plan_for_another_gpu_or_version_does_not_fit(
    tmp_path: Path, manifest: Manifest, target: Target, machine: Machine, reason: str | None
) -> None:
    written = write(tmp_path, target, manifest)
    if reason is None:
        assert misfit(written, manifest, machine) is None
        assert find_plans(tmp_path, manifest, machine) == written
    else:
        with pytest.raises(NoPlanError, match=reason) as caught:
            find_plans(tmp_path, manifest, machine)
        assert f"mige-rt build --bundle {tmp_path} --engine {machine.engine}" in str(caught.value)
        assert str(machine) in str(caught.value)


def test_plans_of_other_graphs_are_stale(tmp_path: Path, manifest: Manifest) -> None:
    written = write(tmp_path, RTX, manifest)
    again = replace(manifest.graphs["denoiser"], weights=FileEntry("onnx/denoiser.safetensors", 1, "others"))
    exported_again = replace(manifest, graphs={**manifest.graphs, "denoiser": again})
    assert stale(written, manifest) is None
    assert "another denoiser than the bundle has now" in str(stale(written, exported_again))
    assert "another precision" in str(stale(written, replace(manifest, precision="bf16")))
    with pytest.raises(NoPlanError, match="another denoiser"):
        find_plans(tmp_path, exported_again, ADA)


def test_the_most_narrowly_built_plans_are_taken(tmp_path: Path, manifest: Manifest) -> None:
    write(tmp_path, RTX, manifest)
    narrow = write(tmp_path, replace(RTX, capabilities=("8.9",)), manifest)
    assert find_plans(tmp_path, manifest, ADA) == narrow


def test_without_plans_the_command_is_said(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(NoPlanError, match=r"has no plan for this machine .*mige-rt build --bundle .* --build"):
        find_plans(tmp_path, manifest, ADA)


@pytest.mark.parametrize("suffix", [".partial-123", ".old-123"])
def test_what_a_killed_build_left_is_not_seen(tmp_path: Path, manifest: Manifest, suffix: str) -> None:
    folder = write(tmp_path, RTX, manifest).folder
    folder.rename(folder.with_name(folder.name + suffix))
    assert read_plans(tmp_path) == []


def test_a_sidecar_that_was_changed_or_moved_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    folder = write(tmp_path, RTX, manifest).folder
    moved = folder.rename(folder.with_name("tensorrt-rtx-0123456789abcdef"))
    with pytest.raises(InputError, match=f"belong into a folder {folder.name}.*: remove .*, and build again"):
        read_plans(tmp_path)
    folder = moved.rename(folder)
    sidecar = folder / SIDECAR
    whole = sidecar.read_text()
    content = json.loads(whole)
    content["graphs"]["denoiser"]["plan"]["path"] = "../../secret"
    missing = {**json.loads(whole), "graphs": {}}
    for text in (whole[:100], "[]", "[" * 10**5, "{}", json.dumps(content), json.dumps(missing)):
        sidecar.write_text(text)
        with pytest.raises(InputError, match=rf"{sidecar} is damaged"):
            read_plans(tmp_path)
    sidecar.write_text(whole.replace('"schema": 2', '"schema": 99'))
    with pytest.raises(InputError, match="schema 99"):
        read_plans(tmp_path)


def test_a_damaged_plan_is_named(tmp_path: Path, manifest: Manifest) -> None:
    written = write(tmp_path, RTX, manifest)
    path = written.folder / "denoiser.plan"
    whole = path.read_bytes()
    path.write_bytes(whole.swapcase())
    with pytest.raises(InputError, match=rf"{path} was changed.*mige-rt build --bundle {tmp_path}"):
        find_plans(tmp_path, manifest, ADA)
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=f"has {len(whole) - 1} bytes instead of {len(whole)}"):
        check_plans(tmp_path, written)
    path.unlink()
    with pytest.raises(InputError, match="is missing"):
        check_plans(tmp_path, written)


def test_a_missing_runtime_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(NotAvailableError, match=r"TensorRT for RTX.*pip install 'mige-rt\[tensorrt-rtx\]'"):
        import_runtime("tensorrt-rtx")
    with pytest.raises(NotAvailableError, match=r"pip install 'mige-rt\[tensorrt\]'"):
        import_runtime("tensorrt")


def test_a_gpu_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(NotAvailableError, match="needs an NVIDIA GPU, and PyTorch sees"):
        find_device("tensorrt-rtx", "cuda:99")
    for device in ("cpu", "cuda:x", "cpu:0"):
        with pytest.raises(NotAvailableError, match="runs on a GPU, not on"):
            find_device("tensorrt", device)


@pytest.mark.parametrize(
    "words",
    [
        "Error Code 2: OutOfMemory (Requested size was 12884901888 bytes.)",
        "Unexpected exception std::bad_alloc In compileGraph",
        "Requested amount of GPU memory (9 bytes) could not be allocated. There may not be enough free memory",
        "Skipping tactic: Device memory is insufficient to use tactic.",
        "CUDA initialization failure with error: out of memory",
    ],
)
def test_the_runtimes_words_for_full_memory_are_known(words: str) -> None:
    assert is_out_of_memory(words)
    assert not is_out_of_memory("Error Code 4: API Usage Error (denoiser: shape mismatch)")
