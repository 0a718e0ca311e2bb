import numpy as np
import pytest
from PIL import Image

from engines.device import DeviceName, parse_device
from engines.factory import open_engine
from engines.interface import EngineOptions
from engines.pytorch import PyTorchEngine
from mige_rt.bundle import DEFAULT_MODEL, open_model
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from trainer.evaluate.metrics import psnr


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_gives_nearly_the_same_image(pipe: MigePipeline, scene: Image.Image, precision: str) -> None:
    half = MigePipeline.from_pretrained(engine="pytorch", precision=precision)  # type: ignore[arg-type]
    images = [
        p("make the background blue", source=scene, seed=1, num_inference_steps=4).images[0] for p in (pipe, half)
    ]
    assert psnr(np.asarray(images[0]), np.asarray(images[1])) > 25


def test_arrays_are_numpy_on_the_cpu(pipe: MigePipeline) -> None:
    values = np.zeros((1, 3, 64, 64), np.float32)
    assert pipe.engine.array(values) is values
    outputs = pipe.engine.run("vae_encoder", {"pixels_vae": values})
    assert list(outputs) == ["latent_mean", "latent_logvar"]
    assert all(isinstance(output, np.ndarray) and output.dtype == np.float32 for output in outputs.values())


def test_what_is_not_there_is_refused() -> None:
    model = open_model(DEFAULT_MODEL)
    with pytest.raises(InputError, match="int8"):
        PyTorchEngine.open(model, EngineOptions(device="cpu", precision="int8"))
    with pytest.raises(InputError, match="cuda:99"):
        PyTorchEngine.open(model, EngineOptions(device="cuda:99"))
    with pytest.raises(InputError, match="no engine 'abacus'"):
        open_engine(model, "abacus", EngineOptions(device="cpu", precision="fp32"))


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "CUDA", ""])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is no device; expected auto, cpu, cuda or cuda:N"):
        parse_device(name)
    assert parse_device("cuda:3") == DeviceName("cuda", 3)
