"""What a run is judged by while it goes on: the loss of samples that it does not train on, and images of some of them.

Noise, timesteps and seeds are the same each time, so that the losses of two steps, and their images, can be compared.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.interface import Array
from mige_rt.config import ModelConfig
from mige_rt.denoise import Conditioning, denoise, denoising_step, schedule_rows
from mige_rt.guidance import Branch, branches
from mige_rt.postprocessing import to_image
from mige_rt.scheduler import draw_noise, make_schedule
from mige_rt.tokenizer import Tokenize
from trainer.checkpoints.weights import Checkpoint
from trainer.contact_sheet import Strip, sheet
from trainer.data.batches import TrainingBatch, collate
from trainer.data.mixing import MixedBatches
from trainer.data.prepared import PreparedSample, open_prepared
from trainer.run.config import RunConfig, ValidationSettings
from trainer.run.loss import RunLoss, means_of_processes

PREFIX = "validation/"  # of the names of its metrics
IMAGES_FOLDER = "images"
SCHEDULER = "dpm_solver_pp_2m"


@dataclass(frozen=True, eq=False)
class Shown:
    """A sample and the image that was made for it, each uint8 [H,W,3]; source is None where there is none."""

    prompt: str
    references: Sequence[NDArray[np.uint8]]
    source: NDArray[np.uint8] | None
    result: NDArray[np.uint8]
    target: NDArray[np.uint8]


def check_samples(config: RunConfig) -> None:
    """Open the samples of a run's validation, if it has one, beside those that it trains on.

    Raises:
        InputError: They are no prepared set, or were prepared with other encoders.
    """
    if config.validation is not None:
        MixedBatches((*config.sources, config.validation.source), config.micro_batch, config.seed)


class Validation:
    """Measures and shows a module in training. Every process makes every call, with its part of a sharded module."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, start: Checkpoint, tokenize: Tokenize) -> None:
        """Open the samples, which `check_samples` has seen, and load the VAE where images are to be shown."""
        assert config.validation is not None
        self._settings: ValidationSettings = config.validation
        self._config, self._accelerator, self._tokenize = config, accelerator, tokenize
        self._loss = RunLoss(config.sizes)
        self._batches = MixedBatches((self._settings.source,), config.micro_batch, config.seed)
        self._shown = _first_samples(self._settings)
        self._decoder: nn.Module | None = None
        if self._shown and accelerator.is_main_process:
            self._decoder = start.load({"vae_decoder"}, dtype=torch.float32, device=accelerator.device).vae_decoder

    @torch.no_grad()
    def losses(self, module: nn.Module) -> dict[str, float]:
        """The mean losses over all processes, by the names of `RunLoss` and `loss`, with PREFIX before them."""
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        number = -(-self._settings.batches // ranks)
        values: dict[str, list[float]] = defaultdict(list)
        with _drawing_apart(module):
            for i, batch in enumerate(islice(self._batches.batches(0, rank, ranks), number)):
                torch.manual_seed(self._config.seed * 10**9 + i * ranks + rank)
                samples = collate(batch.samples, self._config.sizes, self._tokenize, batch.generator)
                loss, metrics = self._loss(module, samples.to(self._accelerator.device))
                for name, value in ({"loss": loss.item()} | metrics).items():
                    values[name].append(value)
        return {PREFIX + name: mean for name, mean in means_of_processes(values).items()}

    @torch.no_grad()
    def images(self, module: nn.Module) -> list[Shown]:
        """An image for each of the first samples, made with the model's default scales; empty but in the main process.

        Processes share the samples, and each makes equally many, since all take part in each call of a sharded module.
        """
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        rounds = -(-len(self._shown) // ranks)
        latents: dict[int, NDArray[np.float32]] = {}
        with _drawing_apart(module):
            for k in (min(first * ranks + rank, len(self._shown) - 1) for first in range(rounds)):
                latents[k] = self._paint(module, k).float().cpu().numpy()
        painted: dict[int, NDArray[np.float32]] = {}
        for of_process in gather_object([latents]):
            painted |= of_process
        if self._decoder is None:
            return []
        return [self._decode(sample, painted[k]) for k, sample in enumerate(self._shown)]

    def _paint(self, module: nn.Module, k: int) -> Tensor:
        """Scaled latents [c,h,w] for sample k."""
        sizes, sample = self._config.sizes, self._shown[k]
        batch = collate([sample], sizes, self._tokenize, np.random.default_rng(k)).to(self._accelerator.device)
        defaults = getattr(sizes.defaults, sample.task)
        has_source = sample.source is not None
        guided = branches(defaults.guidance_scale, defaults.image_guidance_scale if has_source else None)
        drawn = draw_noise([k], cast(tuple[int, int, int], tuple(batch.target.shape[1:])))
        noise = torch.from_numpy(drawn).to(self._accelerator.device)
        schedule = make_schedule(SCHEDULER, self._settings.num_inference_steps, sizes.prediction)
        denoiser = _BatchDenoiser(sizes, module, batch, guided)
        conditioning = Conditioning(batch.source if has_source else None, *denoiser.no_conditions())
        rows = schedule_rows(schedule, noise)
        latents = denoise(denoising_step(denoiser), noise, conditioning, guided, rows)
        return cast(Tensor, latents)[0]

    def _decode(self, sample: PreparedSample, latents: NDArray[np.float32]) -> Shown:
        scale = self._config.sizes.vae.scale
        rows = [*sample.images, *(() if sample.source is None else (sample.source,)), sample.target]
        means = [np.split(sample.latents[row].astype(np.float32), 2)[0] for row in rows]
        *before, result, target = [self._pixels(one) for one in (*means[:-1], latents / scale, means[-1])]
        source = before.pop() if sample.source is not None else None
        references = [image for row, image in zip(sample.images, before, strict=True) if row != sample.source]
        return Shown(sample.prompt, references, source, result, target)

    def _pixels(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The image [H,W,3] of unscaled latents [c,h,w]; black where they are not finite, as a broken model's are."""
        assert self._decoder is not None
        pixels = self._decoder(torch.from_numpy(latents)[None].to(self._accelerator.device))[0].cpu().numpy()
        return np.asarray(to_image(np.nan_to_num(pixels, nan=-1.0)))


def save_images(shown: Sequence[Shown], path: Path) -> None:
    """Write a contact sheet: references, source, the image that was made, and the target, with the prompt below."""
    most = max(len(sample.references) for sample in shown)
    titles = [*(["references"] + [""] * (most - 1))[:most], "source", "result", "target"]
    strips = []
    for sample in shown:
        padding = [None] * (most - len(sample.references))
        strips.append(Strip([*sample.references, *padding, sample.source, sample.result, sample.target], sample.prompt))
    path.parent.mkdir(exist_ok=True)
    sheet(strips, titles, path)


@dataclass(frozen=True, eq=False)
class _BatchDenoiser:
    """A `mige_rt.denoise.Denoiser` that encodes the prompt anew at each step, as a module in training does.

    Attributes:
        config: The model's sizes.
        module: A `TrainedPart`, as the processes share it, whose whole forward pass must be called.
        batch: One sample.
        branches: Of guidance.
    """

    config: ModelConfig
    module: nn.Module
    batch: TrainingBatch
    branches: Sequence[Branch]

    def no_conditions(self) -> tuple[Tensor, Tensor]:
        """In place of cross_kv and text_mask, which the batch stands for."""
        rows = len(self.branches)
        return torch.zeros(2, 1, rows, 1, 1, 1), torch.ones(rows, 1, dtype=torch.bool)

    def __call__(self, *, latents: Array, source: Array, timestep: Array, cross_kv: Array, text_mask: Array) -> Array:
        """One prediction for every branch, [R,c,h,w]."""
        has_text = torch.tensor([branch.text for branch in self.branches], device=self.batch.target.device)
        output = self.module(self.batch, latents, source, timestep, has_text)
        return output[:, : self.config.vae.channels].float()


def _first_samples(settings: ValidationSettings) -> list[PreparedSample]:
    """The first samples of the set, in the order of its files."""
    prepared, samples = open_prepared(Path(settings.path)), list[PreparedSample]()
    for number in range(len(prepared.index.shards)):
        if len(samples) >= settings.images:
            break
        samples += prepared.read_shard(number)
    return samples[: settings.images]


@contextmanager
def _drawing_apart(module: nn.Module) -> Iterator[None]:
    """The module is in evaluation mode, and random numbers that are drawn here change nothing outside."""
    was_training = module.training
    module.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        module.train(was_training)


def best_by(losses: Mapping[str, Any]) -> float:
    """The number that the best checkpoint is chosen by."""
    return float(losses[f"{PREFIX}loss"])
