"""The model card of a bundle on the Hugging Face hub, from its manifest and its report."""

from pathlib import Path
from typing import Any

from mige_rt.bundle import Manifest, describe

_USAGE = """\
## Usage

```bash
pip install mige-rt
mige-rt run --model {repository} --prompt "make the background blue" --source scene.png
```

```python
from PIL import Image

from mige_rt import MigePipeline

pipe = MigePipeline.from_pretrained("{repository}")
pipe("make the background blue", source=Image.open("scene.png"), seed=0).images[0].save("out.png")
```

`mige-rt pull {repository} --out FOLDER` downloads it, and compares every file with the hashes in `manifest.json`."""


def model_card(bundle: Path, manifest: Manifest, repository: str, *, license: str | None = None) -> str:
    """The text of README.md.

    Args:
        bundle: The bundle, whose report has the metrics.
        manifest: Its manifest.
        repository: `owner/name`.
        license: The weights' license by the hub's identifier, such as `apache-2.0`; None: the card says nothing of it.

    Raises:
        InputError: The report cannot be read.
    """
    name = manifest.model.name
    front = ["library_name: mige-rt", "pipeline_tag: image-to-image", "tags:", "- mige", "- onnx", "- image-editing"]
    if license is not None:
        front.insert(0, f"license: {license}")
    sections = [
        "\n".join(["---", *front, "---"]),
        f"# {repository.partition('/')[2]}",
        f"{_code(name)} for [mige-rt](https://pypi.org/project/mige-rt/): multimodal instruction-based image "
        "generation and editing (MIGE). Six ONNX graphs, which run without PyTorch.",
        _facts(manifest, license),
        _USAGE.format(repository=repository),
        _sizes(manifest),
    ]
    if checks := describe(bundle, manifest)["checks"]:
        sections.append(_metrics(checks))
    return "\n\n".join(sections) + "\n"


def _facts(manifest: Manifest, license: str | None) -> str:
    sizes = manifest.ranges["w"]
    factor = manifest.model.vae.factor
    largest = "" if sizes.min == sizes.max else f", {sizes.min * factor} to {sizes.max * factor} pixels a side"
    facts = {
        "License of the weights": "not stated" if license is None else license,
        "Precision": manifest.precision,
        "Weights from": _code(manifest.source),
        "Trained size": f"{manifest.model.size}x{manifest.model.size} pixels{largest}",
        "Images at once": str(manifest.ranges["B"].max),
        "Parameters": f"{sum(graph.parameters for graph in manifest.graphs.values()):,}",
        "Download": f"{sum(file.bytes for file in manifest.files) / 1e6:,.1f} MB",
        "Compared with PyTorch": "yes, every graph" if manifest.validated else "no",
        "Made with": ", ".join(f"{_code(name)} {_code(number)}" for name, number in manifest.versions.items()),
    }
    return _table(("", ""), facts.items())


def _sizes(manifest: Manifest) -> str:
    rows = [
        (
            f"`{name}`",
            f"{graph.parameters:,}",
            f"{(graph.onnx.bytes + graph.weights.bytes) / 1e6:,.1f}",
            ", ".join(sorted(set(graph.precision.values()))),
        )
        for name, graph in manifest.graphs.items()
    ]
    return "## Graphs\n\n" + _table(("graph", "parameters", "MB", "computes in"), rows)


def _metrics(checks: dict[str, Any]) -> str:
    rows = [
        (f"`{name}`", str(check["number"]), f"{check['rms']:.1e}", f"{check['limit']:.1e}")
        for name, check in checks.items()
    ]
    return (
        "## Metrics\n\nRelative RMS error against PyTorch in float32, the worst of the comparisons of `report.json`:"
        "\n\n" + _table(("graph", "comparisons", "worst", "limit"), rows)
    )


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: str) -> str:
    """A text from a manifest, in which Markdown and HTML mean nothing."""
    return f"`{text.replace('`', chr(39)).replace('|', '/')}`" if text else "not stated"
