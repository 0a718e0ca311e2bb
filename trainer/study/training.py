"""The common start of a study's arms, and the training of each from there."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from mige_rt.instruction import PLACEHOLDER
from mige_rt.tokenizer import Tokenize, load_tokenizer
from trainer.data.encode import fingerprint
from trainer.data.plan import write_plan
from trainer.loop import Task, save_trained, train
from trainer.model.encoders import FeatureFusion
from trainer.model.mige import Mige
from trainer.settings import LadderSettings, StageSettings
from trainer.stages.features import Batch, FeatureMaker, RollingShards, collate
from trainer.stages.ladder import apportion
from trainer.stages.practice import all_of
from trainer.stages.start_reading import start_reading
from trainer.stages.starting_model import initialise, with_trained_encoder
from trainer.stages.state_tokenizer import state_tokenizer
from trainer.stages.train_mige import START_SAMPLES, Loss
from trainer.stages.trained_part import TrainedPart
from trainer.study.config import Arm, Study
from trainer.synthetic.concepts import Concept
from trainer.synthetic.sample import Sample
from trainer.synthetic.tasks import make_sample

COMMON = "common"  # the folder of the common start
TRAINED_FILE = "trained.safetensors"


class SemanticFeatures(nn.Module):
    """Stands for the feature fusion where it is left out: the Q-Former's features alone, normalised as after it."""

    def __init__(self, fusion: FeatureFusion) -> None:
        """Take over the last norm."""
        super().__init__()
        self.ln_out = fusion.ln_out

    def forward(self, semantic: Tensor, visual: Tensor) -> Tensor:
        """The semantic features [N,Q,width], normalised."""
        return self.ln_out(semantic)


def as_text_only(sample: Sample) -> Sample:
    """The same sample, whose instruction refers to the source by the words "the image"."""
    first, *others = sample.prompt.split(PLACEHOLDER)
    text, images = first, []
    places: dict[int, int] = {}  # of the images that stay, among those before
    for place, (image, words) in enumerate(zip(sample.images, others, strict=True)):
        if image is sample.source:
            text += ("the image" if not text or text.endswith(" ") else " the image") + words
        else:
            places[place] = len(images)
            images.append(image)
            text += PLACEHOLDER + words
    marks = []
    for mark in sample.after:
        reference = None if mark.reference is None else places[mark.reference]
        origin = None  # what only the source shows cannot be read from an image of the instruction
        if mark.origin is not None and mark.origin.image in places:
            origin = replace(mark.origin, image=places[mark.origin.image])
        marks.append(replace(mark, reference=reference, origin=origin))
    return replace(sample, prompt=text, images=images, after=tuple(marks))


@dataclass(frozen=True)
class Workshop:
    """What all runs of a study share.

    Attributes:
        study: The study.
        model: At the start; its VAE and its ViT are the same throughout.
        maker: Makes features of samples.
        tokenize: The tokenizer.
        concepts: All of them.
        out: The study's folder.
    """

    study: Study
    model: Mige
    maker: FeatureMaker
    tokenize: Tokenize
    concepts: list[Concept]
    out: Path

    @staticmethod
    def open(study: Study, concepts: list[Concept], state: Path, start: Path | None, out: Path) -> "Workshop":
        """Make the model at the start: DiT and T5 as they begin, image encoders that are trained.

        Args:
            study: The study.
            concepts: All concepts.
            state: A state folder after the stages `looks` and `qformer`.
            start: The model folder or bundle that these stages went on from, if they did.
            out: The study's folder.

        Raises:
            InputError: The stages have not run, `start` is no such folder or has other sizes, or the study was begun
                with others of these.
        """
        trained = with_trained_encoder(study.model, state, start)
        torch.manual_seed(study.common.seed)
        model = Mige(study.model)
        initialise(model)
        model.vae_encoder, model.vae_decoder = trained.vae_encoder, trained.vae_decoder
        ours, theirs = model.image_encoder, trained.image_encoder
        ours.vision, ours.qformer, ours.projection = theirs.vision, theirs.qformer, theirs.projection
        ours.query_tokens = theirs.query_tokens
        tokenize = load_tokenizer(state_tokenizer(study.model, concepts, state, start))
        vae = model.vae_encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        maker = FeatureMaker(study.model, vae, deepcopy(model.image_encoder), tokenize)
        apart = ("model", "seeds", "arms")  # more seeds and arms may come
        plan = {name: value for name, value in asdict(study).items() if name not in apart}
        read_by = {"image_encoder": fingerprint(trained.image_encoder)}
        write_plan(out, maker.plan() | read_by | plan, allowed=None)
        return Workshop(study, model, maker, tokenize, concepts, out)

    def module(self, fusion: bool) -> TrainedPart:
        """A copy of the model at the start, to train."""
        model = deepcopy(self.model).train()
        if not fusion:
            model.image_encoder.fusion = SemanticFeatures(model.image_encoder.fusion)  # type: ignore[assignment]
        return TrainedPart(model)

    def series(self, name: str, shares: Mapping[str, float], multimodal: bool = True) -> RollingShards:
        """Samples to train on."""
        known = [concept for concept in self.concepts if not concept.held_out]
        data = self.study.data
        return RollingShards(
            self.out / "features" / name,
            self.maker,
            known,
            shares,
            data.seed,
            data.shard_samples,
            data.shards,
            data.varied,
            None if multimodal else as_text_only,
        )


