"""`python -m benchmarks.runtime_settings`: that a setting's options are those of its sessions, and what is written."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from click.testing import CliRunner

from benchmarks.case import RuntimeSettings
from benchmarks.runtime_settings import (
    DEFAULTS,
    FILES,
    OURS,
    SETTINGS,
    main,
    markdown,
    measure_settings,
)
from engines.onnx_runtime import OnnxRuntimeEngine
from export.inputs import random_feed
from mige_rt.bundle import DEFAULT_MODEL, read_manifest


def _options(settings: RuntimeSettings | None) -> Any:
    """Those of a session that made a latent; None: as the engine sets them."""
    manifest = read_manifest(DEFAULT_MODEL)
    if settings is None:
        engine = OnnxRuntimeEngine(DEFAULT_MODEL, manifest, "cpu")
    else:
        engine = OnnxRuntimeEngine(
            DEFAULT_MODEL, manifest, "cpu", set_options=settings.set_options, split_batch=settings.batch_parallel
        )
    engine.run("vae_encoder", random_feed("vae_encoder", manifest.model, {"M": 1, "eh": 16, "ew": 16}))
    session: Any
    (session,) = engine.sessions.values()
    return session.get_session_options()


def test_the_engine_is_one_of_the_variants() -> None:
    engine, ours = _options(None), _options(SETTINGS[OURS])
    for name in ("intra_op_num_threads", "enable_cpu_mem_arena", "enable_mem_pattern", "graph_optimization_level"):
        assert getattr(engine, name) == getattr(ours, name), name


def test_every_variant_is_what_it_is_called() -> None:
    assert [name for name, settings in SETTINGS.items() if settings == RuntimeSettings()] == [DEFAULTS]
    assert len(set(SETTINGS.values())) == len(SETTINGS)
    usual, own = onnxruntime.SessionOptions(), _options(RuntimeSettings())
    for name in ("intra_op_num_threads", "enable_cpu_mem_arena", "enable_mem_pattern", "graph_optimization_level"):
        assert getattr(own, name) == getattr(usual, name), name
    changed = _options(RuntimeSettings(threads=1, arena=False, pattern=False, optimisation="basic", spinning=False))
    assert changed.intra_op_num_threads == 1
    assert not changed.enable_cpu_mem_arena and not changed.enable_mem_pattern
    assert changed.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert changed.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert own.get_session_config_entry("session.intra_op.allow_spinning") == "1"


def test_the_files_of_a_measurement(tmp_path: Path) -> None:
    out = tmp_path / "results"
    quick = ["--steps", "2", "--iterations", "3", "--warmup", "1", "--only", "1 thread", "--only", "basic optimisation"]
    result = CliRunner().invoke(main, [*quick, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    content = json.loads((out / FILES[0]).read_text())
    assert content["complete"] and content["num_inference_steps"] == 2 and content["machine"]["cores"] >= 1
    assert content["command"] == (
        "python -m benchmarks.runtime_settings --num-inference-steps 2 --iterations 3 --warmup 1 --only '1 thread' "
        "--only 'basic optimisation'"
    )
    rows = {row["name"]: row for row in content["results"]}
    assert list(rows) == [DEFAULTS, "1 thread", "basic optimisation"]
    for row in rows.values():
        assert len(row["latency"]["iterations"]) == 3 and row["latency"]["median"] > 0
        assert row["ok"] and 50e6 < row["peak_bytes"] < 350e6  # without PyTorch in it
    assert rows[DEFAULTS]["speedup"] is None
    gain = rows["1 thread"]["speedup"]
    assert gain["low"] <= gain["value"] <= gain["high"] and gain["pairs"] == 3
    assert rows["1 thread"]["settings"]["threads"] == 1
    text = (out / FILES[1]).read_text()
    assert content["command"] in text and all(f"| {name} " in text for name in rows)


def test_ctrl_c_keeps_whole_rounds_and_another_picture_does_not_count(tmp_path: Path) -> None:
    settings = {DEFAULTS: RuntimeSettings(threads=1), "another": RuntimeSettings(threads=2)}

    def interrupt(name: str, done: int, total: int) -> None:
        if done == 2 * len(settings) + 3:  # the second setting of the third round, after one to warm up
            raise KeyboardInterrupt

    def measure(after: int) -> tuple[list[dict[str, Any]], bool]:
        counts = {"num_inference_steps": 2, "iterations": 5, "warmup": after}
        return measure_settings(DEFAULT_MODEL, settings, interrupt, **counts)

    rows, complete = measure(1)
    assert not complete
    assert [len(row["latency"]["iterations"]) for row in rows] == [3, 2]
    assert rows[1]["speedup"]["pairs"] == 2
    with pytest.raises(KeyboardInterrupt):
        measure(3)  # still in the warm-ups

    content = {"machine": {"cores": 1, "cpu": "a CPU", "versions": {"onnxruntime": "1"}}, "complete": complete}
    content |= {"command": "c", "date": "d", "model": "m", "num_inference_steps": 2, "warmup": 1, "iterations": 5}
    content["results"] = [rows[0], {**rows[1], "psnr": 12.0, "ok": False}]
    text = markdown(content)
    assert "incomplete" in text and "does not count" in text and "12.0 dB" in text


def test_bad_input_costs_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for options, words in (
        (["--model", tmp_path / "none"], "no bundle"),
        (["--out", tmp_path / "file" / "below"], "cannot be written"),
        (["--only", "magic"], "magic"),
        (["--runs", "1"], "1"),
    ):
        result = CliRunner().invoke(main, [*map(str, options)])
        assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output
