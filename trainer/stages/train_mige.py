"""The last stage: MIGE itself, all but the two image encoders, jointly (paper, section 4.1), up the ladder of tasks."""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from engines.pytorch import PyTorchEngine
from mige_rt.atomic import atomic_file
from mige_rt.bundle import TOKENIZER_FILE
from mige_rt.config import ModelConfig
from mige_rt.instruction import PLACEHOLDER, compose_prompt
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams
from mige_rt.scheduler import TRAIN_STEPS
from mige_rt.tokenizer import load_tokenizer
from trainer.contact_sheet import grid
from trainer.loop import Task, train
from trainer.objective import add_noise, objective
from trainer.preview import answer
from trainer.settings import LadderSettings, StageSettings
from trainer.stages.features import KIND_NAMES, Batch, FeatureMaker, RollingShards, collate
from trainer.stages.ladder import KEPT_EDITS, LADDER, Climb, counts
from trainer.stages.one_shot import one_shot
from trainer.stages.reading import start_to_look
from trainer.stages.starting_model import pass_on, with_trained_encoder
from trainer.stages.trained_part import TrainedPart, attention_inputs, attention_layers
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import make_sample
from trainer.tokenizer import train_tokenizer

DROP = 0.05  # chance to drop the text, the same to drop the source, the same to drop both
NOISY_FROM = 700  # timesteps from which on next to nothing of the data is left
HELD_OUT_SEED = 10**6 + 4
HELD_OUT = 48  # samples a rung
START_SAMPLES = 96  # that the cross-attention's start is found from
SHOWN = 6  # samples a rung in a preview
WATCH_EVERY, PREVIEW_TIMES = 100, 5  # steps; a preview each so many times
TOKENIZER_SEED, TOKENIZER_SAMPLES = 4, 4000


def start_reading(module: TrainedPart, batch: Batch) -> list[dict[str, float]]:
    """Start half of the heads of each block's cross-attention so that they look at the image tokens of their place;
    what they read counts for nothing yet. T5 starts by passing tokens on, since what it makes of them does not tell
    their places. batch: samples of one image each. Returns, for each block, the shares of the codes' variance that
    queries and keys explain."""
    config = module.config
    pass_on(module.text_encoder)
    width = config.dit.width
    rows = width // config.dit.heads * (config.dit.heads // 2)
    pairs = attention_layers(module)
    with torch.no_grad():
        for attention, kv_linear in pairs:
            attention.proj.weight[:, :rows] = 0
            nn.init.xavier_uniform_(kv_linear.weight[width : width + rows])
            kv_linear.bias[width : width + rows] = 0
    noise = torch.randn_like(batch.target)
    timestep = torch.randint(NOISY_FROM, TRAIN_STEPS, (len(noise),))
    asked, keys_from = attention_inputs(module, batch, add_noise(batch.target, noise, timestep), timestep)
    image_tokens = keys_from[batch.slot_index >= 0].reshape(len(noise), config.qformer.queries, -1)
    return [
        start_to_look(attention, kv_linear, x, image_tokens, config.dit.trained_grid)
        for (attention, kv_linear), x in zip(pairs, asked, strict=True)
    ]


def _timesteps(number: int, noisy: float, device: torch.device) -> Tensor:
    """int64 [number]; a share `noisy` of them from NOISY_FROM on, the others anywhere."""
    anywhere = torch.randint(TRAIN_STEPS, (number,), device=device)
    late = torch.randint(NOISY_FROM, TRAIN_STEPS, (number,), device=device)
    return torch.where(torch.rand(number, device=device) < noisy, late, anywhere)


