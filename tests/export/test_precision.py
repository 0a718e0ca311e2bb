"""What precision does to a graph."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export import precision
from export.chunks import run_onnx
from export.context import ExportTarget
from export.graphs import export_graph
from export.inputs import random_feed
from export.reference import Feed, run_module
from mige_rt.config import ModelConfig, TextConfig
from mige_rt.graphs import AxisRange
from trainer.model.encoders import TextEncoder

LARGEST_HALF = 65_504.0
CONFIG = ModelConfig("overflowing", text=TextConfig(vocabulary=50, width=32, head_width=8, mlp=48, depth=2, heads=4))
RANGES = {"B": AxisRange(1, 1, 2), "L": AxisRange(1, 4, 8), "N": AxisRange(1, 1, 1)}


class NoSuchModule:
    """In T5's place where half precision is to be plain."""


@pytest.fixture
def overflowing() -> TextEncoder:
    """A T5 whose gates are about a thousand, each within half precision, and their product is not."""
    torch.manual_seed(0)
    encoder = TextEncoder(CONFIG)
    for name, weight in encoder.named_parameters():
        if ".wi_" in name:
            weight.data = 1000 * torch.randn_like(weight) / weight.shape[1] ** 0.5
    return encoder.eval()


def exported(encoder: TextEncoder, folder: Path) -> Path:
    """The file of an fp16 export."""
    with torch.device("meta"):
        module = TextEncoder(CONFIG)
    stored = {name: weight.detach() for name, weight in encoder.state_dict().items()}
    target = ExportTarget(CONFIG, "fp16", RANGES, folder)
    export_graph("text_encoder", module, stored.__getitem__, target)
    return target.onnx_path("text_encoder")


def largest_by_type(path: Path, feed: Feed) -> dict[int, float]:
    """The largest absolute value that the graph's values of each floating-point type take; infinite if beyond it.

    Every value is made an output, and so rounded to the type that the graph gives it: between nodes ONNX Runtime's
    CPU keeps half precision as float32, where an overflow does not show.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    floats = {n: t for n, t in types.items() if t in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)}
    assert len(floats) > 50
    del model.graph.output[:]
    model.graph.output.extend(value for value in model.graph.value_info if value.name in floats)
    watched = path.with_name("watched.onnx")
    onnx.save(model, watched)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(watched), options, providers=["CPUExecutionProvider"])
    largest: dict[int, float] = {}
    for output, result in zip(session.get_outputs(), session.run(None, feed), strict=True):
        values = np.asarray(result)
        # The lowest number stands for what a mask hides.
        magnitudes = np.abs(values[values != np.finfo(values.dtype).min].astype(np.float64))
        kind = floats[output.name]
        largest[kind] = max(largest.get(kind, 0.0), float(magnitudes.max(initial=0)))
    return largest


def test_t5_past_the_range_of_half_precision_stays_finite_in_our_export_and_not_in_a_plain_one(
    overflowing: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = random_feed("text_encoder", CONFIG, {"B": 2, "L": 6, "N": 1})
    expected = run_module("text_encoder", overflowing, feed)["text_states"]

    for folder in ("ours", "plain"):
        (tmp_path / folder).mkdir()
    ours = exported(overflowing, tmp_path / "ours")
    largest = largest_by_type(ours, feed)
    assert largest[onnx.TensorProto.FLOAT] > 2 * LARGEST_HALF  # the test's own premise
    assert largest[onnx.TensorProto.FLOAT16] < LARGEST_HALF
    made = run_onnx(ours, [feed])[0]["text_states"]
    assert np.abs(made - expected).max() < 0.02 * np.abs(expected).max()

    monkeypatch.setattr(precision, "T5DenseGatedActDense", NoSuchModule)
    plain = exported(overflowing, tmp_path / "plain")
    assert largest_by_type(plain, feed)[onnx.TensorProto.FLOAT16] == np.inf
    # PyTorch rounds after every operation, and shows it.
    module = precision.PreciseGraph("text_encoder", overflowing, "fp16")
    assert not np.isfinite(run_module("text_encoder", module, feed)["text_states"]).all()
