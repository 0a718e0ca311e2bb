"""fp8, and int8 by SmoothQuant: what is quantised, how close it is, and what TensorRT for RTX makes of it."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from plans import kernels_of

from export import calibrate, quantise_static
from export.build_plans import check_request, portable
from export.chunks import run_onnx
from export.context import ExportTarget
from export.exporter import locate_checkpoint
from export.graphs import export_graph
from export.inputs import random_feed, sample_requests
from export.reference import run_reference
from export.validate import RANDOM_TOLERANCES, measure
from mige_rt import graph_checks
from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE, read_manifest
from mige_rt.config import PRESETS, Precision
from mige_rt.errors import InputError
from mige_rt.graphs import AxisRange
from mige_rt.onnx_file import read_onnx
from mige_rt.tokenizer import load_tokenizer
from trainer.checkpoints.open_checkpoint import open_checkpoint
from trainer.checkpoints.weights import Checkpoint, empty_model
from trainer.model.dit import block_layers

TINY = PRESETS["tiny"]
PRECISIONS: tuple[Precision, ...] = ("fp8", "int8-sq")
TYPES = MappingProxyType({"fp8": onnx.TensorProto.FLOAT8E4M3FN, "int8-sq": onnx.TensorProto.INT8})
Quantised = Callable[[Precision], ExportTarget]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(locate_checkpoint("tiny"))


@pytest.fixture(scope="module")
def ranges(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Of a short calibration: one edit in three steps."""
    edit = next(request for request in sample_requests() if request.task == "edit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "STEPS", 3)
        patch.setattr(calibrate, "sample_requests", lambda: [edit])
        calls: list[int] = []
        measured = calibrate.input_ranges(checkpoint, load_tokenizer(DEFAULT_MODEL / TOKENIZER_FILE), calls.append)
    assert calls == [1, 2, 3]
    return measured


@pytest.fixture(scope="module")
def quantised(
    checkpoint: Checkpoint, ranges: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Quantised:
    """The default model's denoiser, exported in fp16 once and quantised when first asked for."""
    folder = tmp_path_factory.mktemp("fp16")
    axes = {"R": AxisRange(1, 2, 3), "L": AxisRange(1, 48, 256), "h": AxisRange(16, 16, 16), "w": AxisRange(16, 16, 16)}
    exported = ExportTarget(TINY, "fp16", axes, folder)
    weights = checkpoint.load(["denoiser"]).graph("denoiser").state_dict()
    export_graph("denoiser", empty_model(TINY).graph("denoiser"), weights.__getitem__, exported)

    @cache
    def quantise(precision: Precision) -> ExportTarget:
        target = replace(exported, precision=precision, folder=tmp_path_factory.mktemp(precision))
        shutil.copytree(folder, target.folder, dirs_exist_ok=True)
        layers = quantise_static.quantise_static(target, ranges)
        assert sorted(layers) == sorted(ranges)
        return target

    return quantise


def test_calibration_measures_what_each_layer_is_given(ranges: dict[str, torch.Tensor]) -> None:
    layers = block_layers(empty_model(TINY).denoiser)
    assert len(layers) == 6 * TINY.dit.depth and ranges.keys() == layers.keys()
    for name, layer in layers.items():
        assert ranges[name].shape == (layer.in_features,) and ranges[name].isfinite().all() and ranges[name].max() > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_blocks_products_are_quantised_and_nothing_else(quantised: Quantised, precision: Precision) -> None:
    model = onnx.load(quantised(precision).onnx_path("denoiser"))
    onnx.checker.check_model(model)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    narrow = {name: tensor for name, tensor in stored.items() if tensor.data_type == TYPES[precision] and tensor.dims}
    assert len(narrow) == 8 * TINY.dit.depth  # six layers, of which one is queries, keys and values
    assert all(name.startswith("blocks.") and ".weight" in name for name in narrow)
    for name, tensor in narrow.items():
        scale = stored[name.replace("quantised", "scale")]
        assert list(scale.dims) == [tensor.dims[1]] and scale.data_type == onnx.TensorProto.FLOAT16  # one a channel
    inputs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(inputs) == 6 * TINY.dit.depth
    assert all(not stored[node.input[1]].dims for node in inputs)  # one scale
    for name in ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "t_block.1.weight"):
        assert any(name in other for other in stored if stored[other].data_type == onnx.TensorProto.FLOAT16), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_is_not_refused_on_another_machine(quantised: Quantised, precision: Precision) -> None:
    target = quantised(precision)
    entry = read_manifest(DEFAULT_MODEL).graphs["denoiser"]
    weights = replace(entry.weights, bytes=target.weights_path("denoiser").stat().st_size)
    model = read_onnx(target.onnx_path("denoiser"))
    assert not graph_checks._forbidden(model)
    assert not graph_checks._tensors(model.tensors, replace(entry, weights=weights))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_prediction_is_close_to_that_of_float32(
    quantised: Quantised, checkpoint: Checkpoint, precision: Precision
) -> None:
    feed = random_feed("denoiser", TINY, {"R": 2, "L": 48, "h": 16, "w": 16})
    expected = run_reference(checkpoint, "denoiser", [feed])[0]["prediction"]
    ours = run_onnx(quantised(precision).onnx_path("denoiser"), [feed])[0]["prediction"]
    error, _, _ = measure(ours, expected)
    assert 1e-3 < error < RANDOM_TOLERANCES[precision]  # fp16 is nearer than that


def _linear_model(folder: Path, weight: NDArray[np.float16]) -> ExportTarget:
    """A denoiser of one product, as it is exported."""
    target = ExportTarget(TINY, "int8-sq", {}, folder)
    nodes = [
        onnx.helper.make_node("Transpose", ["blocks.0.fc.weight"], ["transposed"], perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["x", "transposed"], ["product"]),
        onnx.helper.make_node("Identity", ["product"], ["y"]),
    ]
    ports = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT16, ["n", s]) for n, s in (("x", 64), ("y", 32))
    ]
    initializer = onnx.numpy_helper.from_array(weight, "blocks.0.fc.weight")
    graph = onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:], [initializer])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, target.onnx_path("denoiser"))
    return target


