"""The PyTorch engine on CUDA against the CPU."""

import numpy as np
import pytest
import torch
from PIL import Image

from mige_rt.pipeline import MigePipeline
from trainer.evaluate.metrics import psnr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 40), ("fp16", 30), ("bf16", 25)])
def test_a_picture_made_on_cuda_is_the_cpus(
    pipe: MigePipeline, scene: Image.Image, reference: Image.Image, precision: str, limit: float
) -> None:
    cuda = MigePipeline.from_pretrained(engine="pytorch", device="cuda", precision=precision)  # type: ignore[arg-type]
    prompt = "replace the thing in <imagehere> with <imagehere>"
    images = [p(prompt, [scene, reference], scene, seed=1, num_inference_steps=10).images[0] for p in (pipe, cuda)]
    assert psnr(np.asarray(images[0]), np.asarray(images[1])) > limit


def test_cuda_is_what_auto_takes(pipe: MigePipeline) -> None:
    assert MigePipeline.from_pretrained().engine.device == "cuda"
