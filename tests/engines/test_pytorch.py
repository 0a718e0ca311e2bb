from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from PIL import Image
from torch.nn.attention import SDPBackend

import mige_rt.bundle
from engines.attention import attention_order
from engines.device import DeviceName, parse_device
from engines.factory import open_engine
from engines.interface import EngineOptions
from engines.pytorch import PyTorchEngine
from export.inputs import random_feed
from export.validate import TOLERANCES, measure
from mige_rt.bundle import DEFAULT_MODEL, open_model
from mige_rt.config import PRESETS
from mige_rt.errors import InputError, NotAvailableError
from mige_rt.graphs import GRAPHS
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import Request, resolve
from mige_rt.sampling_params import SamplingParams
from mige_rt.serve.protocol import ImageTask
from mige_rt.serve.step_scheduler import StepScheduler
from trainer.checkpoints import weights
from trainer.evaluate.metrics import psnr
from trainer.model import vae
from trainer.model.mige import Mige


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
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


def on_the_cpu(**options: Any) -> PyTorchEngine:
    return PyTorchEngine.open(open_model(DEFAULT_MODEL), EngineOptions(device="cpu", **options))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(
    ("precision", "of_t5", "of_others"),
    [
        ("fp32", torch.float32, torch.float32),
        ("fp16", torch.bfloat16, torch.float16),  # whose sums pass what float16 holds
        ("bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_every_weight_is_of_its_precision(
    precision: Any, of_t5: torch.dtype, of_others: torch.dtype, low_memory: bool
) -> None:
    engine = on_the_cpu(precision=precision, low_memory=low_memory)
    for graph in GRAPHS:
        engine._load(graph)
        types = {tensor.dtype for tensor in engine.model.graph(graph).state_dict().values()}
        assert types == {of_t5 if graph == "text_encoder" else of_others}, graph


def test_fp8_is_close_and_can_be_released() -> None:
    """The products in the denoiser's blocks alone are of float8."""
    feed = random_feed("denoiser", PRESETS["tiny"], {"R": 2, "L": 40, "h": 16, "w": 16})
    engine = on_the_cpu(precision="fp8", low_memory=True)
    expected, ours = (e.run("denoiser", feed)["prediction"] for e in (on_the_cpu(), engine))  # type: ignore[arg-type]
    error, _, _ = measure(ours, expected)  # type: ignore[arg-type]
    assert 1e-3 < error < 2 * TOLERANCES["fp8"]  # a trained denoiser has outliers on random inputs
    types = Counter(tensor.dtype for tensor in engine.model.denoiser.state_dict().values())
    assert types[torch.float8_e4m3fn] == 6 * PRESETS["tiny"].dit.depth and types[torch.bfloat16] > 0
    engine.release(["denoiser"])
    assert all(tensor.is_meta for tensor in engine.model.denoiser.blocks.state_dict().values())
    again = engine.run("denoiser", feed)["prediction"]  # type: ignore[arg-type]
    assert np.array_equal(again, ours)  # type: ignore[arg-type]


def test_t5_does_not_overflow_in_fp16() -> None:
    """Its sums pass 65,504 on some prompts; weights that are larger make them pass it on every one."""
    feed = random_feed("text_encoder", PRESETS["tiny"], {"B": 1, "N": 1, "L": 5})
    engines = [on_the_cpu(precision=precision) for precision in ("fp32", "fp16")]
    for engine in engines:
        t5: Any = engine.model.text_encoder.t5
        t5.encoder.block[0].layer[1].DenseReluDense.wo.weight.data *= 1e6
    expected, states = (engine.run("text_encoder", feed)["text_states"] for engine in engines)  # type: ignore[arg-type]
    assert np.isfinite(states).all()  # type: ignore[call-overload]
    assert np.linalg.norm(states - expected) < 0.03 * np.linalg.norm(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["onnxruntime", "pytorch"])
def test_a_bundles_manifest_is_read_once(name: str, scene: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    read_json = mige_rt.bundle._read_json

    def note(path: Path, *words: str) -> Any:
        read.append(path)
        return read_json(path, *words)

    monkeypatch.setattr(mige_rt.bundle, "_read_json", note)
    pipe = MigePipeline.from_pretrained(engine=name, device="cpu", low_memory=True)
    pipe("make it blue", source=scene, seed=1, num_inference_steps=2)
    assert read == [DEFAULT_MODEL / "manifest.json"]


def test_a_graph_that_is_loaded_again_builds_no_model(scene: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    empty = weights.empty_model

    def note(config: Any) -> Mige:
        built.append(config)
        return empty(config)

    monkeypatch.setattr(weights, "empty_model", note)
    pipe = MigePipeline.from_pretrained(engine="pytorch", device="cpu", low_memory=True)
    images: list[Image.Image] = []
    for _ in range(2):
        images += pipe("make it blue", source=scene, seed=1, num_inference_steps=2).images
        pipe.clear_cache()  # or T5, whose embedding has two names, would not be loaded again
    assert len(built) == 1 and images[0].tobytes() == images[1].tobytes()


def test_a_graph_that_is_released_leaves_what_it_shares() -> None:
    engine = on_the_cpu()
    engine.release(["denoiser"])
    assert engine.model.denoiser.blocks[0].mlp.fc1.weight.is_meta  # type: ignore[union-attr]
    assert not engine.model.image_encoder.patch_embedder.proj.weight.is_meta
    engine.release(["image_encoder"])
    assert engine.model.image_encoder.patch_embedder.proj.weight.is_meta


def test_gpu_memory_that_runs_out_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = on_the_cpu()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 80 << 30))

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    monkeypatch.setattr(engine.model.vae_decoder, "forward", run_out)
    with pytest.raises(
        InputError, match=r"ran out of memory in vae_decoder; 3\.0 of 80\.0 GiB are free: use --low-vram"
    ):
        engine.run("vae_decoder", random_feed("vae_decoder", PRESETS["tiny"], {"B": 1, "h": 8, "w": 8}))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("tokens", [40, 30])
def test_one_timestep_and_no_mask_are_as_many_and_a_full_one(device: str, tokens: int) -> None:
    """Of one timestep for all entries, each norm is modulated in one kernel."""
    feed = random_feed("denoiser", PRESETS["tiny"], {"R": 3, "L": 40, "h": 8, "w": 12})
    inputs = {name: torch.as_tensor(values) for name, values in feed.items()}
    inputs["timestep"] = torch.tensor(420.5).expand(3)
    inputs["text_mask"] = torch.arange(40).expand(3, -1) < tokens
    engine = on_the_cpu()
    denoiser = engine.model.denoiser
    with torch.inference_mode():
        exact = denoiser(*(inputs[spec.name].contiguous() for spec in GRAPHS["denoiser"].inputs)).clone()
    calls: list[tuple[int, bool]] = []
    denoiser.register_forward_pre_hook(lambda _, inputs: calls.append((len(inputs[2]), inputs[4] is None)))
    engine.device = device
    fast: Any = engine.run("denoiser", inputs)["prediction"]  # type: ignore[arg-type]
    assert calls == [(1, False) if device == "cuda:0" else (3, tokens == 40)]
    torch.testing.assert_close(torch.as_tensor(fast), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("timesteps", [[420.5] * 3, [999.0, 420.5, 0.0]])
def test_timesteps_that_were_embedded_ahead_give_the_same_prediction(device: str, timesteps: list[float]) -> None:
    feed = random_feed("denoiser", PRESETS["tiny"], {"R": 3, "L": 40, "h": 8, "w": 12})
    inputs: dict[str, Any] = {name: torch.as_tensor(values) for name, values in feed.items()}
    one_for_all = len(set(timesteps)) == 1
    inputs["timestep"] = torch.tensor(timesteps[0]).expand(3) if one_for_all else torch.tensor(timesteps)
    engine = on_the_cpu()
    engine.device = device
    exact: Any = engine.run("denoiser", inputs)["prediction"]
    embedded: Any = torch.as_tensor(engine.embed_timesteps(torch.tensor([timesteps[0]] if one_for_all else timesteps)))  # type: ignore[arg-type]
    assert embedded.shape == (len(set(timesteps)), 7 * PRESETS["tiny"].dit.width)
    ahead: Any = engine.run("denoiser", inputs | {"timestep": embedded.expand(3, -1)})["prediction"]
    torch.testing.assert_close(torch.as_tensor(ahead), torch.as_tensor(exact), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_memory", [False, True])
def test_no_step_of_the_loop_embeds_its_timestep(low_memory: bool, scene: Image.Image) -> None:
    pipe = MigePipeline.from_pretrained(engine="pytorch", device="cpu", low_memory=low_memory)
    embedded: list[int] = []
    embedder = pipe.engine.model.denoiser.t_embedder  # type: ignore[attr-defined]
    embedder.register_forward_pre_hook(lambda _, inputs: embedded.append(len(inputs[0])))
    pipe("make the background blue", source=scene, num_inference_steps=5, seed=0)
    assert embedded == [5]
    scheduler = StepScheduler(pipe, max_batch=2)
    for steps in (3, 4):
        request = resolve(Request("make the background blue", source=scene, seed=steps))
        scheduler.submit(ImageTask(f"{steps} steps", request, SamplingParams(num_inference_steps=steps)))
    while not scheduler.idle:
        list(scheduler.step())
    assert embedded == [5, 3, 4]


def test_the_vae_in_channels_last_gives_the_same_image() -> None:
    feed: dict[str, Any] = dict(random_feed("vae_decoder", PRESETS["tiny"], {"B": 1, "h": 8, "w": 8}))
    engine = on_the_cpu()
    expected = engine.run("vae_decoder", feed)["pixels"]
    engine.device = "cuda:0"
    engine._prepare("vae_decoder")
    engine.device = "cpu"
    kernels = [part.weight for part in engine.model.vae_decoder.modules() if isinstance(part, torch.nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    np.testing.assert_allclose(engine.run("vae_decoder", feed)["pixels"], expected, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("slices", [1, 3, 64])
def test_sliced_attention_of_the_vae_is_the_librarys(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attention = Attention(32, heads=1, dim_head=32, norm_num_groups=8, bias=True, residual_connection=True)
    x, tokens = torch.randn(2, 32, 8, 8), 64
    scores: list[int] = []
    attend = F.scaled_dot_product_attention

    def note(q: Any, k: Any, v: Any, **options: Any) -> Any:
        scores.append(q.shape[0] * q.shape[2] * k.shape[2] * q.element_size())
        return attend(q, k, v, **options)

    with torch.no_grad():
        expected = AttnProcessor2_0()(attention, x)
        monkeypatch.setattr(F, "scaled_dot_product_attention", note)
        monkeypatch.setattr(vae, "SCORES_BYTES", 2 * tokens * tokens * 4 // slices)
        sliced = vae.QuerySlicedAttention()(attention, x)
    torch.testing.assert_close(sliced, expected, rtol=1e-5, atol=1e-5)
    assert len(scores) >= slices and max(scores) <= vae.SCORES_BYTES


def test_the_published_vae_attends_in_slices_beyond_a_size() -> None:
    with torch.device("meta"):
        model = Mige(PRESETS["xl"])
    processors = Counter(type(part.processor) for part in model.modules() if isinstance(part, Attention))
    assert processors == {vae.QuerySlicedAttention: 2}


def test_the_fastest_attention_is_preferred() -> None:
    seconds = {SDPBackend.CUDNN_ATTENTION: 2.0, SDPBackend.FLASH_ATTENTION: 1.0, SDPBackend.MATH: 9.0}

    def measure(backend: SDPBackend, *_: Any) -> float:
        if backend not in seconds:
            raise RuntimeError("no available kernel")
        return seconds[backend]

    shape = (2, 16, 1024, 72)
    order = attention_order("auto", "cuda", torch.float16, shape, measure)
    assert [backend.name for backend in order] == [
        "FLASH_ATTENTION",
        "CUDNN_ATTENTION",
        "MATH",
        "EFFICIENT_ATTENTION",
    ]
    assert attention_order("cudnn", "cuda", torch.float16, shape, measure)[0] == SDPBackend.CUDNN_ATTENTION
    with pytest.raises(NotAvailableError, match="attention by efficient is not to be had here"):
        attention_order("efficient", "cuda", torch.float16, shape, measure)
    assert attention_order("auto", "cpu", torch.float32, shape) == []
    with pytest.raises(NotAvailableError, match="is for CUDA"):
        attention_order("flash", "cpu", torch.float32, shape)


def test_attention_can_be_chosen_and_the_denoiser_uses_it() -> None:
    feed: dict[str, Any] = dict(random_feed("denoiser", PRESETS["tiny"], {"R": 2, "L": 8, "h": 8, "w": 8}))
    engine = on_the_cpu()
    expected = engine.run("denoiser", feed)["prediction"]
    engine._attention = [SDPBackend.MATH]
    with torch.profiler.profile() as profile:
        by_math = engine.run("denoiser", feed)["prediction"]
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_attention_math" in names
    assert not any("flash" in name for name in names)
    np.testing.assert_allclose(by_math, expected, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
