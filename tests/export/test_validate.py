"""Validation finds what is wrong with a graph, and its economies change nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export import chunks, validate
from export.chunks import run_onnx
from export.context import ExportContext, ExportTarget
from export.exporter import ExportLimits, axis_ranges
from export.graphs import export_graph
from export.inputs import SAMPLES, RealInputs, random_feed, sample_requests, shapes_of
from export.processes import to_json
from export.reference import run_module, run_reference, widen_by_block
from export.results import Check
from export.validate import make_cases, measure, validate_graph, validate_pipeline
from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE, open_model, read_config
from mige_rt.config import PRESETS, Precision
from mige_rt.graphs import GRAPHS, AxisRange, GraphName
from mige_rt.tokenizer import load_tokenizer
from trainer.checkpoints.model_folder import SafetensorsCheckpoint, load_model
from trainer.checkpoints.weights import empty_model

Bundles = Callable[[str], Path]
CONFIG = read_config(DEFAULT_MODEL)
RANGES = axis_ranges(CONFIG, ExportLimits(4, 4, (32, 128)))


def context_of(folder: Path, precision: Precision = "fp32") -> ExportContext:
    """The default model, and graphs of it in a folder."""
    tokenize = load_tokenizer(DEFAULT_MODEL / TOKENIZER_FILE)
    target = ExportTarget(CONFIG, precision, RANGES, folder)
    return ExportContext(SafetensorsCheckpoint(open_model(DEFAULT_MODEL)), tokenize, target, small=True)


def checks_of(graph: GraphName, folder: Path, precision: Precision = "fp32") -> list[Check]:
    context = context_of(folder, precision)
    return validate_graph(context, graph, make_cases(context, graph))


def real_inputs() -> RealInputs:
    return RealInputs(SafetensorsCheckpoint(open_model(DEFAULT_MODEL)), load_tokenizer(DEFAULT_MODEL / TOKENIZER_FILE))


def export_conditioner(precision: Precision, folder: Path) -> None:
    """Export the default model's smallest graph."""
    context = context_of(folder, precision)
    weights = context.module("conditioner").state_dict()
    export_graph("conditioner", empty_model(CONFIG).conditioner, weights.__getitem__, context.target)


@pytest.mark.parametrize("graph", ["vae_encoder", "text_encoder"])
def test_a_good_graph_passes_at_every_shape_and_output(bundles: Bundles, graph: GraphName) -> None:
    phases: list[str] = []
    context = context_of(bundles("fp32") / "onnx")
    checks = validate_graph(context, graph, make_cases(context, graph), phases.append)
    shapes = shapes_of(graph, CONFIG, RANGES, small=True)
    outputs = [spec.name for spec in GRAPHS[graph].outputs]
    expected = [(kind, sizes, out) for kind in ("random", "real") for sizes in shapes.values() for out in outputs]
    assert [(check.inputs, check.shape, check.output) for check in checks] == expected
    assert all(check.ok and check.rms < 5e-6 and check.cosine > 0.999999 for check in checks)
    assert json.loads(json.dumps([to_json(check) for check in checks]))[0]["graph"] == graph
    assert phases


