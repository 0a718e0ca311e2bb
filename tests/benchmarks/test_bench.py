"""`mige-rt bench` end to end, on the default model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.bench import BenchOptions, bench
from benchmarks.bench_results import BenchResults
from benchmarks.case import Case, requests
from benchmarks.report import write_report
from benchmarks.worker import CandidateError, Worker
from export.formatting import json_text
from mige_rt.bundle import DEFAULT_MODEL, MANIFEST, file_entry
from mige_rt.cli import main

QUICK = {"warmup": 0, "cold_starts": 0, "compile": False, "peak_side": 128}


def test_json_to_read_leaves_strings_as_they_are() -> None:
    data = {
        "prompt": "turn [  the cat  ] blue\n[\n 1,\n 2\n]",
        "words": ["[", " 1 ]"],
        "values": [1, [2.5, float("inf")]],
    }
    text = json_text(data)
    assert json.loads(text) == {**data, "values": [1, [2.5, None]]}
    assert "[2.5, null]" in text


def test_every_row_has_what_the_report_promises(results: BenchResults) -> None:
    assert results.complete and not results.failed
    names = [row.name for row in results.results]
    assert names[:4] == [
        "PyTorch fp32, as published",
        "PyTorch fp32, encode once",
        "PyTorch fp32",
        "ONNX Runtime fp32",
    ]
    for row in results.results:
        assert row.latency is not None and len(row.latency.iterations) == 3 and row.latency.median > 0
        assert row.run.graphs["denoiser"][1] > 0
        if row.candidate.exact:
            assert row.fidelity.ok and row.fidelity.errors.latents < 1e-4 and row.fidelity.errors.psnr > 40
        else:
            assert row.fidelity.ok is None
    shipped = next(row for row in results.results if row.name == "ONNX Runtime fp32")
    assert shipped.cold_start is not None and shipped.cold_start.median > 0
    peaks, work = results.peaks, shipped.work
    assert peaks is not None and work is not None and shipped.roofline is not None
    assert shipped.roofline.keys() == work.graphs.keys()
    for graph, of_graph in work.graphs.items():
        computing, moving = of_graph.flops / peaks.flops["fp32"], of_graph.bytes / peaks.bytes
        assert shipped.roofline[graph] == max(computing, moving) > 0


def test_variants_run_the_graphs_that_they_are_counted_with(results: BenchResults) -> None:
    for row in results.results:
        if row.work is not None:
            counted = {graph: work.calls for graph, work in row.work.graphs.items()}
            assert counted == {graph: calls for graph, (calls, _) in row.run.graphs.items()}, row.name


def test_a_process_has_its_own_memory(results: BenchResults) -> None:
    memory = {row.name: row.memory for row in results.results}
    onnxruntime, pytorch = memory["ONNX Runtime fp32"], memory["PyTorch fp32"]
    assert onnxruntime is not None and pytorch is not None
    if onnxruntime.host is None or pytorch.host is None:
        pytest.skip("this system does not say how much memory a process took")
    assert onnxruntime.host < pytorch.host  # it has no PyTorch in it
    assert memory["ONNX Runtime fp32, reuse below 0.1"] is None  # which runs in the process of another row


def test_each_change_has_its_own_share(results: BenchResults) -> None:
    changes = {(c["change"], c["candidate"]): c for c in results.speedups()}
    assert changes["encoding once", "PyTorch fp32, encode once"]["baseline"] == "PyTorch fp32, as published"
    assert changes["leaving out branches of weight zero", "PyTorch fp32"]["baseline"] == "PyTorch fp32, encode once"
    assert changes["the runtime", "ONNX Runtime fp32"]["baseline"] == "PyTorch fp32"
    whole = changes["all together", "ONNX Runtime fp32"]
    assert whole["baseline"] == "PyTorch fp32, as published" and whole["speedup"]["pairs"] == 3


def test_an_engine_that_is_not_there_is_skipped_with_its_reason(results: BenchResults) -> None:
    (skipped,) = results.skipped
    assert skipped["name"] == "TensorRT" and "tensorrt" in skipped["reason"].lower()
    assert not skipped["invalid_output"]
    assert str(DEFAULT_MODEL) not in json_text(results.to_json())  # it is elsewhere on every machine


def test_the_json_has_the_machine_and_the_command(report: Path) -> None:
    data = json.loads((report / "report.json").read_text())
    assert data["command"] == "mige-rt bench --steps 4" and data["complete"] is True
    assert {"cpu", "cores", "gpus", "threads", "versions", "commit"} <= data["environment"].keys()
    assert {"python", "torch", "onnxruntime", "numpy"} <= data["environment"]["versions"].keys()
    assert data["peaks"]["bytes"] > 0 and data["peaks"]["flops"]["fp32"] > 0
    assert data["cases"] == [
        {
            "references": 1,
            "batch": 1,
            "num_inference_steps": 4,
            "size": [64, 64],
            "guidance_scale": 5.0,
            "image_guidance_scale": 1.0,
            "task": "edit",
            "title": "64x64, 1 reference, 4 steps",
            "tokens": data["cases"][0]["tokens"],
        }
    ]
    assert len(data["results"][0]["latency"]["iterations"]) == 3


def test_a_batch_has_images_of_its_own() -> None:
    for references in (1, 4):
        batch = requests(Case(references, 4, 60, (64, 64), 5.0, 1.0))
        images = {image.tobytes() for request in batch for image in request.images}
        assert len(images) == 4 * references
        assert all(request.source is not None and request.source in request.images for request in batch)
        assert {request.task for request in batch} == {"edit" if references == 1 else "compose"}


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if total and done == 2 * candidates + 1:  # two rounds and one run
            raise KeyboardInterrupt  # what SIGINT comes to, which a background job's shell may have it ignore

    candidates = 4  # the plain one and what it can do besides
    options = BenchOptions(engines=("onnxruntime",), device="cpu", num_inference_steps=(2,), iterations=5, **QUICK)
    results = bench(options, interrupt)
    assert not results.complete
    assert [len(row.latency.iterations) for row in results.results if row.latency] == [3, 2, 2, 2]
    write_report(results, tmp_path)
    assert (
        "incomplete" in (tmp_path / "report.html").read_text() and "incomplete" in (tmp_path / "report.md").read_text()
    )
    assert json.loads((tmp_path / "report.json").read_text())["complete"] is False


def _damaged(out: Path, precision: str, byte: int) -> Path:
    """The default model with half of its decoder's weights made of one byte, said to be of another precision.

    So it is measured beside the whole one.
    """
    shutil.copytree(DEFAULT_MODEL, out)
    manifest = json.loads((out / MANIFEST).read_text())
    weights = manifest["graphs"]["vae_decoder"]["weights"]
    content = (out / weights["path"]).read_bytes()
    half = len(content) // 2
    (out / weights["path"]).write_bytes(content[:half] + bytes([byte]) * (len(content) - half))
    weights.update(vars(file_entry(out, weights["path"])))
    (out / MANIFEST).write_text(json.dumps({**manifest, "precision": precision}))
    return out


def test_what_fails_parity_is_shown_and_the_exit_code_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.bench.BenchOptions", partial(BenchOptions, **QUICK))
    wrong, overflowing = _damaged(tmp_path / "wrong", "fp16", 0), _damaged(tmp_path / "nan", "int8", 0xFF)
    arguments = ["--model", str(DEFAULT_MODEL), "--model", str(wrong), "--model", str(overflowing)]
    arguments += ["--engines", "onnxruntime", "--device", "cpu", "--steps", "2", "--runs", "2", "--warmups", "0"]
    result = CliRunner().invoke(main, ["bench", *arguments, "--out", str(tmp_path / "report")])
    assert result.exit_code == 1, result.output
    assert "parity fails" in result.stderr and result.stdout == f"{tmp_path / 'report'}\n"
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    rows = {row["name"]: row for row in data["results"]}
    assert rows["ONNX Runtime fp32"]["counts"] and not rows["ONNX Runtime fp16"]["counts"]
    assert rows["ONNX Runtime fp16"]["fidelity"]["ok"] is False
    assert [skipped["name"].split(",")[0] for skipped in data["skipped"] if skipped["invalid_output"]] == [
        "ONNX Runtime int8"
    ]
    assert "ONNX Runtime fp16" not in json.dumps(data["speedups"])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "2 results fail parity" in page and "fails parity" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--engines", "onnx"], "onnx"),
        (["--references", "1,5"], "5"),
        (["--steps", "60,60"], "twice"),
        (["--batch", "x"], "x"),
        (["--sizes", "64,big"], "big"),
        (["--runs", "0"], "0"),
    ],
)
def test_bad_input_costs_exit_code_2_and_leaves_nothing(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", *arguments, "--out", str(tmp_path / "report")])
    assert result.exit_code == 2 and said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.bench.bench", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("x")
    for out, why in (
        ("there", "exists already"),
        ("file/report", "cannot be written"),
        ("no/report", "cannot be written"),
    ):
        result = CliRunner().invoke(main, ["bench", "--out", str(tmp_path / out)])
        assert result.exit_code == 2 and why in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_without_its_packages_it_says_how_to_get_them(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['jinja2'] = None; from mige_rt.cli import main; main(['bench', '--out', 'r'])"
    done = subprocess.run([sys.executable, "-c", blocked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install 'mige-rt[bench]'" in done.stderr


def test_with_little_memory_groups_are_measured_one_after_another() -> None:
    engines, options = ("pytorch", "onnxruntime"), {**QUICK, "iterations": 2, "num_inference_steps": (2,)}
    results = bench(BenchOptions(engines=engines, device="cpu", memory=800_000_000, **options))  # room for one process
    assert results.complete and not results.skipped and not results.failed
    assert results.groups == [
        ["PyTorch fp32, as published", "PyTorch fp32, encode once", "PyTorch fp32"],
        ["ONNX Runtime fp32"],
        ["ONNX Runtime fp32, guidance at 0% to 50% of the steps", "ONNX Runtime fp32, reuse below 0.1"],
        ["ONNX Runtime fp32, low VRAM"],
    ]
    assert [row.name for row in results.results] == [name for group in results.groups for name in group]
    assert all(row.latency and len(row.latency.iterations) == 2 for row in results.results)
    changes = {(change["change"], change["candidate"]) for change in results.speedups()}
    assert ("the runtime", "ONNX Runtime fp32") in changes  # also between groups


def test_a_process_that_dies_is_told_and_is_not_waited_for(results: BenchResults) -> None:
    config = next(row.candidate.worker for row in results.results if row.name == "ONNX Runtime fp32")
    worker = Worker(config)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(CandidateError, match="killed"):
        worker.seconds(results.results[3].candidate, results.cases[0])
    worker.kill()
