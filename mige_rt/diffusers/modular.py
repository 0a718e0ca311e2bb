"""MIGE as blocks of diffusers' modular pipelines: encode, denoise, decode."""

# diffusers' types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from mige_rt.bundle import DEFAULT_MODEL, read_manifest
from mige_rt.diffusers.model import Encoded, MigeModel, default_scheduler, denoise
from mige_rt.pipeline import resolve_call
from mige_rt.sampling_params import SamplingParams

_MODEL = ComponentSpec(
    name="mige",
    type_hint=MigeModel,
    description="the model on an engine of mige-rt",
    pretrained_model_name_or_path=str(DEFAULT_MODEL),
)
_SCHEDULER = ComponentSpec(
    name="scheduler",
    type_hint=DPMSolverMultistepScheduler,
    description="any scheduler of diffusers",
    config=FrozenDict(default_scheduler(read_manifest(DEFAULT_MODEL).model).config),
    default_creation_method="from_config",
)


class MigeEncodeBlock(ModularPipelineBlocks):
    """Prompts and images become what the steps are conditioned on."""

    model_name = "mige"

    @property
    def description(self) -> str:
        """See `ModularPipelineBlocks`."""
        return "Encodes prompts, reference images and the source, and draws the noise of each image."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """See `ModularPipelineBlocks`."""
        return [_MODEL]

    @property
    def inputs(self) -> list[InputParam]:
        """See `ModularPipelineBlocks`; the arguments of `mige_rt.MigePipeline.__call__`."""
        return [
            InputParam("prompt", required=True, description="what to make, with <imagehere> for each image"),
            InputParam("images", description="PIL images in the order of the placeholders"),
            InputParam("source", description="the PIL image to edit"),
            InputParam("num_inference_steps", type_hint=int),
            InputParam("guidance_scale", type_hint=float),
            InputParam("image_guidance_scale", type_hint=float),
            InputParam("num_images_per_prompt", type_hint=int, default=1),
            InputParam("generator", description="the seed of each image is drawn from it"),
            InputParam("height", type_hint=int),
            InputParam("width", type_hint=int),
            InputParam("task", type_hint=str),
            InputParam("edit_scope", type_hint=str, default="local"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """See `ModularPipelineBlocks`."""
        return [OutputParam("encoded", type_hint=Encoded, description="what the steps are conditioned on")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Encode. Raises InputError when an input cannot be used."""
        block: Any = self.get_block_state(state)
        requests = resolve_call(
            block.prompt,
            block.images,
            block.source,
            generator=block.generator,
            num_images_per_prompt=block.num_images_per_prompt,
            task=block.task,
            edit_scope=block.edit_scope,
        )
        params = SamplingParams(
            num_inference_steps=block.num_inference_steps,
            guidance_scale=block.guidance_scale,
            image_guidance_scale=block.image_guidance_scale,
            width=block.width,
            height=block.height,
        )
        block.encoded = components.mige.encode([request for of_prompt in requests for request in of_prompt], params)
        self.set_block_state(state, block)
        return components, state


class MigeDenoiseBlock(ModularPipelineBlocks):
    """From noise to latents."""

    model_name = "mige"

    @property
    def description(self) -> str:
        """See `ModularPipelineBlocks`."""
        return "Runs the steps of the scheduler."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """See `ModularPipelineBlocks`."""
        return [_MODEL, _SCHEDULER]

    @property
    def inputs(self) -> list[InputParam]:
        """See `ModularPipelineBlocks`."""
        return [
            InputParam("encoded", type_hint=Encoded, required=True, description="of the block before"),
            InputParam("latents", type_hint=torch.Tensor, description="noise to start from instead of the seeds'"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """See `ModularPipelineBlocks`."""
        return [OutputParam("latents", type_hint=torch.Tensor, description="scaled latents [B,c,h,w]")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Denoise. Raises InputError when the latents have another shape."""
        block: Any = self.get_block_state(state)

        def on_step(i: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            return latents

        block.latents = denoise(components.mige, block.encoded, components.scheduler, block.latents, on_step)
        self.set_block_state(state, block)
        return components, state


class MigeDecodeBlock(ModularPipelineBlocks):
    """From latents to images."""

    model_name = "mige"

    @property
    def description(self) -> str:
        """See `ModularPipelineBlocks`."""
        return "Decodes latents to images."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """See `ModularPipelineBlocks`."""
        return [_MODEL]

    @property
    def inputs(self) -> list[InputParam]:
        """See `ModularPipelineBlocks`."""
        return [
            InputParam("latents", type_hint=torch.Tensor, required=True, description="of the block before"),
            InputParam("output_type", type_hint=str, default="pil", description="pil, np or pt"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """See `ModularPipelineBlocks`."""
        return [OutputParam("images", type_hint=list, description="as output_type says")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Decode."""
        block: Any = self.get_block_state(state)
        processor = VaeImageProcessor(vae_scale_factor=components.mige.config.vae.factor)
        block.images = processor.postprocess(components.mige.decode(block.latents), block.output_type)
        self.set_block_state(state, block)
        return components, state


class MigeBlocks(SequentialPipelineBlocks):
    """All of it: `MigeBlocks().init_pipeline(FOLDER)`, then `load_components()`, then call it."""

    block_classes = [MigeEncodeBlock, MigeDenoiseBlock, MigeDecodeBlock]  # noqa: RUF012, as diffusers reads it
    block_names = ["encode", "denoise", "decode"]  # noqa: RUF012

    @property
    def description(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]  # theirs has the type of ''
        """See `ModularPipelineBlocks`."""
        return "MIGE: images from instructions with images in them."
