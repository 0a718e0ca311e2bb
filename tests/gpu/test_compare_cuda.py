"""Engines on two devices compared: the PyTorch engine on CUDA, its steps captured, with the CPU's."""

import pytest
import torch

from benchmarks.parity import compare_pipelines
from export.inputs import sample_requests
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_cuda_is_within_the_tolerance_of_its_precision(pipe: MigePipeline, precision: str) -> None:
    cuda = MigePipeline.from_pretrained(engine="pytorch", device="cuda", precision=precision)  # type: ignore[arg-type]
    requests = {request.task: request for request in sample_requests()}
    for reference, candidate in ((pipe, cuda), (cuda, pipe)):
        parity = compare_pipelines(reference, candidate, requests, 1, SamplingParams(num_inference_steps=6))
        assert parity.ok and len(parity.images) == parity.requested, [m for m in parity.metrics if not m.ok]