def test_a_changed_weight_fails_and_so_does_a_narrow_tolerance(
    bundles: Bundles,
    change_a_weight: Callable[[Path, str, float], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(bundles("fp32") / "onnx", tmp_path / "onnx"))

    with monkeypatch.context() as patch:
        patch.setattr(validate, "TOLERANCES", {"fp32": 1e-8})
        narrow = checks_of("conditioner", folder)
    assert narrow and not any(check.ok for check in narrow)
    change_a_weight(folder / "conditioner.safetensors", "kv_linears.3.weight", 1.001)
    # One of six layers is wrong by a thousandth; a single row without text sees it as well.
    assert not any(check.ok for check in checks_of("conditioner", folder))


def test_a_pipeline_with_a_changed_weight_fails(bundles: Bundles, other_model: Callable[..., Path]) -> None:
    good = validate_pipeline(SafetensorsCheckpoint(open_model(DEFAULT_MODEL)), bundles("fp32"), "fp32")
    assert [(check.inputs, check.output) for check in good] == [
        (task, output) for task in ("subject", "edit", "compose") for output in ("latents", "images")
    ]
    assert all(check.ok for check in good)
    assert all(check.psnr is not None and check.psnr >= 40 for check in good if check.output == "images")

    folder = other_model("denoiser", "blocks.2.mlp.fc1.weight", 1.2, bundles("fp32"))
    bad = validate_pipeline(SafetensorsCheckpoint(open_model(DEFAULT_MODEL)), folder, "fp32")
    assert not any(check.ok for check in bad if check.output == "latents")
    assert all(g.worst < b.worst for g, b in zip(good, bad, strict=True))


def test_half_precision_is_tried_by_both_runtimes(bundles: Bundles, tmp_path: Path) -> None:
    checks = checks_of("conditioner", bundles("fp16") / "onnx", "fp16")
    assert {check.run_by for check in checks} == {"onnxruntime", "pytorch"} and all(check.ok for check in checks)
    export_conditioner("bf16", tmp_path)
    checks = checks_of("conditioner", tmp_path, "bf16")
    assert {check.run_by for check in checks} == {"onnxruntime in float32", "pytorch"}
    assert all(check.ok for check in checks)
    # The file has the weights' rounding alone, the modules all of it.
    wide = [check.rms for check in checks if check.run_by != "pytorch"]
    rounded = [check.rms for check in checks if check.run_by == "pytorch"]
    assert len(wide) == len(rounded) and all(a < b for a, b in zip(wide, rounded, strict=True))


# --- a part of a graph at a time ---


@pytest.mark.parametrize(("precision", "graph"), [("fp32", "text_encoder"), ("fp16", "denoiser"), ("int8", "denoiser")])
def test_a_graph_in_parts_gives_what_it_gives_whole(
    bundles: Bundles, precision: str, graph: GraphName, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundles(precision) / f"onnx/{graph}.onnx"
    shapes = list(shapes_of(graph, CONFIG, RANGES, small=True).values())
    feeds = [random_feed(graph, CONFIG, sizes) for sizes in shapes[:2]]
    sizes: list[int] = []
    divide = chunks.DividedGraph.divide

    def divided(parts: chunks.DividedGraph, limit: int | None) -> list[chunks.Chunk]:
        made = divide(parts, limit)
        sizes.extend(chunk.bytes for chunk in made)
        assert sum(len(chunk.nodes) for chunk in made) == len(parts.live)
        return made

    monkeypatch.setattr(chunks.DividedGraph, "divide", divided)
    limit = 700_000 if graph == "text_encoder" else 2_000_000
    whole, parts = run_onnx(path, feeds), run_onnx(path, feeds, limit)
    assert len(sizes) >= 5 and max(sizes) <= max(limit, 4 * CONFIG.text.vocabulary * CONFIG.text.width)
    # int8's and half precision's rounding depends on which nodes are fused, most of all in attention with scores
    # beyond 100.
    tolerance = {"fp32": 1e-6, "fp16": 5e-3, "int8": 5e-2}[precision]
    for one, other in zip(whole, parts, strict=True):
        for name in one:
            assert measure(other[name], one[name])[0] < tolerance


def test_weights_that_are_widened_are_repeated_where_they_are_read(tmp_path: Path) -> None:
    helper = onnx.helper
    weights = [
        onnx.numpy_helper.from_array(np.arange(4, dtype=kind), kind.__name__) for kind in (np.float16, np.float32)
    ]
    nodes = [
        helper.make_node("Cast", ["float16"], ["wide"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Add", ["x", "wide"], ["first"]),
        helper.make_node("Identity", ["first"], ["second"]),
        helper.make_node("Mul", ["second", "float32"], ["third"]),
        helper.make_node("Add", ["third", "wide"], ["y"]),
        helper.make_node("Identity", ["wide"], ["constant"]),
    ]
    info = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in ("x", "y", "constant")]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")
    x = np.ones(4, np.float32)
    for limit in (None, 1):
        (made,) = run_onnx(tmp_path / "g.onnx", [{"x": x}], limit)
        np.testing.assert_array_equal(made["y"], (x + np.arange(4)) * np.arange(4) + np.arange(4))
        np.testing.assert_array_equal(made["constant"], np.arange(4))
    # Nodes that read no further weight stay where they are.
    assert [len(chunk.nodes) for chunk in chunks.DividedGraph(model).divide(1)] == [2, 1, 1]


# --- the reference ---


def test_widening_by_block_is_float32_with_one_block_at_a_time() -> None:
    feed = random_feed("text_encoder", CONFIG, {"B": 2, "L": 9, "N": 1})
    whole = load_model(DEFAULT_MODEL, torch.bfloat16, only=["text_encoder"]).text_encoder.float()
    expected = run_module("text_encoder", whole, feed)["text_states"]

    module: nn.Module = load_model(DEFAULT_MODEL, torch.bfloat16, only=["text_encoder"]).text_encoder
    widen_by_block(module)
    blocks = [part for name, part in module.named_modules() if name.endswith(tuple(f"block.{i}" for i in range(3)))]
    assert len(blocks) == CONFIG.text.depth

    def held() -> list[bool]:
        """Whether each block's weights take memory."""
        return [any(p.untyped_storage().nbytes() >= p.nbytes > 4 for p in block.parameters()) for block in blocks]

    seen: list[list[bool]] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: seen.append(held()))
    made = run_module("text_encoder", module, feed)["text_states"]
    np.testing.assert_array_equal(made, expected)
    assert seen == [[i == j for i in range(len(blocks))] for j in range(len(blocks))]
    assert not any(held()) and all(p.dtype == torch.float32 for p in module.parameters())


def test_a_bundles_weights_are_a_reference_too(bundles: Bundles) -> None:
    feed = random_feed("conditioner", CONFIG, {"R": 1, "L": 3})
    folder, bundle = (
        run_reference(SafetensorsCheckpoint(open_model(path)), "conditioner", [feed])[0]
        for path in (DEFAULT_MODEL, bundles("fp32"))
    )
    np.testing.assert_array_equal(bundle["cross_kv"], folder["cross_kv"])


# --- shapes and inputs ---


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("small", [True, False])
def test_shapes_differ_and_stay_within_the_ranges(graph: GraphName, small: bool) -> None:
    shapes = shapes_of(graph, CONFIG, RANGES, small=small)
    assert next(iter(shapes)) == "min" and len(shapes) >= (3 if small else 2)
    assert len({tuple(sizes.values()) for sizes in shapes.values()}) == len(shapes)
    for sizes in shapes.values():
        for axis, size in sizes.items():
            assert RANGES[axis].min <= size <= RANGES[axis].max
            assert axis not in ("h", "w", "eh", "ew") or size % CONFIG.dit.patch == 0
    if small and "h" in sizes:
        assert shapes["between"]["h"] != shapes["between"]["w"]


def test_full_size_graphs_are_tried_at_small_shapes() -> None:
    config = PRESETS["xl"]
    ranges = axis_ranges(config, ExportLimits())
    sizes = list(shapes_of("denoiser", config, ranges, small=False).values())
    assert sizes == [{"R": 1, "h": 64, "w": 64, "L": 1}, {"R": 2, "h": 64, "w": 64, "L": 48}]
    fixed = {axis: AxisRange(1, 1, 1) for axis in ranges}
    assert len(shapes_of("text_encoder", config, fixed, small=False)) == 1


def test_the_samples_are_of_every_task_and_end_in_a_graphs_own_axes() -> None:
    requests = sample_requests()
    assert [request.task for request in requests] == ["subject", "subject", "edit", "edit", "compose", "compose"]
    assert {path.name for path in SAMPLES.iterdir()} >= {"requests.jsonl", "picture-1.png"}
    sizes = {"N": 3, "L": 40, "B": 2, "R": 3, "h": 8, "w": 12, "M": 2, "eh": 8, "ew": 12}
    for graph in GRAPHS:
        shape = {axis: sizes[axis] for axis in shapes_of(graph, CONFIG, RANGES, small=True)["min"]}
        (real,) = real_inputs().feeds(graph, [shape])
        drawn = random_feed(graph, CONFIG, shape)
        for port in GRAPHS[graph].inputs:
            found = (real[port.name].shape, real[port.name].dtype)
            assert found == (drawn[port.name].shape, np.dtype(port.dtype)) == (found[0], drawn[port.name].dtype)
            assert np.isfinite(real[port.name]).all()
            assert real[port.name].std() > 0 or port.name in ("timestep", "text_mask")


def test_real_prompts_point_to_the_pictures_that_there_are() -> None:
    feed = real_inputs().feeds("text_encoder", [{"N": 3, "L": 100, "B": 6}])[0]
    rows = feed["slot_index"]
    assert rows.max() == 3 * CONFIG.qformer.queries - 1 and rows.min() == -1
    assert feed["text_mask"][0].all() and not feed["text_mask"].all()
    assert (feed["token_ids"] < CONFIG.text.vocabulary).all()


# --- measures ---


def test_measures() -> None:
    expected = np.array([3.0, 4.0], np.float32)
    rms, worst, cosine = measure(np.array([3.0, 4.5], np.float32), expected)
    assert (rms, worst) == (pytest.approx(0.1), pytest.approx(0.5)) and 0.99 < cosine < 1
    assert measure(expected, expected) == (0, 0, pytest.approx(1))
    assert measure(-expected, expected)[2] == pytest.approx(-1)
    assert measure(expected * 1.5, expected, relative=False)[0] == pytest.approx(np.sqrt(12.5) * 0.5)
    for bad in (expected * np.nan, np.array([3.0, np.inf]), expected[:1]):
        assert measure(bad, expected)[:2] == (np.inf, np.inf)
    assert measure(np.zeros(2), np.zeros(2)) == (0, 0, 1)
