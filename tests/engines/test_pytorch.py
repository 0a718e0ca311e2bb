import numpy as np
import pytest
from PIL import Image

from engines.factory import open_engine
from engines.pytorch import PyTorchEngine
from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from trainer.evaluate.metrics import psnr


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_gives_nearly_the_same_picture(pipe: MigePipeline, scene: Image.Image, precision: str) -> None:
    half = MigePipeline.from_pretrained(engine="pytorch", precision=precision)  # type: ignore[arg-type]
    pictures = [p("make the background blue", source=scene, seed=1, steps=4)[0] for p in (pipe, half)]
    assert psnr(np.asarray(pictures[0]), np.asarray(pictures[1])) > 25


def test_arrays_are_numpy_on_the_cpu(pipe: MigePipeline) -> None:
    values = np.zeros((1, 3, 64, 64), np.float32)
    assert pipe.engine.array(values) is values
    outputs = pipe.engine.run("vae_encoder", {"pixels_vae": values})
    assert list(outputs) == ["latent_mean", "latent_logvar"]
    assert all(isinstance(output, np.ndarray) and output.dtype == np.float32 for output in outputs.values())


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="int8"):
        PyTorchEngine.open(DEFAULT_MODEL, precision="int8")
    with pytest.raises(InputError, match="cuda:99"):
        PyTorchEngine.open(DEFAULT_MODEL, device="cuda:99")
    with pytest.raises(InputError, match="no engine 'abacus'"):
        open_engine(DEFAULT_MODEL, "abacus", "cpu", "fp32")
