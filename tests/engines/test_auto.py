"""What `auto` opens, for every precision, on machines with and without a GPU; drivers and cards are stubbed."""

from dataclasses import replace
from typing import Any

import onnxruntime
import pytest
import torch

import engines.pytorch
from engines import factory, onnx_runtime
from engines.factory import open_engine
from engines.interface import Engine, EngineOptions
from mige_rt.bundle import DEFAULT_MODEL, OpenedModel, open_model
from mige_rt.errors import NotAvailableError


def model(precision: Any) -> OpenedModel:
    """The default model, said to be of a precision."""
    opened = open_model(DEFAULT_MODEL)
    assert opened.manifest is not None
    return replace(opened, manifest=replace(opened.manifest, precision=precision))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NVIDIA driver, and a GPU that PyTorch sees; its weights stay on the CPU."""
    monkeypatch.setattr(factory, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(engines.pytorch, "attention_order", lambda *_: [])
    load = engines.pytorch._load_graph

    def on_the_cpu(checkpoint: Any, empty: Any, graph: Any, device: str, precision: str) -> None:
        assert device == "cuda"
        load(checkpoint, empty, graph, "cpu", precision)

    monkeypatch.setattr(engines.pytorch, "_load_graph", on_the_cpu)


def opened(precision: str, **options: Any) -> Engine:
    return open_engine(model(precision), "auto", EngineOptions(**options))


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", ("pytorch", "cuda", "fp16")),
        ("fp16", ("pytorch", "cuda", "fp16")),
        ("bf16", ("pytorch", "cuda", "fp16")),
        ("int8", ("onnxruntime", "cpu", "int8")),
    ],
)
def test_every_precision_opens_with_a_driver(precision: str, expected: tuple[str, str, str]) -> None:
    engine = opened(precision)
    assert (engine.name, engine.device, engine.precision) == expected


@pytest.mark.usefixtures("driver")
def test_int8_opens_on_the_cpu_where_onnx_runtime_has_cuda_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [onnx_runtime.CUDA, "CPUExecutionProvider"])
    assert opened("int8").device == "cpu"
    with pytest.raises(NotAvailableError, match="no engine here can run") as caught:
        opened("int8", device="cuda")
    assert "pytorch on cuda: " in str(caught.value) and "onnxruntime on cuda: " in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_driver_without_a_gpu_that_pytorch_sees_is_the_cpu(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "has_nvidia_driver", lambda: True)
    engine = opened(precision)
    assert (engine.name, engine.device) == ("onnxruntime", "cpu")


@pytest.mark.usefixtures("driver")
def test_the_fastest_engine_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, str]] = []

    def refuse(name: str) -> Any:
        def open_none(model: OpenedModel, options: EngineOptions) -> Engine:
            tried.append((name, options.device))
            raise NotAvailableError("not today")

        return factory._Entry(open_none, "")

    monkeypatch.setattr(factory, "_ENTRIES", {name: refuse(name) for name in factory.ENGINES})
    with pytest.raises(NotAvailableError):
        opened("fp32")
    on_cuda = [(name, "cuda") for name in ("tensorrt", "tensorrt-rtx", "pytorch", "onnxruntime")]
    assert tried == [*on_cuda, ("onnxruntime", "cpu"), ("pytorch", "cpu")]


def test_all_engines_are_tried() -> None:
    assert sorted(factory.FASTEST_ON_CUDA) == sorted(factory.ENGINES)
    assert {*factory.FASTEST_ON_CPU} == {"onnxruntime", "pytorch"}
