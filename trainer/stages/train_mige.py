"""The last stage: MIGE itself, all but the two image encoders, jointly (paper, section 4.1), up the ladder of tasks."""

import json
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engines.pytorch import PyTorchEngine
from mige_rt.config import ModelConfig
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams
from mige_rt.scheduler import TRAIN_STEPS
from trainer.contact_sheet import grid
from trainer.loop import STATE_FILE, Task, check_one_process, train
from trainer.model.dit import Denoiser
from trainer.objective import NOISY_FROM, sample_losses
from trainer.preview import answer
from trainer.settings import LadderSettings, StageSettings
from trainer.stages.features import KIND_NAMES, Batch
from trainer.stages.ladder import LADDER, counts
from trainer.stages.looking import Watch, looking_loss
from trainer.stages.practice import HeldOutRungs, all_of, open_practice
from trainer.stages.start_reading import start_reading
from trainer.stages.state_plan import begin_state
from trainer.stages.trained_part import TrainedPart
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import make_sample

START_SAMPLES = 96  # that the cross-attention's start is found from
WATCH_EVERY = 100  # steps
PREVIEW_EVERY = 600.0  # seconds
SHOWN = 6  # samples of each rung in a preview


def _timesteps(number: int, noisy: float, device: torch.device) -> Tensor:
    """Timesteps, int64 [number]; a share `noisy` of them from NOISY_FROM on, the others anywhere."""
    anywhere = torch.randint(TRAIN_STEPS, (number,), device=device)
    late = torch.randint(NOISY_FROM, TRAIN_STEPS, (number,), device=device)
    return torch.where(torch.rand(number, device=device) < noisy, late, anywhere)


@dataclass(frozen=True)
class Loss:
    """The objective of a batch.

    Attributes:
        config: Of the model.
        ladder: How many draws, which timesteps, and what the pixels that are asked for count for.
    """

    config: ModelConfig
    ladder: LadderSettings

    def __call__(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The mean loss, and that of each kind of task, of samples whose conditions were not dropped."""
        draws = self.ladder.draws
        timestep = _timesteps(draws * len(batch.target), self.ladder.noisy, batch.target.device)
        config, denoiser = self.config, module.get_submodule("denoiser")
        assert isinstance(denoiser, Denoiser)
        with Watch().of(denoiser) as watch:
            drawn = sample_losses(config, module, batch, timestep, 1 + (self.ladder.asked - 1) * batch.asked)
        looking = looking_loss(watch.looks, batch, config, drawn.whole)
        each, whole = drawn.losses.detach().cpu().numpy(), drawn.whole.cpu().numpy()
        kinds = np.tile(batch.kinds, draws)
        metrics = {"looking": float(looking.detach())}
        for index, kind in enumerate(KIND_NAMES):
            of_kind = each[(kinds == index) & whole]
            if len(of_kind):
                metrics[kind] = float(of_kind.mean())
        return drawn.losses.mean() + self.ladder.looking * looking, metrics


def train_mige(
    config: ModelConfig,
    settings: StageSettings,
    ladder: LadderSettings,
    concepts: list[Concept],
    state: Path,
    start: Path | None = None,
) -> None:
    """Train up the ladder. The state, with the moving average of the weights, and previews are in state/mige.

    Args:
        config: The model's sizes.
        settings: How to optimise.
        ladder: What to learn from.
        concepts: All of them; those held out are measured on.
        state: The state folder.
        start: The model folder or bundle that the VAE, T5 and the DiT are taken from, if there is one.

    Raises:
        InputError: As `open_practice` and `begin_state`, or there is more than one process.
    """
    check_one_process("the stage mige")  # of several, only the first would know when a rung holds
    torch.manual_seed(settings.seed)
    folder = state / "mige"
    model, samples = open_practice(config, ladder, concepts, state, start)
    begin_state(folder, config, settings, start, ladder)
    maker, climb = samples.maker, samples.climb
    held_out, module = HeldOutRungs(maker, concepts), TrainedPart(model)
    if not (ladder.climbed or (folder / STATE_FILE).is_file()):
        known = [concept for concept in concepts if not concept.held_out]
        alone = [make_sample(settings.seed, i, known, config.size, {"again": 1}) for i in range(START_SAMPLES)]
        (folder / "start.json").write_text(json.dumps(start_reading(module, all_of(maker, alone))) + "\n")

    def watch(average: nn.Module, step: int) -> dict[str, float]:
        """Measure each rung, begin the next where the newest one holds, and paint a preview."""
        assert isinstance(average, TrainedPart)
        newest = climb.newest(step)
        names = counts(min(newest + 1, len(LADDER) - 1), settings.batch)
        measured = held_out.errors(average, names)
        errors = {name: one.share for name, one in measured.items()}
        if newest + 1 < len(LADDER) and errors[LADDER[newest].name] <= LADDER[newest].holds:
            climb.begin_next(step)
        nonlocal previewed
        if time.monotonic() - previewed > PREVIEW_EVERY or step > settings.steps - WATCH_EVERY:
            previewed = time.monotonic()
            pipe = MigePipeline(config, maker.tokenize, PyTorchEngine(deepcopy(average).cpu().with_vae(model)))
            shown = [sample for name in errors for sample in held_out.samples[name][:SHOWN]]
            grid(shown, answer(pipe, shown, SamplingParams()), folder / f"preview-{step:06d}.png")
        looked_right = {f"looked right {name}": one.looked_right for name, one in measured.items()}
        return {"rung": newest} | {f"one-shot {name}": error for name, error in errors.items()} | looked_right

    previewed = time.monotonic()
    task = Task("mige", Loss(config, ladder), partial(samples.batches, settings), watch, WATCH_EVERY)
    train(module, task, settings, folder)
