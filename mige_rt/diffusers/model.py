"""The component of a diffusers pipeline that holds the model: its graphs on an engine, torch tensors around them."""

import inspect
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from mige_rt import pipeline as engine_pipeline
from mige_rt.atomic import atomic_folder
from mige_rt.bundle import CONFIG, DEFAULT_MODEL, MANIFEST, REPORT, SIGNATURE, is_bundle, read_manifest
from mige_rt.config import ModelConfig, Precision
from mige_rt.denoise import LoopInputs, guide, loop_inputs, predict
from mige_rt.errors import InputError
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams
from mige_rt.scheduler import BETAS, TRAIN_STEPS

_PRECISIONS: Mapping[torch.dtype, Precision] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a batch of images is conditioned on, and the noise that it starts from.

    Attributes:
        inputs: Of every step, on the engine's device.
        noise: float32 [B,c,h,w], standard normal.
        num_inference_steps: As asked for, or the model's for the task.
        seeds: Of the images.
    """

    inputs: LoopInputs
    noise: torch.Tensor
    num_inference_steps: int
    seeds: tuple[int, ...]


class MigeModel:
    """A `mige_rt.MigePipeline` as diffusers sees it: `from_pretrained`, `save_pretrained`, `to`, `device`, `dtype`.

    Attributes:
        engine_pipeline: The pipeline of mige-rt, which encodes, predicts and decodes.
        config: The model's sizes and defaults.
    """

    def __init__(self, pipe: engine_pipeline.MigePipeline, options: Mapping[str, Any] | None = None) -> None:
        """Wrap an open pipeline.

        Args:
            pipe: The pipeline.
            options: That it was opened with, for opening it again on another device.
        """
        self.engine_pipeline = pipe
        self.config: ModelConfig = pipe.config
        self._options: dict[str, Any] = dict(options or {"engine": pipe.engine.name})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path = DEFAULT_MODEL,
        *,
        subfolder: str = "",
        torch_dtype: torch.dtype | None = None,
        device: str = "cpu",
        variant: None = None,
        revision: None = None,
        **options: Any,
    ) -> "MigeModel":
        """Open a model.

        Args:
            pretrained_model_name_or_path: See `mige_rt.MigePipeline.from_pretrained`.
            subfolder: Of the folder, where the model lies there.
            torch_dtype: What to compute in: float32, float16 or bfloat16; None: see `precision` there.
            device: Where to; `to` moves it.
            variant: Takes nothing: a bundle has one precision.
            revision: Takes nothing: `mige-rt pull` downloads another.
            options: The other arguments of `mige_rt.MigePipeline.from_pretrained`, such as `engine`.

        Raises:
            InputError: See there; or there is no such precision.
        """
        if variant is not None or revision is not None:
            raise InputError(
                f"variant {variant!r} and revision {revision!r} were given; a bundle has neither: give its own folder, "
                "or download a revision with `mige-rt pull`"
            )
        if torch_dtype is not None:
            options["precision"] = _precision(torch_dtype)
        path = Path(pretrained_model_name_or_path) / subfolder if subfolder else pretrained_model_name_or_path
        pipe = engine_pipeline.MigePipeline.from_pretrained(path, device=device, **options)
        return cls(pipe, options)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Copy the bundle or the model folder, whole or not at all.

        Args:
            save_directory: The folder to make.
            kwargs: What diffusers passes to every component; without effect.

        Raises:
            InputError: It exists, or the model was not opened from a folder.
        """
        with atomic_folder(Path(save_directory)) as folder:
            self.copy_to(folder)

    def copy_to(self, folder: Path) -> None:
        """Copy the files of the model into a folder that is there. Raises InputError: it was assembled from parts."""
        source = self.engine_pipeline.folder
        if source is None:
            raise InputError("this model was assembled from parts, and no folder has it; open it by from_pretrained")
        if is_bundle(source):
            names = [file.path for file in read_manifest(source).files] + [MANIFEST, REPORT, SIGNATURE]
        else:
            names = [CONFIG, *(str(path.relative_to(source)) for path in source.rglob("*.safetensors"))]
            names += [
                str(path.relative_to(source)) for path in source.rglob("*.json") if path.name != "model_index.json"
            ]
        for name in dict.fromkeys(names):
            if (source / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / name)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "MigeModel":
        """Open the model again on another device, or in another precision; nothing is done where it is there already.

        Raises:
            InputError: There is no such device, or precision.
        """
        precision = None if dtype is None or dtype == self.dtype else _precision(dtype)
        moves = device is not None and not _is_on(self.device, torch.device(device))
        if not moves and precision is None:
            return self
        folder = self.engine_pipeline.folder
        if folder is None:
            raise InputError("this model was assembled from parts, which stay where they are; use from_pretrained")
        options: dict[str, Any] = {**self._options} | ({} if precision is None else {"precision": precision})
        target = str(device) if device is not None else str(self.device)
        pipe = engine_pipeline.MigePipeline.from_pretrained(folder, device=target, **options)
        pipe.model_name = self.engine_pipeline.model_name
        self.engine_pipeline, self._options = pipe, options
        return self

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return torch.device(self.engine_pipeline.engine.device)

    @property
    def dtype(self) -> torch.dtype:
        """What the engine computes in; float32 for what PyTorch has no type for, such as int8 products."""
        by_name = {precision: dtype for dtype, precision in _PRECISIONS.items()}
        return by_name.get(self.engine_pipeline.engine.precision, torch.float32)  # pyright: ignore[reportArgumentType]

    def encode(self, requests: Sequence[ResolvedRequest], params: SamplingParams) -> Encoded:
        """Encode prompts and images, once before the steps.

        Args:
            requests: At most `max_batch_size` of `engine_pipeline`, all of one task.
            params: Sizes, scales and the number of steps.

        Raises:
            InputError: See `mige_rt.MigePipeline.generate`.
        """
        pipe = self.engine_pipeline
        plan = pipe.plan(requests, params)
        for sentence in plan.warnings:
            _log.warning(sentence)
        conditioning = pipe.encode_conditioning(requests, plan, _log.warning)
        noise = pipe.engine.array(plan.noise)
        return Encoded(
            inputs=loop_inputs(conditioning, plan.branches, noise),
            noise=torch.as_tensor(noise).clone(),
            num_inference_steps=len(plan.schedule),
            seeds=tuple(request.seed for request in requests),
        )

    def predict(self, inputs: LoopInputs, latents: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """The model's prediction with guidance, as a scheduler's `step` takes it.

        Args:
            inputs: Of `encode`.
            latents: float32 [B,c,h,w], as a scheduler's `scale_model_input` gives them.
            timestep: 0 to 999.

        Returns:
            float32 [B,c,h,w]
        """
        pipe = self.engine_pipeline

        def denoiser(**arrays: Any) -> Any:
            return pipe.runner.run("denoiser", **arrays)

        x = self._to_engine(latents, inputs)
        step = self._to_engine(torch.as_tensor(timestep, dtype=torch.float32, device=latents.device), inputs)
        return torch.as_tensor(guide(predict(denoiser, inputs, x, step), inputs.weights))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels of scaled latents.

        Args:
            latents: float32 [B,c,h,w]

        Returns:
            float32 [B,3,H,W], -1 black and 1 white.
        """
        pipe = self.engine_pipeline
        unscaled = latents / self.config.vae.scale
        is_numpy = isinstance(pipe.engine.array(np.zeros(1, np.float32)), np.ndarray)
        return torch.as_tensor(pipe.runner.run("vae_decoder", latents=unscaled.cpu().numpy() if is_numpy else unscaled))

    def _to_engine(self, tensor: torch.Tensor, inputs: LoopInputs) -> Any:
        """A tensor as the kind of array that the engine takes, which `inputs` are of."""
        tensor = tensor.to(torch.float32)
        return tensor.cpu().numpy() if isinstance(inputs.source, np.ndarray) else tensor.to(self.device)


def default_scheduler(config: ModelConfig) -> DPMSolverMultistepScheduler:
    """DPM-Solver++(2M) of diffusers with the noise schedule that the model was trained with.

    Where the number of steps divides 999 (9, 27, 37, 111), its timesteps are those of `mige_rt.MigePipeline`; with
    others it rounds them to whole numbers.

    Args:
        config: The model's.
    """
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_start=float(BETAS[0]),
        beta_end=float(BETAS[-1]),
        beta_schedule="linear",
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        prediction_type=config.prediction,
        timestep_spacing="linspace",
        final_sigmas_type="sigma_min",
    )


def denoise(
    model: MigeModel,
    encoded: Encoded,
    scheduler: Any,
    latents: torch.Tensor | None,
    on_step: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None],
) -> torch.Tensor:
    """The loop of a diffusers scheduler.

    Args:
        model: The model.
        encoded: A batch.
        scheduler: Any with `set_timesteps`, `scale_model_input` and `step`.
        latents: float32 [B,c,h,w], standard normal noise to start from; None: that of the seeds.
        on_step: Gets the index of the step, its timestep and the latents after it; gives the latents to go on with, or
            None to end here.

    Returns:
        float32 [B,c,h,w], scaled latents.
    """
    scheduler.set_timesteps(encoded.num_inference_steps, device=model.device)
    noise = encoded.noise if latents is None else latents.to(model.device, torch.float32)
    if noise.shape != encoded.noise.shape:
        raise InputError(f"latents have the shape {list(noise.shape)}; {list(encoded.noise.shape)} is expected")
    x: torch.Tensor = noise * scheduler.init_noise_sigma
    options: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:  # an image's noise follows from its own seed alone
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in encoded.seeds]
    for i, timestep in enumerate(scheduler.timesteps):
        prediction = model.predict(encoded.inputs, scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(prediction, timestep, x, return_dict=False, **options)[0]
        replacement = on_step(i, timestep, x)
        if replacement is None:
            break
        x = replacement
    return x


def _precision(dtype: torch.dtype) -> Precision:
    if dtype not in _PRECISIONS:
        raise InputError(f"the type {dtype} was given; one of {', '.join(map(str, _PRECISIONS))} is expected")
    return _PRECISIONS[dtype]


def _is_on(device: torch.device, wanted: torch.device) -> bool:
    return device.type == wanted.type and wanted.index in (None, device.index or 0)
