"""The page of `mige-rt annotate`, by Gradio.

Nothing is asked of other hosts: the fonts are the system's, and Gradio's analytics are off. The server remembers of a
browser only who looks at which pair; what was decided is in the file alone, so a killed page loses nothing.
"""

import html
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.annotation.annotating import Annotating, Session, Shown
from benchmarks.annotation.decisions import ROWS
from benchmarks.annotation.editor import BLUE, OPACITY, RED, SIDE
from benchmarks.annotation.figures import cuts_html, inputs_html
from benchmarks.annotation.pairs import CATEGORIES
from mige_rt.errors import InputError

os.environ["GRADIO_RUN_HISTORY"] = "False"  # before it is imported

import gradio as gr
from fastapi import FastAPI, Request
from gradio.themes import Default
from starlette.middleware.base import RequestResponseEndpoint
from starlette.responses import Response

MAX_NAME = 100  # characters of an annotator's name
_POLICY = (  # what Gradio's own page needs; other hosts are no part of it
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; font-src 'self' data:"
)
_KEYS = """
<script>
document.addEventListener("keydown", (event) => {
  const button = {c: "cut", d: "drop", k: "keep", s: "skip", u: "undo"}[event.key.toLowerCase()];
  const typing = event.target.closest("input, textarea, select, [contenteditable]");
  if (!button || typing || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  document.getElementById(button)?.click();
});
</script>
"""
_CSS = """
.strip { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-end; }
.strip figure { margin: 0; }
.strip img { display: block; border-radius: 4px; border: 1px solid #cbd2da; }
.strip figcaption, .about { font-size: .85rem; opacity: .75; }
.about { margin-top: .4rem; }
.form:has(> #pair), #pair { display: none; }
"""


def create_app(annotating: Annotating) -> FastAPI:
    """The page as an application."""
    app = FastAPI(title="mige-rt annotate", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def own_host_alone(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = _POLICY
        return response

    with gr.Blocks(title="mige-rt annotate", analytics_enabled=False, fill_width=True) as blocks:
        _wire(_layout(), annotating)
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        head=_KEYS,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
    )


@dataclass(frozen=True)
class _Layout:
    """The page's components, from top to bottom."""

    session: gr.State
    beginning: gr.Row
    name: gr.Textbox
    begin: gr.Button
    line: gr.Markdown
    buttons: gr.Row
    keep: gr.Button
    drop: gr.Button
    skip: gr.Button
    undo: gr.Button
    work: gr.Row
    editor: gr.ImageEditor
    pair_id: gr.Textbox
    inputs: gr.HTML
    fields: tuple[gr.Textbox | gr.Dropdown, ...]
    cuts: gr.HTML
    cut: gr.Button
    details: gr.Accordion
    tables: gr.Markdown

    @property
    def of_pair(self) -> list[Any]:
        """What shows a pair, in the order of `_values`."""
        return [self.pair_id, self.inputs, self.editor, *self.fields, self.cuts]

    @property
    def all(self) -> list[Any]:
        """What a decision changes."""
        around = [self.session, self.beginning, self.buttons, self.details, self.line, self.tables]
        return [*around, self.work, self.keep, self.drop, self.skip, *self.of_pair]


FIELDS = ("prompt", "name", "caption", "row", "category")  # of an annotation, in the order of `_Layout.fields`


def _layout() -> _Layout:
    session = gr.State(Session("", None))
    with gr.Row(equal_height=True) as beginning:
        label = "Your name, so that you can go on later"
        name = gr.Textbox(label=label, max_length=MAX_NAME, autofocus=True, scale=4, elem_id="name")
        begin = gr.Button("Begin", variant="primary", scale=1, min_width=120, elem_id="begin")
    line = gr.Markdown(elem_id="line")
    with gr.Row(visible=False) as buttons:
        keep = gr.Button("Keep (K)", variant="primary", min_width=90, elem_id="keep")
        drop = gr.Button("Drop (D)", variant="stop", min_width=90, elem_id="drop")
        skip = gr.Button("Skip (S)", min_width=90, elem_id="skip")
        undo = gr.Button("Undo (U)", min_width=90, elem_id="undo")
    with gr.Row(visible=False) as work:
        with gr.Column(scale=5, min_width=360):
            editor = _editor()
            cut = gr.Button("Cut out again (C)", size="sm", elem_id="cut")
        with gr.Column(scale=5, min_width=360):
            pair_id = gr.Textbox(elem_id="pair")
            inputs = gr.HTML(elem_id="inputs")
            cuts = gr.HTML(elem_id="cuts")
            prompt = gr.Textbox(label="Instruction", lines=2, elem_id="prompt")
            subject = gr.Textbox(label="The subject is called", elem_id="subject")
            caption = gr.Textbox(label="Caption of the target", elem_id="caption")
            with gr.Row():
                row = gr.Dropdown(list(ROWS), label="Row", min_width=120, elem_id="row")
                choices = list(CATEGORIES)
                category = gr.Dropdown(
                    choices, label="Category", allow_custom_value=True, min_width=120, elem_id="category"
                )
    with gr.Accordion("Progress by category, and agreement", open=False, visible=False) as details:
        tables = gr.Markdown(elem_id="tables")
    return _Layout(
        session=session,
        beginning=beginning,
        name=name,
        begin=begin,
        line=line,
        buttons=buttons,
        keep=keep,
        drop=drop,
        skip=skip,
        undo=undo,
        work=work,
        editor=editor,
        pair_id=pair_id,
        inputs=inputs,
        fields=(prompt, subject, caption, row, category),
        cuts=cuts,
        cut=cut,
        details=details,
        tables=tables,
    )


def _editor() -> gr.ImageEditor:
    red, blue = ((f"rgb{color}", OPACITY) for color in (RED, BLUE))
    return gr.ImageEditor(
        label="Target: mask in red, box in blue",
        type="pil",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=16, colors=[red, blue], default_color=red, color_mode="fixed"),
        eraser=gr.Eraser(default_size=16),
        canvas_size=(SIDE, SIDE),
        height=SIDE + 70,
        buttons=[],
        elem_id="editor",
    )


