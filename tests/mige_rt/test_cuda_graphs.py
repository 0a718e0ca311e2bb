"""Captured steps, with CUDA's streams and graphs stubbed on the CPU: what is captured, when, and from which tensors."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cuda_stubs import CaptureError, Cuda
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from engines.interface import Array
from engines.pytorch import PyTorchEngine
from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE, open_model
from mige_rt.conditioning import LENGTH_MULTIPLE
from mige_rt.cuda_graphs import WARM_UP_STEPS
from mige_rt.denoise import LoopInputs, denoising_step
from mige_rt.graph_runner import PHASES
from mige_rt.graphs import GRAPHS, GraphName
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import Request, resolve
from mige_rt.sampling_params import SamplingParams
from mige_rt.serve.protocol import Finished, ImageTask
from mige_rt.serve.step_scheduler import StepScheduler
from mige_rt.tokenizer import load_tokenizer
from trainer.checkpoints.model_folder import SafetensorsCheckpoint

PROMPT, STEPS = "make the background blue", 6
CONFIG = open_model(DEFAULT_MODEL).config


class OnStubbedCuda(PyTorchEngine):
    """The PyTorch engine as it is on CUDA, but for the tensors, which are the CPU's."""

    def __init__(self, cuda: Cuda, *, compile: bool = False, attention: Sequence[Any] = ()) -> None:
        checkpoint = SafetensorsCheckpoint(open_model(DEFAULT_MODEL))
        super().__init__(
            checkpoint.load(dtype=torch.float32), "cpu", checkpoint=checkpoint, compile=compile, attention=attention
        )
        self.cuda, self.device, self.max_cuda_graphs = cuda, "cuda:0", 4
        self.released: list[Sequence[GraphName]] = []
        self.lengths: list[int] = []

    def array(self, values: NDArray[Any]) -> Array:
        return torch.from_numpy(np.array(values))  # type: ignore[return-value]

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if graph == "denoiser":
            self.lengths.append(inputs["text_mask"].shape[1])
        return super().run(graph, inputs)

    def release(self, graphs: Sequence[GraphName]) -> None:
        self.cuda.forbidden()
        self.released.append(graphs)
        self._checkpoint, checkpoint = None, self._checkpoint  # loads would go to a device that is not there
        super().release(graphs)
        self._checkpoint = checkpoint


def pipeline(engine: PyTorchEngine, **options: Any) -> MigePipeline:
    return MigePipeline(CONFIG, load_tokenizer(DEFAULT_MODEL / TOKENIZER_FILE), engine, **options)


@pytest.fixture
def engine(cuda: Cuda) -> OnStubbedCuda:
    return OnStubbedCuda(cuda)


@pytest.fixture
def captured(engine: OnStubbedCuda) -> MigePipeline:
    return pipeline(engine)


@pytest.fixture
def plain(engine: OnStubbedCuda) -> MigePipeline:
    """The same without CUDA graphs."""
    return pipeline(engine, cuda_graphs=False)


def image(pipe: MigePipeline, scene: Image.Image, **arguments: Any) -> bytes:
    return pipe(PROMPT, source=scene, **{"seed": 1, "num_inference_steps": STEPS, **arguments}).images[0].tobytes()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What captures had to say; torch's compiler logs, too."""
    return [record.getMessage() for record in caplog.records if record.name == "mige_rt.cuda_graphs"]


def test_a_shape_is_captured_once_after_its_warm_up(cuda: Cuda, captured: MigePipeline, scene: Image.Image) -> None:
    image(captured, scene)
    assert (cuda.captures, cuda.replays) == (1, STEPS - WARM_UP_STEPS)
    image(captured, scene, seed=2)
    assert (cuda.captures, cuda.replays) == (1, 2 * STEPS - WARM_UP_STEPS)
    image(captured, scene, image_guidance_scale=1.0)  # another number of branches
    assert (cuda.captures, cuda.replays) == (2, 3 * STEPS - 2 * WARM_UP_STEPS)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"guidance_scale": 4.0},
        {"image_guidance_scale": 1.0},
        {"scheduler": "ddim", "guidance_range": (0.2, 0.7), "num_inference_steps": 12},  # two graphs in turn
        {"reuse": 0.05, "num_inference_steps": 12},
    ],
)
def test_replayed_steps_give_the_steps_own_image(
    captured: MigePipeline, plain: MigePipeline, scene: Image.Image, arguments: dict[str, Any]
) -> None:
    for seed in (1, 2):  # the second is replayed from its first step
        assert image(captured, scene, seed=seed, **arguments) == image(plain, scene, seed=seed, **arguments)


