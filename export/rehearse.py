"""A full-size export with made-up weights: `python -m export.rehearse [--precision fp16] [--out benchmarks/results]`.

Makes a model folder of the published sizes (6.6 billion parameters, 13 GB in bf16), exports and validates it as
`mige-rt export` does, builds the plans that fit into the memory, and writes what each graph took as JSON and as a
Markdown table. Needs the packages of `mige-rt[bench]`, 45 GB of disk, which it gives back, 24 GB of memory, and about
half an hour.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from export.build_plans import rehearse_plan
from export.environment import environment
from export.exporter import ExportLimits, ExportOptions, ExportResult, export_bundle
from export.formatting import markdown_table
from export.made_up import make_model
from export.results import worst_check
from mige_rt.bundle import Manifest
from mige_rt.config import PRESETS
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, GraphName


@dataclass(frozen=True)
class PlanAttempt:
    """What building a graph's plan for TensorRT for RTX took, or why there is none: a sentence."""

    seconds: float | None = None
    peak_bytes: int | None = None
    bytes: int | None = None
    missing: str | None = None


def _build_plans(bundle: Path, manifest: Manifest, scratch: Path) -> dict[GraphName, PlanAttempt]:
    """Build the plans that fit into the memory.

    What the others need is estimated from the builder's memory for the denoiser, which comes first.
    """
    attempts: dict[GraphName, PlanAttempt] = {}
    per_byte, memory = 0.0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for graph in sorted(GRAPHS, key=lambda name: name != "denoiser"):
        weights = manifest.graphs[graph].weights.bytes
        if per_byte * weights > 0.8 * memory:
            needed = per_byte * weights / 1e9
            attempts[graph] = PlanAttempt(missing=f"not tried: needs about {needed:.0f} GB of memory")
            continue
        path = scratch / f"{graph}.plan"
        try:
            built = rehearse_plan(bundle, graph, path)
        except (InputError, RuntimeError) as error:
            attempts[graph] = PlanAttempt(missing=f"failed: {error}")
            continue
        attempts[graph] = PlanAttempt(built.seconds, built.peak_bytes, path.stat().st_size)
        per_byte = per_byte or (built.peak_bytes or 0) / weights
    return attempts


@dataclass(frozen=True)
class Rehearsal:
    """A full-size export: what it ran on, and what each graph took."""

    command: str
    date: str
    machine: str
    result: ExportResult
    plans: Mapping[GraphName, PlanAttempt]

    @property
    def parameters(self) -> int:
        """The parameters of all graphs."""
        return sum(graph.parameters for graph in self.result.graphs.values())

    def file_bytes(self, graph: GraphName) -> int:
        """The size of a graph's two files, in bytes."""
        entry = self.result.manifest.graphs[graph]
        return entry.onnx.bytes + entry.weights.bytes

    def to_json(self) -> dict[str, Any]:
        """The content of the JSON report; sizes are in bytes, times in seconds."""
        graphs = self.result.report()["graphs"]
        return {
            "precision": self.result.manifest.precision,
            "command": self.command,
            "date": self.date,
            "machine": self.machine,
            "versions": self.result.manifest.versions,
            "parameters": self.parameters,
            "graphs": {graph: graphs[graph] | {"bytes": self.file_bytes(graph)} for graph in self.result.graphs},
            "plans": {graph: _without_none(asdict(attempt)) for graph, attempt in self.plans.items()},
        }


def _without_none(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if value is not None}


def markdown(rehearsal: Rehearsal) -> str:
    """The table of a rehearsal, with its command and machine."""
    rows: list[dict[str, str]] = []
    for name, graph in rehearsal.result.graphs.items():
        worst, plan = worst_check(graph.checks or []), rehearsal.plans[name]
        built = f"{plan.seconds:.0f} s, {(plan.bytes or 0) / 1e9:.2f} GB" if plan.seconds is not None else plan.missing
        rows.append(
            {
                "graph": name,
                "parameters": f"{graph.parameters:,}",
                "GB": f"{rehearsal.file_bytes(name) / 1e9:.2f}",
                "export, s": f"{graph.seconds:.0f}",
                "check, s": f"{graph.validation_seconds or 0:.0f}",
                "memory, GB": f"{(graph.peak_bytes or 0) / 1e9:.1f}",
                "error": f"{worst.rms:.1e}",
                "limit": f"{worst.limit:.0e}",
                "plan": built or "",
                "its memory, GB": f"{plan.peak_bytes / 1e9:.1f}" if plan.peak_bytes else "",
            }
        )
    return (
        f"# Full-size export in {rehearsal.result.manifest.precision}\n\n"
        f"`{rehearsal.command}`, {rehearsal.date}: {rehearsal.machine}. Made-up weights of the published sizes, "
        f"{rehearsal.parameters / 1e9:.2f} billion parameters, kept in bfloat16. Each graph in a process of its own; "
        "`error` is the worst relative RMS error against PyTorch in float32 over two small shapes with random inputs, "
        "one of them with real ones as well; `memory` is the most that the process had resident, mapped files "
        "included. The last two columns: its plan for TensorRT for RTX (compute capabilities 8.0, 8.6, 8.9, 12.0).\n\n"
        f"{markdown_table(rows, ('plan',))}\n"
    )


@click.command(help=__doc__)
@click.option("--precision", default="fp16", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="xl", show_default=True, help="sizes of the model")
@click.option("--scratch", type=click.Path(path_type=Path), help="where the disk has room  [default: the system's]")
def main(precision: str, out: Path, preset: str, scratch: Path | None) -> None:
    """Export a model of made-up weights, and write what it took to rehearsal-PRECISION.json and .md in `out`."""
    console = Console(stderr=True)
    last = ""

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if what != last:
            last = what
            console.log(what)

    try:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="rehearsal-") as temporary:
            folder = Path(temporary)
            console.log(f"making a model of the sizes {preset}")
            make_model(PRESETS[preset], folder / "model")
            result = export_bundle(
                str(folder / "model"),
                folder / "bundle",
                precision,
                ExportLimits(1, 4),
                options=ExportOptions(rehearsal=True),
                on_progress=on_progress,
            )
            console.log("plans")
            plans = _build_plans(folder / "bundle", result.manifest, folder)
    except InputError as error:
        raise click.UsageError(str(error)) from error
    machine = environment()
    memory = machine["memory_bytes"] / 2**30
    rehearsal = Rehearsal(
        command=f"python -m export.rehearse --precision {precision}",
        date=date.today().isoformat(),
        machine=f"{machine['cores']} cores of {machine['cpu']}, {memory:.0f} GiB of memory, no GPU",
        result=result,
        plans=plans,
    )
    out.mkdir(parents=True, exist_ok=True)
    name = f"rehearsal-{precision}" if preset == "xl" else f"rehearsal-{preset}-{precision}"
    json_path, markdown_path = out / f"{name}.json", out / f"{name}.md"
    json_path.write_text(json.dumps(rehearsal.to_json(), indent=1) + "\n", encoding="utf-8")
    markdown_path.write_text(markdown(rehearsal), encoding="utf-8")
    click.echo(markdown_path)


if __name__ == "__main__":
    main()