def _wire(page: _Layout, annotating: Annotating) -> None:
    """What the buttons do; the keys press them."""

    def update(now: Session) -> list[Any]:
        shown, there = now.shown, now.shown is not None
        begun = [gr.update(visible=False), gr.update(visible=True), gr.update(visible=True)]
        texts = [_line(annotating, now), annotating.tables(now.annotator)]
        active = [gr.update(visible=there), *(gr.update(interactive=there) for _ in range(3))]
        values = [gr.skip()] * len(page.of_pair) if shown is None else _values(shown)
        return [now, *begun, *texts, *active, *values]

    def begin(annotator: str) -> list[Any]:
        if not 0 < len(annotator.strip()) <= MAX_NAME:
            raise gr.Error(f"Write your name first, in at most {MAX_NAME} characters.")
        return update(annotating.begin(annotator.strip()))

    def keep(now: Session, pair: str, drawn: dict[str, Any] | None, *texts: str) -> list[Any]:
        shown = _checked(now, pair)
        words = {name: (text or "").strip() for name, text in zip(FIELDS, texts, strict=True)}
        with _reported():
            annotating.keep(shown, replace(shown.annotation, **words), drawn)
        return update(annotating.go_on(shown))

    def drop(now: Session, pair: str) -> list[Any]:
        shown = _checked(now, pair)
        with _reported():
            annotating.drop(shown)
        return update(annotating.go_on(shown))

    def skip(now: Session, pair: str) -> list[Any]:
        return update(annotating.go_on(_checked(now, pair)))

    def undo(now: Session) -> list[Any]:
        _check_begun(now)
        with _reported():
            shown = annotating.undo(now.annotator)
        if shown is None:
            raise gr.Error("There is nothing to undo.")
        return update(Session(now.annotator, shown))

    def cut(now: Session, drawn: dict[str, Any] | None) -> str:
        return "" if now.shown is None else cuts_html(now.shown, drawn)

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    # In turn, or two keys pressed at once would both decide on the pair that the first of them leaves.
    in_turn: dict[str, Any] = {**quiet, "concurrency_id": "decisions", "concurrency_limit": 1}
    seen = [page.session, page.pair_id]
    gr.on([page.begin.click, page.name.submit], begin, page.name, page.all, **in_turn)
    page.keep.click(keep, [*seen, page.editor, *page.fields], page.all, **in_turn)
    page.drop.click(drop, seen, page.all, **in_turn)
    page.skip.click(skip, seen, page.all, **in_turn)
    page.undo.click(undo, page.session, page.all, **in_turn)
    # Not at each stroke: every event of the editor sends all of its images.
    page.cut.click(cut, [page.session, page.editor], page.cuts, **quiet)


def _line(annotating: Annotating, now: Session) -> str:
    """Who, how far, and what cannot be shown."""
    line = f"{html.escape(now.annotator)}: {annotating.progress(now.annotator)}"
    if now.shown is None:
        return f"{line}. **That was all. Thank you!**"
    line = f"{line}. Now pair {html.escape(now.shown.pair.id)}."
    return f"{line}\n\n**{html.escape(now.shown.problem)}**" if now.shown.problem else line


def _values(shown: Shown) -> list[Any]:
    """What the components of a pair show."""
    value = None if shown.drawing is None else shown.drawing.value()
    texts = [getattr(shown.annotation, name) for name in FIELDS]
    return [shown.pair.id, inputs_html(shown.pair), value, *texts, cuts_html(shown, value)]


def _checked(now: Session, pair: str) -> Shown:
    """What is shown, if the browser agrees: a decision must not be of another pair than the one that was seen."""
    _check_begun(now)
    if now.shown is None or now.shown.pair.id != pair:
        raise gr.Error("The page was still changing, so nothing was written. Look at what it shows now.")
    return now.shown


def _check_begun(now: Session) -> None:
    if not now.annotator:
        raise gr.Error("The page was started again: reload it and write your name. What you decided is still there.")


@contextmanager
def _reported() -> Generator[None, None, None]:
    """What cannot be done is said on the page."""
    try:
        yield
    except (InputError, OSError) as error:
        raise gr.Error(str(error)) from error
