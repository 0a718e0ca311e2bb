"""What a benchmark's worker says of a GPU, with CUDA stubbed: memory and times of captured steps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cuda_stubs import Cuda

import benchmarks.worker
from benchmarks.case import WorkerConfig
from benchmarks.worker import GraphTracer, WorkerState
from mige_rt.denoise import LoopInputs
from mige_rt.pipeline import MigePipeline


def test_the_gpus_memory_is_read_before_the_weights_are_there(
    cuda: Cuda, pipe: MigePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 80 << 30

    def open_pipeline(config: WorkerConfig) -> MigePipeline:
        nonlocal free
        free -= 13 << 30
        return pipe

    monkeypatch.setattr(benchmarks.worker, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 << 30))
    monkeypatch.setattr(benchmarks.worker, "_open_pipeline", open_pipeline)
    config: Any = type("Config", (), {"device": "auto"})()
    assert WorkerState(config).free_gpu == 80 << 30
    assert free == 67 << 30


def test_captured_steps_are_timed_as_the_denoiser() -> None:
    log: list[str] = []
    tracer = GraphTracer(lambda: log.append("synchronize"))
    mask = np.ones((2, 20), bool)

    def step(*arrays: Any) -> Any:
        log.append("step")
        return arrays[1], arrays[2]

    timed: Callable[..., Any] = tracer.around_step(step)
    inputs: Any = LoopInputs(mask, mask, mask, mask)  # type: ignore[arg-type]
    for _ in range(3):
        assert timed(inputs, 1, 2, 3) == (1, 2)
    calls, seconds = tracer.graphs["denoiser"]
    assert calls == 3 and seconds > 0 and tracer.tokens == 20
    assert log == ["synchronize", "step", "synchronize"] * 3
