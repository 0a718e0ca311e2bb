"""The page: its tabs, the gallery of a window's images, and what happens when."""

from collections.abc import AsyncGenerator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mige_rt.errors import InputError
from mige_rt.image_output import read_settings
from mige_rt.serve.image_service import ImageService
from mige_rt.serve.protocol import Ready
from mige_rt.serve.supervisor import Supervisor
from mige_rt.ui.image_run import ImageRuns, Update
from mige_rt.ui.settings import settings_of
from mige_rt.ui.tabs import TABS, Tab, status_line
from mige_rt.ui.tools import add_tools

_DAY = 24 * 60 * 60  # seconds
_SHOWN_SETTINGS = ("prompt", "seed", "num_inference_steps", "guidance_scale", "image_guidance_scale", "size", "model")
# On a phone the result is below what was pressed.
_SHOW_RESULT = """() => {
  const outputs = [...document.querySelectorAll(".mige-output")].find((each) => each.checkVisibility());
  if (window.innerWidth < 768) outputs?.scrollIntoView({behavior: "smooth"});
}"""


def create_page(service: ImageService, supervisor: Supervisor) -> tuple[gr.Blocks, ImageRuns]:
    """The page of a service with one model, to be mounted, and what runs on it."""
    runs = ImageRuns(service, supervisor)
    with gr.Blocks(title="mige-rt", analytics_enabled=False, delete_cache=(_DAY, _DAY)) as blocks:
        _Page(service, runs)
        add_tools(service)
        blocks.unload(runs.close)
    return blocks.queue(default_concurrency_limit=None), runs  # the service has the queue


class _Page:
    """Places the components and connects them, in the context of a `gr.Blocks`."""

    def __init__(self, service: ImageService, runs: ImageRuns) -> None:
        self._runs = runs
        model = runs.supervisor.model
        gr.HTML(_header(service.options.model_names[0], model), elem_id="mige-header")
        self._tabs: dict[str, Tab] = {}
        with gr.Tabs() as self._titles:
            for about in TABS:
                with gr.Tab(about.title, id=about.task, render_children=True):
                    self._tabs[about.task] = Tab(about, model.config, service.options)
        self._place_gallery()
        for tab in self._tabs.values():
            self._connect(tab)
        self._connect_gallery()

    def _place_gallery(self) -> None:
        with gr.Accordion("Images of this window", open=True):
            self._selected = gr.State(None)
            with gr.Row():
                self._gallery = gr.Gallery(
                    label="Gallery",
                    columns=6,
                    height=220,
                    object_fit="contain",
                    fit_columns=False,
                    interactive=False,
                    allow_preview=False,
                    buttons=[],
                    elem_id="mige-gallery",
                    scale=3,
                )
                with gr.Column(scale=2, min_width=300):
                    self._dropped = gr.File(
                        label="Settings of an image",
                        file_types=[".png", ".jpg", ".jpeg", ".webp"],
                        height=140,
                        elem_id="mige-settings-file",
                    )
                    self._details = gr.HTML(elem_id="mige-details")
                    self._restore = gr.Button("Use these settings", visible=False, elem_id="mige-restore")

    def _connect(self, tab: Tab) -> None:
        async def run(values: Update, request: gr.Request) -> AsyncGenerator[Update]:
            async for update in self._runs.run(tab, values, request):
                yield {self._gallery: list(map(str, update))} if isinstance(update, list) else update

        async def cancel(request: gr.Request) -> None:
            await self._runs.cancel(tab, request)

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        tab.run.click(run, tab.inputs, [*tab.outputs, self._gallery], **quiet)
        tab.run.click(None, js=_SHOW_RESULT)
        tab.example.click(lambda: tab.example_values, None, list(tab.example_values), **quiet)
        tab.cancel.click(cancel, queue=False, **quiet)

    def _connect_gallery(self) -> None:
        fields = [component for tab in self._tabs.values() for component in tab.settings]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

        def select(event: gr.SelectData, request: gr.Request) -> Update:
            index: int = event.index
            path = self._runs.session(request).images[index]
            return {self._selected: str(path), self._details: _details(path), self._restore: gr.update(visible=True)}

        def restore(path: str | None) -> Update:
            if path is None:
                return {self._details: ""}
            try:
                settings = settings_of(Path(path))
            except InputError as error:
                return {self._details: status_line(str(error), is_error=True), self._restore: gr.update(visible=False)}
            return {
                **self._tabs[settings.task].restored(settings),
                self._titles: gr.update(selected=settings.task),
                self._details: status_line(settings.summary),
                self._restore: gr.update(visible=False),
            }

        outputs = [*fields, self._titles, self._details, self._restore]
        self._gallery.select(select, None, [self._selected, self._details, self._restore], **quiet)
        self._restore.click(restore, self._selected, outputs, **quiet)
        dropped = self._dropped.upload(restore, self._dropped, outputs, **quiet)
        dropped.then(lambda: None, None, self._dropped, **quiet)  # makes room for the next


def _header(name: str, model: Ready) -> str:
    return (
        '<div class="mige-header"><h1>mige-rt</h1>'
        f'<p><span class="mige-badge" title="model">{escape(name)}</span> '
        f'<span class="mige-badge" title="engine">{escape(model.engine)} on {escape(model.device)}</span> '
        f'<span class="mige-badge" title="precision">{escape(model.precision)}</span></p></div>'
    )


def _details(path: Path) -> str:
    """An image's settings, as HTML."""
    settings = read_settings(path)
    names = [name for name in _SHOWN_SETTINGS if name in settings]
    entries = "".join(f"<dt>{name.replace('_', ' ')}</dt><dd>{escape(settings[name])}</dd>" for name in names)
    return f'<dl class="mige-settings">{entries}</dl>'
