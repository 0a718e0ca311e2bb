"""What `mige-rt export` prints."""

from rich.table import Table

from export.exporter import ExportResult
from export.results import Check, worst_check


def exported_table(result: ExportResult) -> Table:
    """A line a graph: parameters, size, precision, worst relative RMS error and where, seconds, peak memory."""
    columns = ("graph", "parameters", "MB", "precision", "worst error", "at", "seconds", "peak GB")
    table = Table(*columns, title=f"{result.manifest.model.name} in {result.manifest.precision}")
    for name, graph in result.graphs.items():
        entry = result.manifest.graphs[name]
        size = (entry.onnx.bytes + entry.weights.bytes) / 1e6
        table.add_row(
            name,
            f"{graph.parameters:,}",
            f"{size:,.1f}",
            next(iter(entry.precision.values())).partition(" ")[0],
            *_worst(graph.checks),
            f"{graph.seconds + (graph.validation_seconds or 0):.0f}",
            "?" if graph.peak_bytes is None else f"{graph.peak_bytes / 1e9:.1f}",
        )
    if (pipeline := result.pipeline) is not None:
        table.add_row("images", "", "", "", *_worst(pipeline.checks), f"{pipeline.seconds:.0f}", "")
    return table


def _worst(checks: list[Check] | None) -> tuple[str, str]:
    if not checks:
        return "not validated", ""
    worst = worst_check(checks)
    sizes = " ".join(f"{axis}={size}" for axis, size in worst.shape.items())
    return f"{worst.rms:.1e}", f"{worst.output} {worst.inputs} {sizes}"
