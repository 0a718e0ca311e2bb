"""The full-size denoiser with made-up weights, which needs PyTorch alone: what a step takes, and at least must take."""

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_stay.card import capture, memory, timing
from benchmarks.gpu_stay.record import Record, Stay
from export.made_up import made_up, make_block
from trainer.model.dit import Denoiser

BACKENDS: dict[str, list[SDPBackend] | None] = {
    "PyTorch's choice": None,
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}
MASKS = ("none", "all true", "ragged")
BATCHES = (2, 1, 3, 6)  # the published edit's first
LENGTH = 64  # tokens of the prompt
DTYPE = torch.bfloat16
MAX_ERROR = 4e-2  # relative RMS error of a bf16 prediction, as in `export.validate`


def make_denoiser(stay: Stay) -> Denoiser:
    """The denoiser on the device, its weights made there."""
    with torch.device("meta"):
        module = Denoiser(stay.config)
    block = make_block(stay.device)
    state = {name: made_up(name, tuple(tensor.shape), block) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    module = module.to(DTYPE).eval().requires_grad_(False)
    module.prepare()
    return module


def make_inputs(stay: Stay, module: Denoiser, batch: int, mask: str) -> list[Tensor | None]:
    """The denoiser's inputs on the device, in its order, with one timestep for all as the loop gives it."""
    generator = torch.Generator(stay.device).manual_seed(0)
    dit, channels = stay.config.dit, stay.config.vae.channels
    side, head_dim = dit.trained_grid * dit.patch, dit.width // dit.heads

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=stay.device)

    text_mask = torch.ones(batch, LENGTH, dtype=torch.bool, device=stay.device)
    if mask == "ragged":
        text_mask[::2, LENGTH // 2 :] = False
    return [
        noise(batch, channels, side, side),
        noise(batch, channels, side, side),
        module.embed_timesteps(torch.full((1,), 600.0, device=stay.device)).float(),
        noise(2, dit.depth, batch, dit.heads, LENGTH, head_dim).to(DTYPE),
        None if mask == "none" else text_mask,
    ]


@torch.inference_mode()
def measure_denoiser(stay: Stay, record: Record) -> None:
    """Eager and captured for all backends, masks and batches; then compiled with the fastest, as a whole and by block.

    The error is that beside eager attention written out (`math`), with the same mask.
    """
    module = make_denoiser(stay)
    fastest: dict[str, float] = {}
    for batch in BATCHES[:1] if stay.rehearsal else BATCHES:
        for mask in MASKS:
            expected: Any = None
            for backend in reversed(BACKENDS) if stay.cuda else ("math", "PyTorch's choice"):
                with record.entry(f"batch {batch}, mask {mask}, {backend}") as entry:
                    inputs = make_inputs(stay, module, batch, mask)
                    with _attention(backend, entry):
                        output: Tensor = module(*inputs)
                        expected = output if expected is None else expected
                        entry.update(_compared(output, expected))
                        with FlopCounterMode(display=False) as counter:
                            module(*inputs)
                        entry["tflop"] = counter.get_total_flops() / 1e12
                        memory(stay.device, reset=True)
                        entry["eager"] = timing(lambda inputs=inputs: module(*inputs), _seconds(stay))
                        entry["captured"] = _captured(stay, lambda inputs=inputs: module(*inputs))
                        entry.update(memory(stay.device))
                    if batch == BATCHES[0] and mask == "all true" and "captured" in entry:
                        fastest[backend] = entry["captured"]["ms"]
    for mask in ("all true",) if stay.rehearsal else ("none", "all true"):
        for backend in sorted(fastest, key=lambda name: fastest[name])[:1]:
            for mode, compiled in (("blocks", _compiled_blocks), ("whole", _compiled_whole)):
                with record.entry(f"batch {BATCHES[0]}, mask {mask}, {backend}, compiled {mode}") as entry:
                    inputs = make_inputs(stay, module, BATCHES[0], mask)
                    with _attention(backend, entry):
                        eager: Tensor = module(*inputs)
                        with compiled(module) as run:
                            entry.update(_compared(run(*inputs), eager))
                            entry["compiled"] = timing(lambda inputs=inputs, run=run: run(*inputs), _seconds(stay))
                            entry["captured"] = _captured(stay, lambda inputs=inputs, run=run: run(*inputs))


def _seconds(stay: Stay) -> float:
    return 0.01 if stay.rehearsal else 0.3


def _captured(stay: Stay, work: Callable[[], Any]) -> dict[str, float]:
    return timing(capture(work, stay.device), _seconds(stay))


def _compared(output: Tensor, expected: Tensor) -> dict[str, Any]:
    error = float((output.float() - expected.float()).norm() / expected.float().norm())
    return {"relative_error": error, "ok": error <= MAX_ERROR}


@contextmanager
def _attention(backend: str, entry: dict[str, Any]) -> Generator[None]:
    """Attention by one backend; one that does not take this device or mask is no error."""
    backends = BACKENDS[backend] or [each for alone in BACKENDS.values() for each in alone or ()]
    try:
        with sdpa_kernel(backends):
            yield
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        entry["skipped"] = str(error)


@contextmanager
def _compiled_whole(module: Denoiser) -> Generator[Callable[..., Tensor]]:
    torch._dynamo.reset()
    yield torch.compile(module, dynamic=False)


@contextmanager
def _compiled_blocks(module: Denoiser) -> Generator[Callable[..., Tensor]]:
    """Each block by itself, of which all have one code: compiled once."""
    torch._dynamo.reset()
    try:
        for block in module.blocks:
            block.compile(dynamic=False)
        yield module
    finally:
        for block in module.blocks:
            block._compiled_call_impl = None


@torch.inference_mode()
def measure_matrices(stay: Stay, record: Record) -> None:
    """The five shapes of matrix products that most of a step's work is in, and what they all take together."""
    batch = BATCHES[0]
    tokens = batch * stay.config.dit.trained_grid**2
    with torch.device("meta"):
        module = Denoiser(stay.config)
    counted: Counter[tuple[int, int, int]] = Counter()  # rows, inputs, outputs
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            counted[batch if name.startswith("t_") else tokens, layer.in_features, layer.out_features] += 1
    largest = sorted(counted, key=lambda shape: -counted[shape] * shape[0] * shape[1] * shape[2])[:5]
    floors: Counter[str] = Counter()
    for rows, inputs, outputs in largest:
        with record.entry(f"{rows} x {inputs} by {inputs} x {outputs}") as entry:
            entry.update({"times_a_step": counted[rows, inputs, outputs], "gflop": 2e-9 * rows * inputs * outputs})
            for kind, work in _products(stay, rows, inputs, outputs).items():
                # Ten in a graph, so that launching it does not count.
                took = timing(capture(lambda work=work: [work() for _ in range(10)], stay.device), _seconds(stay))
                entry[kind] = {name: value / 10 for name, value in took.items()}
                entry[kind]["tflops"] = entry["gflop"] / entry[kind]["ms"]
                floors[kind] += entry["times_a_step"] * entry[kind]["ms"]
    with record.entry("all of a step") as entry:
        entry.update({f"{kind}_ms": value for kind, value in floors.items()})


def _products(stay: Stay, rows: int, inputs: int, outputs: int) -> dict[str, Callable[[], Tensor]]:
    """The product in each type that this device has."""
    x, weight = (torch.randn(n, inputs, device=stay.device).to(DTYPE) for n in (rows, outputs))
    products: dict[str, Callable[[], Tensor]] = {"bf16": lambda: x @ weight.T}
    # Rows in multiples of 16 are what fp8 takes.
    if stay.cuda and torch.cuda.get_device_capability(stay.device) >= (8, 9) and rows % 16 == 0:
        x8, weight8 = (tensor.to(torch.float8_e4m3fn) for tensor in (x, weight))
        one, per_row, per_column = (torch.ones(s, device=stay.device) for s in ((), (rows, 1), (1, outputs)))
        for kind, scales in (("fp8", (one, one)), ("fp8_rowwise", (per_row, per_column))):
            products[kind] = lambda scales=scales: torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
                x8, weight8.T, scales[0], scales[1], out_dtype=DTYPE, use_fast_accum=True
            )
    return products
