"""What `mige-rt info` prints."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table


def bundle_tables(content: dict[str, Any]) -> Iterator[Table | str]:
    """The parts of a bundle's description (see `bundle.describe`), to be printed in order."""
    validated = "compared with PyTorch" if content["validated"] else "not validated (--no-validate)"
    yield f"{content['model']['name']} in {content['precision']}, {validated}; {content['source']}"
    for lora in content.get("loras") or ():
        yield f"with the LoRA {lora['name']} merged at scale {lora['scale']:g}, SHA-256 {lora['sha256']}"
    axes = Table("axis", "min", "opt", "max", title="Ranges")
    for axis, span in content["ranges"].items():
        axes.add_row(axis, *(str(span[name]) for name in ("min", "opt", "max")))
    yield axes
    graphs = Table("graph", "parameters", "MB", "input or output", "axes", title="Graphs")
    for name, graph in content["graphs"].items():
        size = (graph["onnx"]["bytes"] + graph["weights"]["bytes"]) / 1e6
        for k, (tensor, sizes) in enumerate(graph["axes"].items()):
            first = ("", "", "") if k else (name, f"{graph['parameters']:,}", f"{size:,.1f}")
            graphs.add_row(*first, tensor, " x ".join(map(str, sizes)), end_section=k == len(graph["axes"]) - 1)
    yield graphs
    precision = Table("graph", "layers", "computes in", title="Precision")
    for name, graph in content["graphs"].items():
        for layers, types in graph["precision"].items():
            precision.add_row(name, layers, types)
    yield precision
    if content["checks"]:
        checks = Table("graph", "comparisons", "worst relative RMS error", "limit", title="Validation")
        for name, check in content["checks"].items():
            checks.add_row(name, str(check["number"]), f"{check['rms']:.1e}", f"{check['limit']:.1e}")
        yield checks
    if content["plans"]:
        plans = Table("plans", "built with", "for", "MB", "here", title="Plans")
        for plan in content["plans"]:
            target = plan["gpu"] or "compute capability " + " ".join(plan["capabilities"])
            built = f"{plan['engine']} {plan['version']}"
            plans.add_row(plan["name"], built, target, f"{plan['bytes'] / 1e6:,.1f}", plan["misfit"] or "fits")
        yield plans
    yield "made with " + ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    if content.get("verified"):
        yield "every file is what the manifest says"
