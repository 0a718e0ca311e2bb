"""The page's three tabs: what each is for, and its components."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.data_classes import ImageData

from mige_rt.config import ModelConfig
from mige_rt.instruction import Task
from mige_rt.sampling_params import SamplingParams
from mige_rt.serve.options import ServerOptions
from mige_rt.serve.schemas import EditRequest, GenerationRequest, ImageRequest
from mige_rt.ui.settings import PageSettings

EXAMPLES = Path(__file__).parent / "examples"
_EXAMPLE_SEED = 4


@dataclass(frozen=True, kw_only=True)
class TabDescription:
    """What a tab is for.

    Attributes:
        task: That its images are made for.
        title: Of the tab.
        model: What its requests are.
        source_label: Of the image to edit; empty: there is none.
        references_label: Of the images that the prompt refers to; empty: there are none.
        hint: Below the prompt.
        example: A prompt that the default model follows, for the images that come with the page.
    """

    task: Task
    title: str
    model: type[ImageRequest]
    source_label: str = ""
    references_label: str = ""
    hint: str
    example: str


TABS = (
    TabDescription(
        task="subject",
        title="Make",
        model=GenerationRequest,
        references_label="Things to show",
        hint="Makes a new image of the things you show. Each chip stands for one image, in their order.",
        example="a <imagehere> on a plain green background",
    ),
    TabDescription(
        task="edit",
        title="Edit",
        model=EditRequest,
        source_label="Image to edit",
        hint="Changes the image as you say.",
        example="make the background blue",
    ),
    TabDescription(
        task="compose",
        title="Put into",
        model=EditRequest,
        source_label="Image to edit",
        references_label="Things to put in",
        hint="Puts what you show into the image. The first chip stands for the image to edit, the next for the things.",
        example="replace the thing on the left in <imagehere> with <imagehere>",
    ),
)


class Tab:
    """A tab's components. What a task has no use for is there, too, but not to be seen."""

    def __init__(self, description: TabDescription, config: ModelConfig, options: ServerOptions) -> None:
        """Place the components, in the context of a `gr.Tab`."""
        self.description = description
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=320):
                self._place_inputs()
                self._place_settings(config, options)
                self.example = gr.Button(
                    f"Example: {description.example}", size="sm", elem_id=f"{description.task}-example"
                )
            with gr.Column(scale=1, min_width=320, elem_classes="mige-output"):
                self._place_outputs()

    @property
    def inputs(self) -> set[Block]:
        """What a run reads."""
        return {self.source, self.references, *self.settings}

    @property
    def outputs(self) -> list[Block]:
        """What a run changes."""
        return [self.status, self.result, self.comparison, self.download, self.run, self.cancel]

    @property
    def example_values(self) -> dict[Block, Any]:
        """What the button for the example fills in."""
        about, subject, scene = self.description, str(EXAMPLES / "subject.png"), str(EXAMPLES / "scene.png")
        values: dict[Block, Any] = {self.prompt: about.example, self.seed: _EXAMPLE_SEED}
        if about.source_label:
            values[self.source] = scene
        if about.references_label:
            values[self.references] = [subject]
        return values

    @property
    def settings(self) -> list[Block]:
        """What `restored` changes."""
        return [self.prompt, self.seed, self.steps, self.guidance, self.image_guidance, self.width, self.height]

    def restored(self, settings: PageSettings) -> dict[Block, Any]:
        """The values of an image's settings; what the image does not say stays as it is."""
        width, height = settings.size or (None, None)
        values = (
            settings.prompt,
            settings.seed,
            settings.num_inference_steps,
            settings.guidance_scale,
            settings.image_guidance_scale,
            width,
            height,
        )
        pairs = zip(self.settings, values, strict=True)
        return {component: value for component, value in pairs if value is not None}

    def fields(self, values: dict[Block, Any]) -> dict[str, Any]:
        """The fields of a request. values: of the inputs."""
        fields = {
            "prompt": values[self.prompt] or "",
            "seed": values[self.seed],
            "num_inference_steps": values[self.steps],
            "guidance_scale": values[self.guidance],
            "image_guidance_scale": values[self.image_guidance] if self.description.source_label else None,
            "size": f"{values[self.width]}x{values[self.height]}",
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _place_inputs(self) -> None:
        about = self.description
        with gr.Row(elem_classes="mige-images"):
            self.source = gr.Image(
                label=about.source_label,
                visible=bool(about.source_label),
                sources=["upload", "clipboard"],
                type="filepath",
                height=200,
                elem_id=f"{about.task}-source",
            )
            # Of this component alone: Gradio writes stub files beside the source of a class that is made from its own.
            self.source.preprocess = _uploaded_path
            self.references = gr.Gallery(
                label=about.references_label,
                visible=bool(about.references_label),
                sources=["upload", "clipboard"],
                file_types=["image"],
                interactive=True,
                height=200,
                columns=3,
                object_fit="contain",
                fit_columns=False,
                allow_preview=False,
                buttons=[],
                elem_id=f"{about.task}-references",
            )
        self.prompt = gr.Textbox(
            label="Prompt",
            info=about.hint,
            placeholder=about.example,
            lines=2,
            elem_id=f"{about.task}-prompt",
            elem_classes="mige-prompt",
        )
        with gr.Row():
            self.run = gr.Button(about.title, variant="primary", elem_id=f"{about.task}-run")
            self.cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id=f"{about.task}-cancel")

    def _place_settings(self, config: ModelConfig, options: ServerOptions) -> None:
        about = self.description
        defaults = SamplingParams().with_defaults(config, about.task)
        with gr.Accordion("Settings", open=False, elem_id=f"{about.task}-settings"):
            self.seed = gr.Number(
                label="Seed",
                info="The same seed and settings make the same image again. Empty: drawn.",
                value=None,
                precision=0,
                placeholder="drawn",
                elem_id=f"{about.task}-seed",
            )
            self.steps = gr.Slider(
                2,
                options.max_steps,
                min(defaults.num_inference_steps, options.max_steps),
                step=1,
                precision=0,
                label="Steps",
                elem_id=f"{about.task}-steps",
            )
            self.guidance = gr.Slider(
                1, 15, defaults.guidance_scale, step=0.1, label="Text guidance", info="How strongly the prompt counts."
            )
            self.image_guidance = gr.Slider(
                1,
                5,
                defaults.image_guidance_scale,
                step=0.1,
                label="Image guidance",
                info="How strongly the image to edit counts.",
                visible=bool(about.source_label),
            )
            with gr.Row():
                limit = options.max_side - options.max_side % config.multiple
                self.width, self.height = (
                    gr.Slider(config.multiple, limit, config.size, step=config.multiple, precision=0, label=label)
                    for label in ("Width", "Height")
                )

    def _place_outputs(self) -> None:
        about = self.description
        self.status = gr.HTML(status_line("Nothing made yet."), elem_id=f"{about.task}-status")
        self.result = gr.Image(
            label="Result",
            format="png",
            interactive=False,
            height=400,
            buttons=["fullscreen"],
            elem_id=f"{about.task}-result",
            elem_classes="mige-result",
        )
        self.comparison = gr.ImageSlider(
            label="Before and after",
            format="png",
            interactive=False,
            visible=False,
            height=400,
            max_height=400,
            buttons=["fullscreen"],
            elem_id=f"{about.task}-comparison",
            elem_classes="mige-result",
        )
        self.download = gr.DownloadButton("Download", visible=False, elem_id=f"{about.task}-download")


def _uploaded_path(payload: ImageData | None) -> str | None:
    """An image file as it was uploaded: decoding is the image service's."""
    return None if payload is None else payload.path


def status_line(text: str, *, done: float | None = None, is_error: bool = False) -> str:
    """HTML of a sentence, which may come from a user, with a progress bar if something is on its way.

    Args:
        text: The sentence.
        done: Share of the work, 0 to 1; None: no bar.
        is_error: It says why there is no image.
    """
    kind = "error" if is_error else "plain"
    bar = ""
    if done is not None:
        percent = round(100 * done)
        bar = (
            f'<div class="mige-progress" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{percent}" aria-label="Progress"><div style="width: {percent}%"></div></div>'
        )
    return f'<div class="mige-status mige-{kind}" role="status">{bar}<p>{escape(text)}</p></div>'
