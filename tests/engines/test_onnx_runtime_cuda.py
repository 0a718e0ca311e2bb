"""ONNX Runtime on CUDA without a GPU: what a session is opened with, in which order streams wait, what errors say."""

import io
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, cast

import onnxruntime
import pytest
import torch
from cuda_stubs import Cuda, Stream

from engines import onnx_runtime, trial
from engines.factory import open_engine
from engines.interface import EngineOptions
from engines.onnx_runtime import OnnxRuntimeEngine
from mige_rt.bundle import DEFAULT_MODEL, open_model, read_manifest
from mige_rt.errors import NotAvailableError

MANIFEST = read_manifest(DEFAULT_MODEL)
ROOT = Path(__file__).parents[2]


class Binding:
    def bind_input(self, *_: Any) -> None: ...
    def bind_output(self, *_: Any) -> None: ...


class Session:
    """A session that notes its options and its runs; its providers are those that were asked for."""

    opened: list[Any] = []  # noqa: RUF012, of all sessions
    lost = False

    def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
        Session.opened.append(providers)
        self.providers = ["CPUExecutionProvider"] if Session.lost else [providers[0][0], "CPUExecutionProvider"]

    def get_providers(self) -> list[str]:
        return self.providers

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding) -> None:
        Stream.log.append("run")


@pytest.fixture
def gpu(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A machine with a GPU, and ONNX Runtime for it."""
    Session.opened, Session.lost = [], False
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [onnx_runtime.CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    empty = torch.empty

    def on_the_cpu(*sizes: Any, device: str, **options: Any) -> torch.Tensor:
        assert device.startswith("cuda:")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", on_the_cpu)
    return cuda


def open_on_cuda() -> OnnxRuntimeEngine:
    return cast(
        "OnnxRuntimeEngine", open_engine(open_model(DEFAULT_MODEL), "onnxruntime", EngineOptions(device="cuda"))
    )


@pytest.mark.usefixtures("gpu")
def test_a_session_runs_on_a_stream_of_the_engines_own() -> None:
    engine = open_on_cuda()
    ((name, options), fallback) = Session.opened[0]
    assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    # The default stream's handle is 0, which ONNX Runtime takes for none.
    assert options["user_compute_stream"] == str(engine._stream.cuda_stream) != "0"
    assert options["device_id"] == "0"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("precision", "tf32"), [("fp32", "0"), ("fp16", "1"), ("bf16", "1")])
def test_options_are_exact_and_frugal(precision: Any, tf32: str) -> None:
    engine = OnnxRuntimeEngine(DEFAULT_MODEL, replace(MANIFEST, precision=precision), "cuda:3")
    ((_, options), _) = engine._providers()
    assert options["use_tf32"] == tf32
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    assert options["device_id"] == "3"


@pytest.mark.usefixtures("gpu")
def test_torchs_stream_and_the_engines_wait_for_each_other() -> None:
    engine = open_on_cuda()
    side = MANIFEST.model.size
    pixels: Any = torch.zeros(1, 3, side, side)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream("cuda:0")):  # type: ignore[arg-type]
        with torch.cuda.stream(stream):
            Stream.log.clear()
            engine.run("vae_encoder", {"pixels_vae": pixels})
        own, torchs = engine._stream.cuda_stream, stream.cuda_stream
        assert Stream.log == [f"{own} waits for {torchs}", "run", f"{torchs} waits for {own}"]


@pytest.mark.usefixtures("gpu")
def test_a_provider_that_is_lost_is_an_error_when_the_engine_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself goes on with the CPU."""
    Session.lost = True
    with pytest.raises(NotAvailableError, match=r"could not load its CUDA provider .*CUDA and cuDNN must be"):
        open_on_cuda()
    monkeypatch.setattr(onnx_runtime, "distribution", lambda name: None)  # both packages are installed
    with pytest.raises(NotAvailableError, match=r"onnxruntime and onnxruntime-gpu are both installed.*pip uninstall"):
        open_on_cuda()


@pytest.mark.usefixtures("gpu")
def test_no_session_is_made_of_a_foreign_graph_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign, tried = replace(open_model(DEFAULT_MODEL), known=False), list[str]()

    def run_trial(folder: Path, manifest: Any, device: str) -> None:
        assert not Session.opened
        tried.append(device)

    monkeypatch.setattr(trial, "run_trial", run_trial)
    monkeypatch.setattr(trial, "remember", lambda file: None)
    open_engine(foreign, "onnxruntime", EngineOptions(device="cuda"))
    assert tried == ["cuda:0"] and Session.opened


@pytest.mark.usefixtures("gpu")
def test_a_provider_that_is_lost_is_not_the_foreign_graphs_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or else --engine auto would not try the next engine. The trial's process is this one, which has the stubs."""
    foreign, Session.lost = replace(open_model(DEFAULT_MODEL), known=False), True

    def run(command: Any, *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        with pytest.raises(SystemExit) as end:
            trial.main()
        return subprocess.CompletedProcess(command, int(end.value.code or 0), capsys.readouterr().out, "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(OnnxRuntimeEngine, "array", lambda self, values: values)
    with pytest.raises(NotAvailableError, match="could not load its CUDA provider"):
        open_engine(foreign, "onnxruntime", EngineOptions(device="cuda"))


def test_without_the_provider_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotAvailableError, match="pip uninstall -y onnxruntime && pip install onnxruntime-gpu"):
        open_on_cuda()

    def only_gpu(name: str) -> None:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)

    monkeypatch.setattr(onnx_runtime, "distribution", only_gpu)
    with pytest.raises(NotAvailableError, match="ONNX Runtime has no device 'cuda' here"):
        open_on_cuda()


def test_no_extra_brings_a_second_onnx_runtime() -> None:
    """Installed together, onnxruntime and onnxruntime-gpu overwrite each other's files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    assert not [requirement for requirement in extras if requirement.startswith("onnxruntime")]
    for file in ("README.md", "docs/engines.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert "pip uninstall -y onnxruntime && pip install onnxruntime-gpu" in text, file


@pytest.mark.usefixtures("gpu")
def test_integer_products_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(DEFAULT_MODEL)
    quantised = replace(model, manifest=replace(MANIFEST, precision="int8"))
    with pytest.raises(NotAvailableError, match="use --device cpu"):
        OnnxRuntimeEngine.open(quantised, EngineOptions(device="cuda"))
    assert not Session.opened