def test_a_callback_may_make_an_image_of_the_same_shape(captured: MigePipeline, scene: Image.Image) -> None:
    alone = [image(captured, scene, seed=seed) for seed in (1, 2)]
    inner: list[bytes] = []

    def on_step_end(pipe: MigePipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        if step == STEPS // 2:
            inner.append(image(pipe, scene, seed=2))

    assert image(captured, scene, callback_on_step_end=on_step_end) == alone[0]
    assert inner == alone[1:]
    assert image(captured, scene) == alone[0]


def test_a_capture_reads_the_tensors_of_the_warm_up(cuda: Cuda, captured: MigePipeline, scene: Image.Image) -> None:
    """Compiled code depends on what its inputs are: those of a capture must be those that it was compiled for."""
    given: list[tuple[int, bool]] = []
    step = denoising_step(partial(captured.runner.run, "denoiser"))

    def watch(inputs: LoopInputs, *arrays: Array) -> Any:
        tensors: tuple[Any, ...] = (*inputs, *arrays)
        given.append((sum(tensor.data_ptr() for tensor in tensors), tensors[1].is_inference()))
        return step(inputs, *arrays)

    captured._step = captured.captured(watch)
    image(captured, scene)
    assert len(given) == WARM_UP_STEPS + 1 and len(set(given)) == 1 and not given[0][1]


@pytest.fixture
def compiled_eagerly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without the compiler behind it: what is traced, guarded and compiled again is the real thing's."""
    import torch._dynamo

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiled_eagerly")
def test_nothing_is_compiled_under_a_capture(cuda: Cuda, caplog: pytest.LogCaptureFixture, scene: Image.Image) -> None:
    cuda.records = False
    compiled = pipeline(OnStubbedCuda(cuda, compile=True))
    image(compiled, scene)
    image(compiled, scene, guidance_range=(0.2, 0.7), num_inference_steps=12)
    assert cuda.captures == 2 and not warnings(caplog)


@pytest.mark.usefixtures("compiled_eagerly")
def test_recompiling_under_a_capture_is_an_error(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, scene: Image.Image
) -> None:
    cuda.records = False
    engine = OnStubbedCuda(cuda, compile=True)
    compiled, forward = pipeline(engine), engine.model.denoiser.forward

    def other_strides(latents: Tensor, *inputs: Any) -> Tensor:
        source, timestep, cross_kv, mask = inputs
        return forward(latents, source, timestep, cross_kv.transpose(4, 5).contiguous().transpose(4, 5), mask)

    capture = cuda.graph

    def capture_others(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(engine.model.denoiser, "forward", other_strides)
        return capture(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "graph", capture_others)
    image(compiled, scene)
    (warning,) = warnings(caplog)
    assert "the capture failed" in warning and "recompile" in warning


def test_all_layers_are_compiled_once_a_kind(cuda: Cuda, compiled_eagerly: None, scene: Image.Image) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    cuda.records = False
    engine = OnStubbedCuda(cuda, compile=True)
    image(pipeline(engine), scene)
    # The denoiser's blocks; the ViT's; the Q-Former's with and without cross-attention; T5's with and without its bias.
    assert counters["stats"]["unique_graphs"] == 6
    assert not counters["graph_break"]


def test_a_failed_capture_costs_no_image(
    cuda: Cuda, captured: MigePipeline, plain: MigePipeline, scene: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [image(plain, scene, seed=seed) for seed in (1, 2)]
    cuda.fail_captures = True
    with caplog.at_level(logging.WARNING):
        assert [image(captured, scene, seed=seed) for seed in (1, 2)] == expected
    (warning,) = warnings(caplog)
    assert "without CUDA graphs, which is slower: the capture failed (operation failed" in warning
    assert cuda.replays == 0
    assert not cuda.generator.state.captured  # PyTorch would refuse every random number from now on


def test_a_runtime_that_cannot_be_captured_is_asked_first(
    cuda: Cuda,
    engine: OnStubbedCuda,
    captured: MigePipeline,
    scene: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = image(captured, scene)
    captured.clear_cache()
    monkeypatch.setattr(engine, "is_capturable", lambda graph: False)
    captures = cuda.captures
    assert image(captured, scene) == expected
    assert cuda.captures == captures and "cannot be captured" in caplog.text


@pytest.mark.parametrize("act", [lambda: torch.cuda.empty_cache(), lambda: bool(torch.ones(1)[0])])  # noqa: PLW0108
def test_the_stubs_forbid_what_a_capture_forbids(cuda: Cuda, act: Callable[[], object]) -> None:
    stream = torch.cuda.Stream("cuda:0")  # type: ignore[arg-type]
    act()
    with (
        pytest.raises(CaptureError),
        torch.cuda.stream(stream),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"),
    ):
        act()


def test_with_low_memory_graphs_are_released_where_the_phase_changes(
    cuda: Cuda, engine: OnStubbedCuda, plain: MigePipeline, scene: Image.Image
) -> None:
    expected = image(plain, scene)
    low = pipeline(engine, low_memory=True)
    assert image(low, scene) == expected
    assert engine.released == [[graph for graph in GRAPHS if graph not in phase] for phase in PHASES]
    assert cuda.captures == 1 and low._cuda_graphs is not None and len(low._cuda_graphs) == 0


def test_twenty_prompt_lengths_are_few_shapes(
    cuda: Cuda, engine: OnStubbedCuda, captured: MigePipeline, scene: Image.Image
) -> None:
    for number in range(20):
        prompt = " ".join(["make the background blue", *["very"] * number])
        captured(prompt, source=scene, seed=1, num_inference_steps=WARM_UP_STEPS + 2)
    lengths = sorted(set(engine.lengths))
    assert 2 <= len(lengths) <= 4 and all(length % LENGTH_MULTIPLE == 0 for length in lengths)
    assert cuda.captures == len(lengths)
    assert captured._cuda_graphs is not None and len(captured._cuda_graphs) <= engine.max_cuda_graphs
    captured.clear_cache()
    assert len(captured._cuda_graphs) == 0


def test_the_servers_steps_are_captured(
    cuda: Cuda, captured: MigePipeline, plain: MigePipeline, scene: Image.Image
) -> None:
    """While images come and go. A graph is used again when as many are running as before."""
    requests = [
        Request(PROMPT, source=scene, seed=1),
        Request("a red apple", seed=2),
        Request("let it snow " * 20, source=scene, seed=3),
        Request(PROMPT, source=scene, seed=4),
    ]

    def made(pipe: MigePipeline) -> dict[str, bytes]:
        scheduler, images = StepScheduler(pipe, 3), dict[str, bytes]()
        for number, request in enumerate(requests):
            params = SamplingParams(num_inference_steps=8 + number)
            scheduler.submit(ImageTask(str(number), resolve(request), params))
            for _ in range(100 if request is requests[-1] else 2):
                events = [] if scheduler.idle else scheduler.step()
                images |= {event.id: event.image.tobytes() for event in events if isinstance(event, Finished)}
        return images

    expected = made(plain)
    assert not cuda.captures
    assert made(captured) == expected and len(expected) == len(requests)
    assert cuda.captures >= 2 and cuda.replays > 2 * cuda.captures


def test_only_so_many_shapes_are_held(cuda: Cuda, captured: MigePipeline, scene: Image.Image) -> None:
    for number in range(1, 7):
        captured([PROMPT] * number, source=scene, seed=1, num_inference_steps=WARM_UP_STEPS + 2)
    assert captured._cuda_graphs is not None
    assert len(captured._cuda_graphs) == captured.engine.max_cuda_graphs
    captures = cuda.captures
    captured([PROMPT] * 6, source=scene, seed=1, num_inference_steps=2)
    assert cuda.captures == captures == 6


def test_prompts_that_are_padded_give_the_same_images(
    pipe: MigePipeline, scene: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On ONNX Runtime and on PyTorch, one prompt and several of different lengths."""
    prompts = [PROMPT, "remove the thing on the left of the picture"]
    for on in (pipe, MigePipeline.from_pretrained(engine="pytorch", device="cpu")):
        exact = [np.asarray(made, int) for made in on(prompts, source=scene, seed=[1, 2]).images]
        on.clear_cache()
        monkeypatch.setattr(on.condition_encoder, "length_multiple", LENGTH_MULTIPLE)
        padded = [np.asarray(made, int) for made in on(prompts, source=scene, seed=[1, 2]).images]
        for a, b in zip(exact, padded, strict=True):
            assert np.abs(a - b).max() <= 1
        on.clear_cache()
