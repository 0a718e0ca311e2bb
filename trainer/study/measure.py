"""What is measured of each run of a study: losses on held-out concepts, and the evaluation of its images."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines.pytorch import PyTorchEngine
from mige_rt.atomic import atomic_file
from mige_rt.pipeline import MigePipeline
from mige_rt.scheduler import TRAIN_STEPS
from trainer.evaluate.measure import EVALUATED_KINDS
from trainer.evaluate.options import EVALUATION_SEED
from trainer.evaluate.run import Series, evaluate
from trainer.objective import add_noise, prediction_error
from trainer.stages.features import Batch
from trainer.stages.practice import all_of
from trainer.stages.trained_part import TrainedPart
from trainer.study.config import Arm
from trainer.study.training import Workshop, as_text_only
from trainer.synthetic.tasks import make_sample

LOSS_SEED, LOSS_SAMPLES = 10**6 + 5, 48  # of each kind
LOSS_TIMESTEPS = [int((k + 0.5) * TRAIN_STEPS / 8) for k in range(8)]
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class HeldOut:
    """Samples of held-out concepts, of each kind that is evaluated, with multimodal instructions or without."""

    batches: Mapping[str, Batch]

    @staticmethod
    def make(workshop: Workshop, multimodal: bool) -> "HeldOut":
        """The same ones for every arm, but for their instructions."""
        held_out = [concept for concept in workshop.concepts if concept.held_out]
        side = workshop.study.model.size
        samples = {
            kind: [make_sample(LOSS_SEED, i, held_out, side, {kind: 1}) for i in range(LOSS_SAMPLES)]
            for kind in EVALUATED_KINDS
        }
        return HeldOut(
            {
                kind: all_of(workshop.maker, of_kind if multimodal else [as_text_only(sample) for sample in of_kind])
                for kind, of_kind in samples.items()
            }
        )

    @torch.no_grad()
    def losses(self, module: TrainedPart) -> dict[str, float]:
        """The mean error of the prediction by kind, over LOSS_TIMESTEPS, at the same noise for every run."""
        return {kind: self._loss(module, batch) for kind, batch in self.batches.items()}

    @staticmethod
    def _loss(module: TrainedPart, batch: Batch) -> float:
        total = 0.0
        with_text = torch.ones(len(batch.target), dtype=torch.bool)
        for number, at in enumerate(LOSS_TIMESTEPS):
            noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(number))
            timestep = torch.full((len(noise),), at)
            output = module(batch, add_noise(batch.target, noise, timestep), batch.source, timestep, with_text)
            total += float(prediction_error(module.config, output, batch.target, noise, timestep).mean())
        return total / len(LOSS_TIMESTEPS)


def measure_run(workshop: Workshop, arm: Arm, module: TrainedPart, held_out: HeldOut, folder: Path) -> dict[str, Any]:
    """Measure a trained arm, and write result.json and the evaluation's files into its folder.

    Returns:
        losses: of each kind. metrics: of each kind, as in evaluation.json.
    """
    model = module.with_vae(workshop.model).eval()
    pipe = MigePipeline(workshop.study.model, workshop.tokenize, PyTorchEngine(model))
    concepts = [concept for concept in workshop.concepts if concept.held_out]
    change = None if arm.multimodal else as_text_only
    evaluate(pipe, Series(concepts, EVALUATION_SEED, workshop.study.evaluated, change), folder, lambda *_: None)
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    result = {"losses": held_out.losses(module), "metrics": evaluation["kinds"]}
    with atomic_file(folder / RESULT_FILE) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result