@dataclass(frozen=True)
class Loss:
    """The objective of a batch; ladder: how many draws, which timesteps, what the things count for."""

    config: ModelConfig
    ladder: LadderSettings

    def __call__(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        draws = self.ladder.draws
        target, source = batch.target.repeat(draws, 1, 1, 1), batch.source.repeat(draws, 1, 1, 1)
        number, device = len(target), target.device
        timestep, noise = _timesteps(number, self.ladder.noisy, device), torch.randn_like(target)
        draw = torch.rand(number, device=device)
        # both between DROP and 2 * DROP
        without_text, without_source = draw < 2 * DROP, (draw > DROP) & (draw < 3 * DROP)
        source = source * ~without_source[:, None, None, None]
        output = module(batch, add_noise(target, noise, timestep), source, timestep, ~without_text)
        weight = 1 + (self.ladder.asked - 1) * batch.asked.repeat(draws, 1, 1, 1)
        losses = objective(self.config, output, target, noise, timestep, weight)
        whole = (~without_text & ~without_source).cpu().numpy()
        each, kinds = losses.detach().cpu().numpy(), np.tile(batch.kinds, draws)
        metrics = {}
        for index, kind in enumerate(KIND_NAMES):
            of_kind = each[(kinds == index) & whole]
            if len(of_kind):
                metrics[kind] = float(of_kind.mean())
        return losses.mean(), metrics


@dataclass(frozen=True)
class Practice:
    """The samples of each rung, and where on the ladder training is."""

    config: ModelConfig
    shards: dict[str, RollingShards]
    climb: Climb
    ladder: LadderSettings

    def batches(self, settings: StageSettings, step: int, rank: int, ranks: int) -> Iterator[Batch]:
        """The batches from a step on: the same ones whenever it is asked, as long as the rungs begin at the same
        steps. Raises ValueError for more than one process: only the first knows when a rung holds."""
        if ranks > 1:
            raise ValueError("the ladder is climbed in one process; start one")
        while True:
            rng = np.random.default_rng([settings.seed, step])
            chosen = []
            for name, number in counts(self.climb.newest(step), settings.batch).items():
                drawn = self.climb.drawn(name, step, settings.batch)
                shards = self.shards[name].read(1 + drawn // (self.ladder.shard_samples * self.ladder.uses))
                for index in rng.integers(len(shards) * self.ladder.shard_samples, size=number).tolist():
                    chosen.append((shards[index // self.ladder.shard_samples], index % self.ladder.shard_samples))
            yield collate(chosen, self.config)
            step += 1


def practice(
    maker: FeatureMaker, concepts: Sequence[Concept], climb: Climb, ladder: LadderSettings, folder: Path
) -> Practice:
    """The rungs' samples of concepts that are not held out, in `folder`."""
    known = [concept for concept in concepts if not concept.held_out]
    shards = {
        rung.name: RollingShards(
            folder / rung.name,
            maker,
            known,
            rung.shares,
            ladder.seed,
            ladder.shard_samples,
            ladder.shards,
            ladder.varied,
        )
        for rung in (*LADDER, KEPT_EDITS)
    }
    return Practice(maker.config, shards, climb, ladder)


def train_mige(
    config: ModelConfig,
    settings: StageSettings,
    ladder: LadderSettings,
    concepts: list[Concept],
    state: Path,
    start: Path | None = None,
) -> None:
    """Train up the ladder, from a model's weights if `start` gives one; the state, with the moving average of the
    weights, and previews are in state/mige. concepts: all of them; those held out are measured on, by rung.

    Raises InputError as `with_trained_encoder` does.
    """
    torch.manual_seed(settings.seed)
    folder = state / "mige"
    folder.mkdir(parents=True, exist_ok=True)
    model = with_trained_encoder(config, state, start).train()
    tokenizer_path = state_tokenizer(config, concepts, state, start)
    tokenize = load_tokenizer(tokenizer_path)
    vae = model.vae_encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    maker = FeatureMaker(config, vae, deepcopy(model.image_encoder), tokenize)
    resumed_at = torch.load(folder / "state.pt", weights_only=True)["step"] if (folder / "state.pt").is_file() else 0
    climb = Climb.resumed(folder / "climb.json", resumed_at)
    source = practice(maker, concepts, climb, ladder, state / "features")
    unseen = [concept for concept in concepts if concept.held_out]
    samples = {
        rung.name: [make_sample(HELD_OUT_SEED, index, unseen, config.size, rung.shares) for index in range(HELD_OUT)]
        for rung in (*LADDER, KEPT_EDITS)
    }
    measured_on = {}
    for name, of_rung in samples.items():
        shard = maker.shard(of_rung)
        measured_on[name] = collate([(shard, index) for index in range(HELD_OUT)], config)
    module = TrainedPart(model)
    if not resumed_at:
        alone = [
            make_sample(settings.seed, index, source.shards["again"].concepts, config.size, {"again": 1})
            for index in range(START_SAMPLES)
        ]
        shard = maker.shard(alone)
        shares = start_reading(module, collate([(shard, index) for index in range(START_SAMPLES)], config))
        (folder / "start.json").write_text(json.dumps(shares) + "\n")

    def watch(average: nn.Module, step: int) -> dict[str, float]:
        """Measure each rung, begin the next where the newest one holds, and paint a preview."""
        assert isinstance(average, TrainedPart)
        newest = climb.newest(step)
        errors = {
            name: one_shot(average, batch, seed=0)
            for name, batch in measured_on.items()
            if name in counts(min(newest + 1, len(LADDER) - 1), settings.batch)
        }
        rung = LADDER[newest]
        if newest + 1 < len(LADDER) and errors[rung.name].share <= rung.holds:
            climb.begin_next(step)
        if step % (WATCH_EVERY * PREVIEW_TIMES) == 0:
            pipe = MigePipeline(config, tokenize, PyTorchEngine(deepcopy(average).cpu().with_vae(model)))
            shown = [s for name in errors for s in samples[name][:SHOWN]]
            grid(shown, answer(pipe, shown, SamplingParams()), folder / f"preview-{step:06d}.png")
        return {"rung": newest} | {f"one-shot {name}": error.share for name, error in errors.items()}

    task = Task("mige", Loss(config, ladder), partial(source.batches, settings), watch, WATCH_EVERY)
    train(module, task, settings, folder)


def synthetic_tokenizer(concepts: Sequence[Concept], vocabulary: int) -> Tokenizer:
    """A tokenizer of the words that the small world's instructions use, and of every printable character."""

    def texts() -> Iterator[str]:
        for concept in concepts:
            yield concept.name
        for index in range(TOKENIZER_SAMPLES):
            sample = make_sample(TOKENIZER_SEED, index, concepts, 16)
            yield from compose_prompt(sample.task, sample.prompt).split(PLACEHOLDER)

    return train_tokenizer(texts(), vocabulary)


def state_tokenizer(config: ModelConfig, concepts: Sequence[Concept], state: Path, start: Path | None) -> Path:
    """The path of a state folder's tokenizer: `start`'s, or one made of the small world's words."""
    path = state / "tokenizer.json"
    if not path.is_file():
        known = [concept for concept in concepts if not concept.held_out]
        tokenizer = (
            Tokenizer.from_file(str(start / TOKENIZER_FILE))
            if start is not None
            else synthetic_tokenizer(known, config.text.vocabulary)
        )
        with atomic_file(path) as temporary:
            tokenizer.save(str(temporary))
    return path
