"""What the TensorRT engine tells a context, and when, without a GPU: this context only writes down what it hears."""

from typing import Any

import pytest
import torch
from cuda_stubs import Cuda

from engines import tensorrt
from engines.factory import open_engine
from engines.interface import EngineOptions
from engines.tensorrt import CACHED_SHAPES, TensorRTEngine, _KeepAlive, _KernelCache, _Plan, _PlanTensor
from mige_rt.bundle import open_model
from mige_rt.errors import InputError


class Context:
    """Takes x [1..4, 8] and flag, gives y of x's shape; writes down its calls, and is the log."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.calls: list[str] = []
        self.works = True
        self.error = "it broke"

    def summary(self) -> str:
        return self.error

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.calls.append(f"shape {name}")
        self.shapes[name] = shape
        return shape[0] <= 4

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000 * self.shapes["x"][0]

    def set_device_memory(self, memory: int, size: int) -> None:
        self.calls.append("memory")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.calls.append(f"address {name}")
        return self.works

    def execute_async_v3(self, stream: int) -> bool:
        self.calls.append("run")
        return self.works

    def heard(self) -> list[str]:
        heard, self.calls = self.calls, []
        return heard


@pytest.fixture
def context() -> Context:
    return Context()


@pytest.fixture
def plan(context: Context, monkeypatch: pytest.MonkeyPatch) -> _Plan:
    monkeypatch.setattr(tensorrt, "ALIGNMENT", 64)  # that of the CPU's tensors
    specs = {
        "x": _PlanTensor(True, torch.float16),
        "flag": _PlanTensor(True, torch.bool),
        "y": _PlanTensor(False, torch.float32),
    }
    fake: Any = context
    return _Plan("denoiser", "cpu", specs, fake, cache=None, keep_alive=_KeepAlive(context, None, None))


def run(plan: _Plan, x: torch.Tensor, flag: torch.Tensor, workspace: torch.Tensor) -> bool:
    new = plan.set_shapes({"x": tuple(x.shape), "flag": tuple(flag.shape)})
    plan.set_addresses({"x": x, "flag": flag}, workspace)
    plan.enqueue(7)
    return new


def test_a_context_is_told_what_changed_alone(plan: _Plan, context: Context) -> None:
    x, flag, workspace = torch.ones(2, 8, dtype=torch.float16), torch.ones(2, dtype=torch.bool), torch.empty(4096)
    assert run(plan, x, flag, workspace)
    everything = ["shape x", "shape flag", "address x", "address flag", "address y", "memory", "run"]
    assert context.heard() == everything
    assert plan.workspace_bytes == 2000
    outputs = plan.outputs["y"]
    assert outputs.shape == (2, 8)
    assert not run(plan, x, flag, workspace)
    assert context.heard() == ["run"]
    other = x + 1
    run(plan, other, flag, workspace)
    assert context.heard() == ["address x", "run"]
    run(plan, other, flag, torch.empty(8192))
    assert context.heard() == ["memory", "run"]
    assert plan.outputs["y"] is outputs


def test_outputs_stay_where_they_are_when_shapes_come_back(plan: _Plan, context: Context) -> None:
    workspace = torch.empty(8192)
    flag = torch.ones(1, dtype=torch.bool)
    made = []
    for rows in (1, 2, 1, 2):
        run(plan, torch.ones(rows, 8, dtype=torch.float16), flag, workspace)
        made.append(plan.outputs["y"].data_ptr())
    assert made[:2] == made[2:]
    for tokens in range(8, 8 + CACHED_SHAPES):  # as many other shapes: the first are forgotten
        run(plan, torch.ones(1, tokens, dtype=torch.float16), flag, workspace)
    assert run(plan, torch.ones(2, 8, dtype=torch.float16), flag, workspace)


def test_what_cannot_be_read_in_place_is_copied_to_one_place(plan: _Plan, context: Context) -> None:
    flag, workspace = torch.ones(2, dtype=torch.bool), torch.empty(4096)
    whole = torch.arange(200, dtype=torch.float16)
    for x in (whole[1:17].reshape(2, 8), whole[:16].reshape(8, 2).T, whole[:16].reshape(2, 8).float()):
        run(plan, x, flag, workspace)
        copy = plan._copies["x"]
        assert torch.equal(copy, x.half())
        assert copy.data_ptr() % 64 == 0 and copy.is_contiguous()
    assert sum(call == "address x" for call in context.heard()) == 1


def test_shapes_outside_the_ranges_are_refused_and_forgotten(plan: _Plan, context: Context) -> None:
    flag, workspace = torch.ones(2, dtype=torch.bool), torch.empty(4096)
    with pytest.raises(InputError, match=r"denoiser does not take x of shape \[5, 8\].*export it with larger limits"):
        run(plan, torch.ones(5, 8, dtype=torch.float16), flag, workspace)
    run(plan, torch.ones(4, 8, dtype=torch.float16), flag, workspace)
    assert context.heard()[-1] == "run"


def test_a_false_from_the_runtime_is_an_error(plan: _Plan, context: Context) -> None:
    context.works = False
    with pytest.raises(RuntimeError, match="address of x in denoiser"):
        run(plan, torch.ones(1, 8, dtype=torch.float16), torch.ones(1, dtype=torch.bool), torch.empty(4096))
    with pytest.raises(RuntimeError, match=r"denoiser could not be run with .*: it broke"):
        plan.enqueue(7)
    context.error = "Error Code 2: OutOfMemory"
    with pytest.raises(InputError, match="the GPU ran out of memory"):
        plan.enqueue(7)


class _Cache:
    """A runtime cache of a few bytes."""

    def __init__(self, taken: bool) -> None:
        self.content, self.taken = b"", taken

    def deserialize(self, blob: bytes) -> bool:
        self.content = blob if self.taken else b""
        return self.taken

    def serialize(self) -> bytes:
        return self.content


class _Config:
    def __init__(self, cache: _Cache) -> None:
        self.cache = cache

    def create_runtime_cache(self) -> _Cache:
        return self.cache

    def set_runtime_cache(self, cache: _Cache) -> bool:
        return cache is self.cache


def test_compiled_kernels_are_kept(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "kernels-8.9.cache"
    config: Any = _Config(_Cache(True))
    cache = _KernelCache(path)
    assert not cache.loaded
    cache.attach(config)
    config.cache.content = b"kernels"
    cache.save()
    again = _KernelCache(path)
    assert again.loaded
    again.attach(config)
    before = path.stat().st_mtime_ns
    again.save()
    assert path.stat().st_mtime_ns == before and list(tmp_path.iterdir()) == [path]
    other: Any = _Config(_Cache(False))
    _KernelCache(path).attach(other)
    assert "of another version or GPU" in caplog.text


def test_kernels_that_cannot_be_kept_cost_time_alone(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    config: Any = _Config(_Cache(True))
    cache = _KernelCache(tmp_path / "no folder" / "kernels-8.9.cache")
    cache.attach(config)
    config.cache.content = b"kernels"
    cache.save()
    cache.save()
    assert caplog.text.count("cannot be kept") == 1


def test_another_precision_than_the_bundles_is_refused(bundles: Any) -> None:
    with pytest.raises(InputError, match="exported in fp32, and fp16 was asked for"):
        open_engine(open_model(bundles("fp32")), "tensorrt-rtx", EngineOptions(precision="fp16"))


def test_a_context_that_can_tell_is_asked_whether_it_can_be_captured(cuda: Cuda, plan: _Plan) -> None:
    engine: Any = TensorRTEngine.__new__(TensorRTEngine)  # without a GPU
    engine.device, engine._plans = "cuda:0", {"denoiser": plan}
    assert engine.is_capturable("denoiser")  # TensorRT's contexts cannot tell
    asked: list[int] = []

    def is_stream_capturable(stream: int) -> bool:
        asked.append(stream)
        return False

    plan.context.is_stream_capturable = is_stream_capturable  # type: ignore[method-assign]
    with torch.cuda.stream(torch.cuda.Stream("cuda:0")):  # type: ignore[arg-type]
        assert not engine.is_capturable("denoiser")
        assert asked == [torch.cuda.current_stream().cuda_stream] != [0]