def test_smoothing_saves_what_outliers_would_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((50, 64)), rng.standard_normal((32, 64)).astype(np.float16)
    x[:, 5] *= 100
    expected, ranges = x @ weight.T.astype(float), {"blocks.0.fc": torch.as_tensor(np.abs(x).max(0)).float()}
    errors: list[float] = []
    for smooth in (True, False):
        plain = replace(quantise_static._FORMATS["int8-sq"], smooth=smooth)
        monkeypatch.setattr(quantise_static, "_FORMATS", {"int8-sq": plain})
        target = _linear_model(tmp_path, weight)
        quantise_static.quantise_static(target, ranges)
        (outputs,) = run_onnx(target.onnx_path("denoiser"), [{"x": x.astype(np.float16)}])
        errors.append(measure(outputs["y"], expected)[0])
    assert errors[0] < 0.02 and errors[0] < errors[1] / 2, errors


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plans_multiply_in_the_quantised_type_and_attention_stays_fused(
    quantised: Quantised, precision: Precision
) -> None:
    pytest.importorskip("tensorrt_rtx")
    kernels = kernels_of(quantised(precision), "denoiser", "8.9", "12.0")
    name = {"fp8": "FP8", "int8-sq": "Int8"}[precision]
    products = [kernel for kernel in kernels if kernel.kind == "gemm" and set(kernel.inputs) == {name}]
    # Queries, keys and values are three products, which the builder joins for some GPUs.
    parts = [part for kernel in products for part in kernel.name.split("+")]
    assert len(parts) == 8 * TINY.dit.depth, [kernel for kernel in kernels if kernel.kind == "gemm"]
    assert sum(kernel.is_attention for kernel in kernels) == 2 * TINY.dit.depth


def test_fp8_is_for_gpus_that_have_it() -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(InputError, match=r"8\.6 have no fp8"):
        check_request("tensorrt-rtx", "fp8", ["8.6", "8.9"])
    check_request("tensorrt-rtx", "fp8", ["8.9", "12.0"])
    check_request("tensorrt-rtx", "int8-sq", ["8.6"])
    assert portable("fp8") == ("8.9", "12.0")
