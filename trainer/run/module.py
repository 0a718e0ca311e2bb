"""The module that a run trains: which parameters, in which layers it is split, and how processes share it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    _CHECKPOINT_PREFIX,
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerLayer
from transformers.models.t5.modeling_t5 import T5Block

from mige_rt.errors import InputError
from trainer.checkpoints.model_folder import COMPONENTS
from trainer.model.dit import Block
from trainer.model.mige import Mige
from trainer.run.config import RunConfig
from trainer.stages.trained_part import TrainedPart

# What is sharded, checkpointed and compiled one by one.
LAYERS: tuple[type[nn.Module], ...] = (Block, T5Block, Blip2QFormerLayer)

T = TypeVar("T")


def make_trained_module(model: Mige, config: RunConfig) -> TrainedPart:
    """What the run trains, out of a whole model: all but the VAE and the ViT, whose outputs were prepared.

    Parameters that are not trained do not require gradients.
    """
    module = TrainedPart(model)
    # Neither computed nor trained: they would only take memory.
    del module.image_encoder.vision.embeddings, module.image_encoder.vision.encoder
    module.requires_grad_(False)
    for name in COMPONENTS:
        if name in config.trained:
            module.get_submodule(name).requires_grad_(True)
    return module.train()


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those that the optimiser changes, by name; every name of a checkpoint's weights is one of these.

    The names are the same whether layers are checkpointed or not, for which PyTorch wraps them.
    """
    return {unwrapped_name(name): parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def unwrapped_name(name: str) -> str:
    """A tensor's name as it is where no layer is wrapped."""
    return name.replace(_CHECKPOINT_PREFIX, "")


def make_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate's, for the processes that were launched.

    Raises:
        InputError: They were launched for DeepSpeed, or for FSDP by Accelerate itself.
    """
    # Buffers are the same everywhere and do not change.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no", kwargs_handlers=[ddp])
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise InputError(
            f"the processes were launched for {accelerator.distributed_type.value}; launch them without, and let the "
            "config say how they share the work: distributed: fsdp2, with reshard: false for what ZeRO-2 shards"
        )
    return accelerator


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something on the main process alone; all processes get its result, or raise its InputError."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except InputError as error:
            outcome[1] = str(error)
    result, message = broadcast_object_list(outcome)
    if message is not None:
        raise InputError(message)
    return result


def share(module: TrainedPart, accelerator: Accelerator, config: RunConfig) -> nn.Module:
    """Make each process's part of the module, on its device, with the layers checkpointed and compiled as configured.

    Where it is sharded, all processes must have the same weights before. Accelerate shards on GPUs alone, so that
    PyTorch is asked directly: tests on the CPU run what runs on GPUs.
    """
    if config.activation_checkpointing:
        apply_activation_checkpointing(module, check_fn=lambda layer: isinstance(layer, LAYERS))
    layers = [layer for layer in module.modules() if isinstance(layer, LAYERS)]
    if config.compile is not None:
        for layer in layers:
            layer.compile(backend=config.compile)
    if config.distributed != "fsdp2" or accelerator.num_processes == 1:
        return accelerator.prepare_model(module)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    bf16 = torch.bfloat16 if config.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=None if bf16 is None else torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=config.reshard, mp_policy=policy)
    # The rest, which the whole forward pass uses.
    fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    return module.to(accelerator.device)
