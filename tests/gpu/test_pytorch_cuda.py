"""The PyTorch engine on CUDA against the CPU."""

import numpy as np
import pytest
import torch
from PIL import Image

from mige_rt.pipeline import MigePipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize(("precision", "psnr"), [("fp32", 40), ("fp16", 30), ("bf16", 25)])
def test_a_picture_made_on_cuda_is_the_cpus(
    pipe: MigePipeline, scene: Image.Image, reference: Image.Image, precision: str, psnr: float
) -> None:
    cuda = MigePipeline.from_pretrained(device="cuda", precision=precision)  # type: ignore[arg-type]
    prompt = "replace the thing in <imagehere> with <imagehere>"
    pictures = [p(prompt, [scene, reference], scene, seed=1, steps=10)[0] for p in (pipe, cuda)]
    a, b = (np.asarray(picture, float) for picture in pictures)
    assert 10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-9)) > psnr


def test_cuda_is_what_auto_takes(pipe: MigePipeline) -> None:
    assert MigePipeline.from_pretrained().engine.device == "cuda"
