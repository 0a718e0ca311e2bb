"""The nodes as ComfyUI shows them (V3 schema); what they do stands in `generation.py`."""

from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import ComfyExtension, io

from mige_rt import MigePipeline

from . import generation

CATEGORY = "MIGE"
Model = io.Custom("MIGE_MODEL")
Settings = io.Custom("MIGE_SETTINGS")


class MigeLoadModel(io.ComfyNode):
    """Opens a bundle."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `io.ComfyNode`."""
        return io.Schema(
            node_id="MigeLoadModel",
            display_name="MIGE: Load Model",
            category=CATEGORY,
            description="Opens a bundle, a model folder, or a repository on the Hugging Face hub.",
            inputs=[
                io.String.Input(
                    "model",
                    default="",
                    tooltip="a path, or OWNER/NAME on the hub; empty: the small model that comes with mige-rt",
                ),
                io.Combo.Input("engine", options=generation.ENGINES, default="auto"),
                io.Combo.Input("device", options=generation.DEVICES, default="auto"),
                io.Combo.Input("precision", options=generation.PRECISIONS, default="auto", advanced=True),
            ],
            outputs=[Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: str, engine: str, device: str, precision: str) -> io.NodeOutput:
        """Open the model."""
        return io.NodeOutput(generation.load_model(model, engine=engine, device=device, precision=precision))


class MigeSamplerSettings(io.ComfyNode):
    """How images are sampled, where that is not the model's own way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `io.ComfyNode`."""
        return io.Schema(
            node_id="MigeSamplerSettings",
            display_name="MIGE: Sampler Settings",
            category=CATEGORY,
            description="0 is the model's default for the task.",
            inputs=[
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip="of the scheduler, 2 or more"),
                io.Float.Input("guidance_scale", default=0.0, min=0.0, max=30.0, step=0.1, tooltip="by the words"),
                io.Float.Input(
                    "image_guidance_scale", default=0.0, min=0.0, max=10.0, step=0.1, tooltip="by the source"
                ),
                io.Int.Input("width", default=0, min=0, max=8192, step=8),
                io.Int.Input("height", default=0, min=0, max=8192, step=8),
                io.Combo.Input("scheduler", options=generation.SCHEDULERS),
                io.Combo.Input(
                    "fit",
                    options=generation.FITS,
                    tooltip="of images of another shape: cut, with black bars, or the result in the source's shape",
                ),
            ],
            outputs=[Settings.Output(display_name="settings")],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        """Gather the settings."""
        return io.NodeOutput(generation.sampling_params(**values))


class MigeGenerate(io.ComfyNode):
    """Makes or edits images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `io.ComfyNode`."""
        numbers = ("first", "second", "third", "fourth")
        return io.Schema(
            node_id="MigeGenerate",
            display_name="MIGE: Generate or Edit",
            category=CATEGORY,
            description="Makes an image from an instruction; with a source, edits that.",
            inputs=[
                Model.Input("model"),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default="make the background blue",
                    tooltip="<imagehere> stands for an image, in the order of image_1 to image_4",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, control_after_generate=True),
                io.Int.Input(
                    "num_images", default=1, min=1, max=64, tooltip="of each source; they take the next seeds"
                ),
                io.Image.Input("source", optional=True, tooltip="the image to edit; without it, a new image is made"),
                *(
                    io.Image.Input(f"image_{k}", optional=True, tooltip=f"the {number} <imagehere>")
                    for k, number in enumerate(numbers, 1)
                ),
                Settings.Input("settings", optional=True),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(  # noqa: PLR0913, the inputs of the schema
        cls,
        model: MigePipeline,
        instruction: str,
        seed: int,
        *,
        num_images: int = 1,
        source: Any = None,
        image_1: Any = None,
        image_2: Any = None,
        image_3: Any = None,
        image_4: Any = None,
        settings: Any = None,
    ) -> io.NodeOutput:
        """Make the images; the progress bar follows the steps, and an interruption ends them."""
        bar: Any = None

        def on_step(done: int, total: int) -> None:
            nonlocal bar
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar = bar or comfy.utils.ProgressBar(total)
            bar.update_absolute(done, total)

        inputs = generation.Inputs(instruction, source, (image_1, image_2, image_3, image_4))
        images = generation.generate(model, inputs, settings, seed=seed, num_images=num_images, on_step=on_step)
        return io.NodeOutput(images)


class MigeExtension(ComfyExtension):
    """What the pack brings."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """See `ComfyExtension`."""
        return [MigeLoadModel, MigeSamplerSettings, MigeGenerate]


async def comfy_entrypoint() -> MigeExtension:
    """What ComfyUI calls when it loads the pack."""
    return MigeExtension()
