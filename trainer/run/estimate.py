"""What a run needs, before it is begun: memory on each GPU, and days.

One step of the full-size model is taken with tensors that have shapes and no memory; what is saved for the backward
pass, and how many operations there are, is counted on the way.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from trainer.checkpoints.weights import empty_model
from trainer.data.batches import TrainingBatch
from trainer.run.config import RunConfig
from trainer.run.module import LAYERS, make_trained_module, trained_parameters
from trainer.stages.trained_part import TrainedPart

IMAGES = 2  # that each prompt refers to
GIB = 2**30
FLOAT, HALF = 4, 2  # bytes
OVERHEAD = 1.1  # of the allocator, by fragments
CONTEXT = 1.5 * GIB  # of CUDA, NCCL and the kernels' workspaces


@dataclass(frozen=True)
class StepCosts:
    """What one forward and backward pass of a micro-batch costs.

    Attributes:
        saved: Bytes that are saved for the backward pass outside of the layers, and in each of them.
        inputs: Bytes of what goes into each layer.
        forward: Floating-point operations of the forward pass.
        backward: Those of the backward pass, nothing computed again.
    """

    saved: tuple[int, Sequence[int]]
    inputs: Sequence[int]
    forward: int
    backward: int

    def activations(self, checkpointing: bool) -> int:
        """The most bytes of activations that are held at once."""
        outside, layers = self.saved
        return outside + (sum(self.inputs) + max(layers) if checkpointing else sum(layers))

    def operations(self, checkpointing: bool) -> int:
        """Of one pass; layers that are checkpointed are computed twice."""
        return self.forward * (2 if checkpointing else 1) + self.backward


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Attributes:
        config: The run's.
        gpus: How many.
        flops: That each reaches.
        weights: Number of parameters that are in memory, and of those that are trained.
        bytes_by_part: Of each GPU's memory.
        operations: Floating-point operations of a step, on all GPUs.
    """

    config: RunConfig
    gpus: int
    flops: float
    weights: tuple[int, int]
    bytes_by_part: dict[str, float]
    operations: float

    @property
    def memory(self) -> float:
        """Bytes on each GPU, at most."""
        return sum(self.bytes_by_part.values()) * OVERHEAD + CONTEXT

    @property
    def step_seconds(self) -> float:
        """Seconds that a step takes."""
        return self.operations / (self.gpus * self.flops)

    def __str__(self) -> str:
        config, (total, trained) = self.config, self.weights
        days = self.step_seconds * config.steps / 86400
        parts = "\n".join(f"  {name}: {size / GIB:.1f} GiB" for name, size in self.bytes_by_part.items())
        return (
            f"{config.model}: {total / 1e9:.2f} B parameters in training, {trained / 1e9:.2f} B of them trained\n"
            f"memory of each of {self.gpus} GPUs, at most {self.memory / GIB:.1f} GiB:\n{parts}\n"
            f"  fragments and CUDA: {(self.memory - sum(self.bytes_by_part.values())) / GIB:.1f} GiB\n"
            f"time: {self.operations / 1e15:.1f} PFLOP and {self.step_seconds:.2f} s a step of {config.batch} samples, "
            f"{config.batch / self.step_seconds:.0f} samples/s, {days:.1f} days for {config.steps} steps\n"
            f"assumed: each GPU reaches {self.flops / 1e12:.0f} TFLOP/s, and waits neither for data nor for others; "
            f"each prompt has {config.sizes.max_tokens} tokens and {IMAGES} images; gradients and activations are "
            "all there at once; data are prepared; float32 weights, gradients, and optimiser"
        )


