"""Plans of TensorRT and TensorRT for RTX, built and run on this machine's GPU, against the CPU's results."""

import importlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from engines.factory import open_engine
from engines.interface import EngineOptions, to_numpy
from engines.plans import PLAN_ENGINES, NoPlanError, PlanEngine
from engines.tensorrt import TensorRTEngine
from export.build_plans import build
from export.plan_job import PlanOptions
from mige_rt.bundle import DEFAULT_MODEL, open_model, read_config
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from mige_rt.tokenizer import load_tokenizer
from trainer.evaluate.metrics import psnr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
LIMITS = {"fp32": 40, "fp16": 30}  # dB


@pytest.fixture(scope="module", params=PLAN_ENGINES)
def name(request: pytest.FixtureRequest) -> PlanEngine:
    """An engine whose module is here, and which knows this GPU."""
    pytest.importorskip(MODULES[request.param], reason=f"{MODULES[request.param]} is not installed")
    if request.param == "tensorrt-rtx":
        from engines.trt_runtime import capabilities

        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        if capability not in capabilities(request.param):
            pytest.skip(f"TensorRT for RTX does not know compute capability {capability}")
    return request.param


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bundle(
    request: pytest.FixtureRequest, name: PlanEngine, bundles: Callable[[str], Path], tmp_path_factory: Any
) -> Path:
    """A bundle with plans for this GPU."""
    folder = tmp_path_factory.mktemp(name) / request.param
    shutil.copytree(bundles(request.param), folder)
    with pytest.raises(NoPlanError, match=f"mige-rt build .* --engine {name}"):
        open_engine(open_model(folder), name, EngineOptions())
    build(folder, name)
    return folder


@pytest.fixture(scope="module")
def engine(bundle: Path, name: PlanEngine) -> TensorRTEngine:
    return TensorRTEngine.open(open_model(bundle), EngineOptions(), name)


def denoiser_inputs(engine: TensorRTEngine, batch: int = 2, tokens: int = 20) -> dict[str, torch.Tensor]:
    """Inputs of the default model's denoiser."""
    numbers, channels = np.random.default_rng(0), read_config(DEFAULT_MODEL).vae.channels

    def noise(*shape: int) -> Any:
        return engine.array(numbers.standard_normal(shape, np.float32))

    inputs: dict[str, Any] = {
        "latents": noise(batch, channels, 16, 16),
        "source": noise(batch, channels, 16, 16),
        "timestep": engine.array(np.full(batch, 500, np.float32)),
        "cross_kv": noise(2, 6, batch, 6, tokens, 32),
        "text_mask": engine.array(np.ones((batch, tokens), bool)),
    }
    return inputs


def run(engine: TensorRTEngine, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The denoiser's prediction."""
    return cast("torch.Tensor", engine.run("denoiser", inputs)["prediction"])


def test_a_image_is_the_cpus(
    bundle: Path, engine: TensorRTEngine, pipe: MigePipeline, scene: Image.Image, reference: Image.Image
) -> None:
    plans = MigePipeline(read_config(bundle), load_tokenizer(bundle / "tokenizer" / "tokenizer.json"), engine)
    prompt = "replace the thing in <imagehere> with <imagehere>"
    made = [p(prompt, [scene, reference], scene, seed=1, num_inference_steps=10).images[0] for p in (pipe, plans)]
    assert psnr(np.asarray(made[0]), np.asarray(made[1])) > LIMITS[engine.precision]
    again = plans(prompt, [scene, reference], scene, seed=1, num_inference_steps=10).images[0]
    assert again.tobytes() == made[1].tobytes()


def test_every_shape_gives_the_cpus_prediction(engine: TensorRTEngine, pipe: MigePipeline) -> None:
    for batch, tokens in ((1, 1), (2, 40), (6, 256), (3, 77)):
        inputs = denoiser_inputs(engine, batch, tokens)
        got = to_numpy(run(engine, inputs).float())
        wanted = to_numpy(
            pipe.engine.run("denoiser", {name: to_numpy(values) for name, values in inputs.items()})["prediction"]
        )
        error = np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))
        assert error < (1e-3 if engine.precision == "fp32" else 2e-2), (batch, tokens)


def test_an_entry_does_not_depend_on_the_others(engine: TensorRTEngine) -> None:
    inputs = denoiser_inputs(engine, 3)
    whole = run(engine, inputs).float().clone()
    first = {name: values[:, :, :1] if name == "cross_kv" else values[:1] for name, values in inputs.items()}
    alone = run(engine, first).float()
    assert torch.allclose(whole[:1], alone, atol=1e-3 if engine.precision == "fp32" else 3e-2)


def test_runs_of_one_shape_allocate_nothing(engine: TensorRTEngine) -> None:
    inputs = denoiser_inputs(engine)
    first = run(engine, inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    second = run(engine, inputs)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert second.data_ptr() == first.data_ptr()


def test_a_run_can_be_captured(engine: TensorRTEngine) -> None:
    inputs = denoiser_inputs(engine)
    wanted = run(engine, inputs).clone()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        engine.run("denoiser", inputs)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        prediction = run(engine, inputs)
    prediction.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(prediction, wanted)


def test_inputs_that_lie_badly_are_read_all_the_same(engine: TensorRTEngine) -> None:
    inputs = denoiser_inputs(engine)
    wanted = run(engine, inputs).clone()
    timesteps = torch.full((3, 2), 500.0, device=engine.device)
    badly = {**inputs, "timestep": timesteps[1], "latents": inputs["latents"].mT.contiguous().mT}
    assert torch.equal(run(engine, badly), wanted)


def test_shapes_beyond_the_ranges_are_refused(engine: TensorRTEngine) -> None:
    with pytest.raises(InputError, match="the plan of denoiser does not take"):
        engine.run("denoiser", denoiser_inputs(engine, 2, 300))
    assert run(engine, denoiser_inputs(engine)).isfinite().all()


def test_compiled_kernels_are_kept(
    bundle: Path, engine: TensorRTEngine, name: PlanEngine, caplog: pytest.LogCaptureFixture
) -> None:
    if name != "tensorrt-rtx":
        pytest.skip("TensorRT compiles nothing when it runs")
    engine.run("denoiser", denoiser_inputs(engine))
    assert list(bundle.glob("engines/*/kernels-*.cache"))
    with caplog.at_level(logging.WARNING):
        TensorRTEngine.open(open_model(bundle), EngineOptions(), name)
    assert "compiles kernels" not in caplog.text


def test_a_plan_that_cannot_be_loaded_is_named(
    bundle: Path, name: PlanEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (plan,) = copy.glob("engines/*/denoiser.plan")
    plan.write_bytes(b"\0" * plan.stat().st_size)
    with pytest.raises(InputError, match=r"denoiser\.plan was changed"):
        TensorRTEngine.open(open_model(copy), EngineOptions(), name)
    module = importlib.import_module("engines.plans")
    monkeypatch.setattr(module, "check_plans", lambda *_: None)
    with pytest.raises(InputError, match=f"could not be loaded .*mige-rt build --bundle {copy}"):
        TensorRTEngine.open(open_model(copy), EngineOptions(), name)


def test_refittable_plans_say_so(bundle: Path, name: PlanEngine, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    plans = build(copied, name, options=PlanOptions(refittable=True))
    trt = importlib.import_module(MODULES[name])
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine((plans / "conditioner.plan").read_bytes())
    assert engine.refittable
