"""What `mige-rt export` prints."""

from typing import Any

from rich.table import Table

from export.exporter import ExportResult


def exported_table(exported: ExportResult) -> Table:
    """A row a graph: parameters, size, precision, worst relative RMS error and where, seconds, peak memory."""
    columns = ("graph", "parameters", "MB", "precision", "worst error", "at", "seconds", "peak GB")
    table = Table(*columns, title=f"{exported.manifest.model.name} in {exported.manifest.precision}")
    for name, graph in exported.manifest.graphs.items():
        result = exported.report["graphs"][name]
        size = (graph.onnx.bytes + graph.weights.bytes) / 1e6
        table.add_row(
            name,
            f"{graph.parameters:,}",
            f"{size:,.1f}",
            next(iter(graph.precision.values())).partition(" ")[0],
            *_worst(result.get("checks")),
            f"{result['seconds'] + result.get('validation_seconds', 0):.0f}",
            "?" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 1e9:.1f}",
        )
    if (whole := exported.report.get("pipeline")) is not None:
        table.add_row("pictures", "", "", "", *_worst(whole["checks"]), f"{whole['seconds']:.0f}", "")
    return table


def _worst(checks: list[dict[str, Any]] | None) -> tuple[str, str]:
    if not checks:
        return "not validated", ""
    worst = max(checks, key=lambda check: check["rms"] / check["limit"])
    sizes = " ".join(f"{axis}={size}" for axis, size in worst["shape"].items())
    return f"{worst['rms']:.1e}", f"{worst['output']} {worst['inputs']} {sizes}"
