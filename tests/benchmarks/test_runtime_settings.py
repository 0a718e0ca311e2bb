"""`python -m benchmarks.runtime_settings`: that a variant's options are those of its sessions, and what is written."""

import json
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner

from benchmarks.runtime_settings import FILES, REQUEST, main, markdown, measure_settings
from benchmarks.runtime_variants import DEFAULTS, OURS, VARIANTS, Variant
from engines.onnx_runtime import OnnxRuntimeEngine
from export.inputs import SAMPLES, random_feed
from mige_rt.bundle import DEFAULT_MODEL, read_manifest
from mige_rt.requests import read_requests

EDIT = read_requests(SAMPLES / "requests.jsonl")[REQUEST]


def _options(variant: Variant | None) -> onnxruntime.SessionOptions:
    """Those of a session that made a latent; None: as the engine sets them."""
    manifest = read_manifest(DEFAULT_MODEL)
    if variant is None:
        engine = OnnxRuntimeEngine(DEFAULT_MODEL, manifest, "cpu")
    else:
        engine = OnnxRuntimeEngine(DEFAULT_MODEL, manifest, "cpu", variant.set_options, split_rows=variant.rows)
    engine.run("vae_encoder", random_feed("vae_encoder", manifest.model, {"M": 1, "eh": 16, "ew": 16}))
    (session,) = engine.sessions.values()
    return session.get_session_options()


def test_the_engine_is_one_of_the_variants() -> None:
    engine, ours = _options(None), _options(VARIANTS[OURS])
    for name in ("intra_op_num_threads", "enable_cpu_mem_arena", "enable_mem_pattern", "graph_optimization_level"):
        assert getattr(engine, name) == getattr(ours, name), name


def test_every_variant_is_what_it_is_called() -> None:
    assert [name for name, variant in VARIANTS.items() if variant == Variant()] == [DEFAULTS]
    assert len(set(VARIANTS.values())) == len(VARIANTS)
    usual, own = onnxruntime.SessionOptions(), _options(Variant())
    for name in ("intra_op_num_threads", "enable_cpu_mem_arena", "enable_mem_pattern", "graph_optimization_level"):
        assert getattr(own, name) == getattr(usual, name), name
    changed = _options(Variant(threads=1, arena=False, pattern=False, optimisation="basic", spinning=False))
    assert changed.intra_op_num_threads == 1
    assert not changed.enable_cpu_mem_arena and not changed.enable_mem_pattern
    assert changed.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert changed.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert own.get_session_config_entry("session.intra_op.allow_spinning") == "1"


def test_the_files_of_a_measurement(tmp_path: Path) -> None:
    out = tmp_path / "results"
    quick = ["--steps", "2", "--runs", "3", "--warmups", "1", "--only", "1 thread", "--only", "basic optimisation"]
    result = CliRunner().invoke(main, [*quick, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    content = json.loads((out / FILES[0]).read_text())
    assert content["complete"] and content["steps"] == 2 and content["machine"]["cores"] >= 1
    assert content["command"] == (
        "python -m benchmarks.runtime_settings --steps 2 --runs 3 --warmups 1 --only '1 thread' "
        "--only 'basic optimisation'"
    )
    rows = {row["name"]: row for row in content["variants"]}
    assert list(rows) == [DEFAULTS, "1 thread", "basic optimisation"]
    for row in rows.values():
        assert len(row["seconds"]["runs"]) == 3 and row["seconds"]["median"] > 0
        assert row["ok"] and 50e6 < row["peak_bytes"] < 350e6  # without PyTorch in it
    assert rows[DEFAULTS]["gain"] is None
    gain = rows["1 thread"]["gain"]
    assert gain["low"] <= gain["value"] <= gain["high"] and gain["pairs"] == 3
    assert rows["1 thread"]["variant"]["threads"] == 1
    text = (out / FILES[1]).read_text()
    assert content["command"] in text and all(f"| {name} |" in text for name in rows)


def test_ctrl_c_keeps_whole_rounds_and_another_picture_does_not_count(tmp_path: Path) -> None:
    variants = {DEFAULTS: Variant(threads=1), "another": Variant(threads=1, int8=True)}
    other = DEFAULT_MODEL  # in the place of the quantised model

    def interrupt(name: str, done: int, total: int) -> None:
        if done == 2 * len(variants) + 3:  # the second variant of the third round, after one to warm up
            raise KeyboardInterrupt

    def measure(after: int) -> None:
        measure_settings(DEFAULT_MODEL, other, EDIT, variants, 2, 5, after, interrupt)

    rows, complete = measure_settings(DEFAULT_MODEL, other, EDIT, variants, 2, 5, 1, interrupt)
    assert not complete
    assert [len(row.seconds.runs) for row in rows] == [3, 2] and rows[1].gain is not None and rows[1].gain.pairs == 2
    with pytest.raises(KeyboardInterrupt):
        measure(3)  # still in the warm-ups

    content = {"machine": {"cores": 1, "cpu": "a CPU", "versions": {"onnxruntime": "1"}}, "complete": complete}
    content |= {"command": "c", "date": "d", "model": "m", "steps": 2, "warmups": 1, "runs": 5}
    text = markdown(content, [rows[0], replace(rows[1], psnr=12.0, ok=False)])
    assert "incomplete" in text and "does not count" in text and "12.0 dB" in text


def test_bad_input_costs_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for options, words in (
        (["--model", tmp_path / "none"], "no bundle"),
        (["--int8", DEFAULT_MODEL], "is in fp32, and a bundle in int8 is expected"),
        (["--out", tmp_path / "file" / "below"], "cannot be written"),
        (["--only", "magic"], "magic"),
        (["--runs", "1"], "1"),
    ):
        result = CliRunner().invoke(main, [*map(str, options)])
        assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output
