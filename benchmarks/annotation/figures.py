"""The images of a pair as HTML, inside the page."""

import base64
import html
from io import BytesIO
from typing import Any

from PIL import Image

from benchmarks.annotation.annotating import Shown
from benchmarks.annotation.editor import read_drawing
from benchmarks.annotation.masks import cut_out
from benchmarks.annotation.pairs import EditingPair
from benchmarks.evaluation.sample import image_labels
from mige_rt.errors import InputError
from mige_rt.images import open_image

FIGURE = 132  # pixels of a shown image's longer side


def inputs_html(pair: EditingPair) -> str:
    """The source, and what else the instruction refers to, in its order."""
    images = [*image_labels(pair.sample.images, pair.sample.source).items(), (pair.sample.target, "target")]
    figures: list[str] = []
    for path, label in images:
        try:
            figures.append(_figure(open_image(path), label))
        except InputError as error:
            figures.append(f"<p>{html.escape(f'{label}: {error}')}</p>")
    return f'<div class="strip">{"".join(figures)}</div>'


def cuts_html(shown: Shown, drawn: dict[str, Any] | None) -> str:
    """The subject on black and on white, as it is cut out now."""
    if shown.drawing is None:
        return ""
    try:
        mask, box = read_drawing(drawn, shown.drawing)
    except InputError as error:
        return f"<p>{html.escape(str(error))}</p>"
    if mask is None or box is None:
        return "<p>There is no mask.</p>"
    target = open_image(shown.pair.sample.target)
    figures = [_figure(cut_out(target, mask, box, ground), f"on {ground}") for ground in ("black", "white")]
    left, top, right, bottom = box
    about = f"box {left}, {top} to {right}, {bottom} of {target.width} x {target.height}; mask {mask.mean():.1%} of it"
    return f'<div class="strip">{"".join(figures)}</div><p class="about">{about}</p>'


def _figure(image: Image.Image, caption: str) -> str:
    scale = FIGURE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image if scale > 1 else image.resize(size, Image.Resampling.LANCZOS)
    file = BytesIO()
    small.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    label = html.escape(caption)
    picture = f'<img src="{url}" alt="{label}" width="{size[0]}" height="{size[1]}">'
    return f"<figure>{picture}<figcaption>{label}</figcaption></figure>"