def estimate(config: RunConfig, gpus: int, flops: float) -> Estimate:
    """Estimate a run.

    Args:
        config: The run's.
        gpus: How many, one process each.
        flops: Floating-point operations a second that each reaches.

    Raises:
        InputError: The batch does not divide.
    """
    accumulation = config.accumulation(gpus)
    part = make_trained_module(empty_model(config.sizes), config)
    with FakeTensorMode():
        _without_memory(part)
        costs = step_costs(part, config)
    sizes = {name: parameter.numel() for name, parameter in part.named_parameters()}
    total, trained = sum(sizes.values()), sum(p.numel() for p in trained_parameters(part).values())
    shards = gpus if config.distributed == "fsdp2" else 1
    parts: dict[str, float] = {
        "weights": FLOAT * total / shards,
        "gradients": FLOAT * trained / shards,
        "optimiser": 2 * FLOAT * trained / shards,
        "moving average": 0.0 if config.ema is None else FLOAT * trained / shards,
        "activations": costs.activations(config.activation_checkpointing),
    }
    if shards > 1:
        layers = [sum(p.numel() for p in layer.parameters()) for layer in part.modules() if isinstance(layer, LAYERS)]
        at_once = 2 * max(layers) if config.reshard else sum(layers)  # the next one is gathered meanwhile
        size = HALF if config.precision == "bf16" else FLOAT
        parts["gathered weights"] = size * (total - sum(layers) + at_once) + FLOAT * max(layers)
    operations = costs.operations(config.activation_checkpointing) * accumulation * gpus
    return Estimate(config, gpus, flops, (total, trained), parts, operations)


def _without_memory(part: TrainedPart) -> None:
    """Put parameters that only have shapes, and count as the CPU's, in the place of the module's; in the fake mode."""
    replaced: dict[Tensor, Tensor] = {}
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in replaced:  # shared ones stay shared
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                replaced[parameter] = nn.Parameter(empty, parameter.requires_grad)
            setattr(module, name, replaced[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def step_costs(part: TrainedPart, config: RunConfig) -> StepCosts:
    """Count what one micro-batch costs; the weights may have no memory."""
    counted = _Saved(part)
    batch = longest_batch(config)
    number = len(batch.target)
    noisy, timestep = torch.randn_like(batch.target), torch.zeros(number, dtype=torch.int64)
    has_text = torch.ones(number, dtype=torch.bool)
    with (
        FlopCounterMode(display=False) as forward,
        torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda tensor: tensor),
    ):
        output = part(batch, noisy, batch.source, timestep, has_text)
        loss = output.float().square().mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    layers = [counted.saved[index] for index in range(len(counted.inputs))]
    return StepCosts(
        (counted.saved[None], layers), counted.inputs, forward.get_total_flops(), backward.get_total_flops()
    )


def longest_batch(config: RunConfig) -> TrainingBatch:
    """A micro-batch of the longest prompts, each with IMAGES images."""
    sizes, number = config.sizes, config.micro_batch
    side, images = sizes.dit.trained_grid * sizes.dit.patch, number * IMAGES
    latents = torch.randn(number, sizes.vae.channels, side, side)
    patches = 1 + (sizes.vision.side // sizes.vision.patch) ** 2
    return TrainingBatch(
        ids=("",) * number,
        tasks=("compose",) * number,
        target=latents,
        source=torch.randn_like(latents),
        vit=torch.randn(images, patches, sizes.vision.width),
        ref_latents=torch.randn(images, sizes.vae.channels, side, side),
        token_ids=torch.zeros(number, sizes.max_tokens, dtype=torch.int64),
        slot_index=torch.zeros(number, sizes.max_tokens, dtype=torch.int64),
        text_mask=torch.ones(number, sizes.max_tokens, dtype=torch.bool),
    )


class _Saved:
    """The bytes that autograd saves, each storage once, by the layer in which it does (by its turn; None: outside)."""

    def __init__(self, part: TrainedPart) -> None:
        self.saved: dict[int | None, int] = defaultdict(int)
        self.inputs: list[int] = []
        self._layer: int | None = None
        # All stay alive, so that no number comes twice.
        self._known: dict[int, Tensor] = {_storage(parameter): parameter for parameter in part.parameters()}
        for layer in part.modules():
            if isinstance(layer, LAYERS):
                layer.register_forward_pre_hook(self._enter, with_kwargs=True)
                layer.register_forward_hook(self._leave)

    def pack(self, tensor: Tensor) -> Tensor:
        self.saved[self._layer] += self._new_bytes(tensor)
        return tensor

    def _new_bytes(self, tensor: Tensor) -> int:
        storage = _storage(tensor)
        if storage in self._known:
            return 0
        self._known[storage] = tensor
        return tensor.untyped_storage().nbytes()

    def _enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self._layer = len(self.inputs)
        self.inputs.append(hidden.nbytes)

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._layer = None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
