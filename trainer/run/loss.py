"""What a run minimises, and how its loss is measured by task and by timestep."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from mige_rt.config import ModelConfig
from mige_rt.instruction import Task as TaskName
from mige_rt.scheduler import TRAIN_STEPS
from trainer.data.batches import TrainingBatch
from trainer.objective import sample_losses

RANGES = 4  # of timesteps, of equal length


def means_of_processes(values: Mapping[str, list[float]]) -> dict[str, float]:
    """The mean of each metric over all values of all processes, in the order of their names; each makes the call."""
    of_processes: list[dict[str, list[float]]] = gather_object([dict(values)])
    names = sorted({name for metrics in of_processes for name in metrics})
    gathered = {name: [value for metrics in of_processes for value in metrics.get(name, ())] for name in names}
    return {name: sum(of_name) / len(of_name) for name, of_name in gathered.items()}


@dataclass(frozen=True)
class RunLoss:
    """The objective of a batch at timesteps drawn evenly.

    Attributes:
        config: The model's sizes.
    """

    config: ModelConfig

    def __call__(self, module: nn.Module, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        """The mean loss, and the means by task and by range of timesteps, where the batch has such samples."""
        timestep = torch.randint(TRAIN_STEPS, (len(batch.ids),), device=batch.target.device)
        drawn = sample_losses(self.config, module, batch, timestep)
        losses = drawn.losses.detach().cpu()
        metrics: dict[str, float] = {}
        for task in get_args(TaskName):
            of_task = losses[[name == task for name in batch.tasks]]
            if len(of_task):
                metrics[f"loss/{task}"] = float(of_task.mean())
        width = TRAIN_STEPS // RANGES
        for index in range(RANGES):
            of_range = losses[timestep.cpu() // width == index]
            if len(of_range):
                metrics[f"loss/t{index * width}-{(index + 1) * width - 1}"] = float(of_range.mean())
        return drawn.losses.mean(), metrics