@dataclass(frozen=True)
class MixedSeries:
    """Batches of several series in fixed proportions."""

    workshop: Workshop
    series: Mapping[str, RollingShards]
    weights: Mapping[str, float]

    def batches(self, settings: StageSettings, step: int, rank: int, ranks: int) -> Iterator[Batch]:
        """The batches from a step on, the same ones whenever it is called."""
        assert (rank, ranks) == (0, 1)  # `run_study` has seen to it
        uses = self.workshop.study.data.uses
        numbers = apportion(self.weights, settings.batch)
        while True:
            rng = np.random.default_rng([settings.seed, step])
            chosen = []
            for name, number in numbers.items():
                chosen += self.series[name].draw(rng, number, step * number, uses)
            yield collate(chosen, self.workshop.study.model)
            step += 1


def train_common(workshop: Workshop) -> Path:
    """Train what all arms start from, without the fusion, which starts at zero as published; returns its file."""
    folder, study = workshop.out / COMMON, workshop.study
    if (folder / TRAINED_FILE).is_file():
        return folder / TRAINED_FILE
    module = workshop.module(fusion=False)
    known = [concept for concept in workshop.concepts if not concept.held_out]
    alone = [make_sample(study.common.seed, i, known, study.model.size, {"again": 1}) for i in range(START_SAMPLES)]
    torch.manual_seed(study.common.seed)
    start_reading(module, all_of(workshop.maker, alone))
    mixed = MixedSeries(workshop, {COMMON: workshop.series(COMMON, study.common_kinds)}, {COMMON: 1.0})
    return _train(COMMON, module, mixed, study.common, study.data, folder)


def train_arm(workshop: Workshop, name: str, arm: Arm, seed: int, folder: Path) -> TrainedPart:
    """Train an arm from the common start; a run that was stopped goes on.

    Args:
        workshop: The study's.
        name: The arm's.
        arm: What it is trained on.
        seed: One of the study's.
        folder: The run's.

    Returns:
        The moving average of its weights.
    """
    study, module = workshop.study, workshop.module(arm.fusion)
    load_common(module, workshop.out / COMMON / TRAINED_FILE)
    suffix = "" if arm.multimodal else "-text-only"
    series = {task: workshop.series(task + suffix, study.kinds[task], arm.multimodal) for task in arm.tasks}
    mixed = MixedSeries(workshop, series, {**arm.tasks})
    _train(name, module, mixed, replace(study.optimisation, seed=seed), study.data, folder)
    load_model(module, folder / TRAINED_FILE)
    return module.cpu().eval()  # where it is measured


def load_common(module: TrainedPart, path: Path) -> None:
    """Read the common start, which has no fusion but its last norm."""
    missing, unexpected = load_model(module, path, strict=False)
    others = [name for name in missing if not name.startswith("image_encoder.fusion.")]
    assert not unexpected and not others, (unexpected, others)


def _train(
    name: str, module: TrainedPart, mixed: MixedSeries, settings: StageSettings, data: LadderSettings, folder: Path
) -> Path:
    torch.manual_seed(settings.seed)
    task = Task(name, Loss(module.config, data), partial(mixed.batches, settings))
    average = train(module, task, settings, folder)
    return save_trained(average, folder)
