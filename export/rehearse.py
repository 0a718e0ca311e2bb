"""A full-size export with made-up weights: `python -m export.rehearse [--precision fp16] [--out benchmarks/results]`.

Makes a model folder of the published sizes (6.6 billion parameters, 13 GB in bf16), exports and validates it as
`mige-rt export` does, builds the plans that fit into the memory, and writes what each graph took as JSON and as a
Markdown table. Needs 45 GB of disk, which it gives back, 24 GB of memory, and about half an hour.
"""

import json
import math
import os
import platform
import tempfile
import zlib
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from export.build_plans import rehearse_plan
from export.exporter import ExportLimits, ExportResult, export_bundle
from mige_rt.atomic import atomic_folder
from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE
from mige_rt.config import PRESETS, ModelConfig
from mige_rt.errors import InputError
from trainer.checkpoints.convert_published import our_shapes
from trainer.checkpoints.model_folder import write_model_folder
from trainer.model.vae import make_vae

BLOCK = 4_194_301  # numbers drawn once and repeated; a prime, so that rows differ


def made_up(name: str, shape: tuple[int, ...], block: Tensor) -> Tensor:
    """A bf16 weight of about the size that a trained one has, fixed by its name and shape: norms near 1, biases small,
    products that keep the size of what they are applied to."""
    size, start = math.prod(shape), zlib.crc32(name.encode()) % len(block)
    values = block.roll(-start).repeat(-(-size // len(block)))[:size].reshape(shape)
    leaf = name.rpartition(".")[2]
    if len(shape) == 1:
        return (1 + 0.1 * values if leaf == "weight" else 0.05 * values).bfloat16()
    if "embed_tokens" in name or "shared" in name:
        return values.bfloat16()
    if name.endswith("SelfAttention.q.weight"):
        # T5 divides no scores by the square root of the head's width, since its training starts from queries that are
        # smaller by it; larger ones make 24 layers of hard choices, which no precision but the same follows.
        values = values / math.sqrt(PRESETS["xl"].text.head_width)
    return (values / math.sqrt(math.prod(shape[1:]))).bfloat16()


def make_model(config: ModelConfig, out: Path) -> None:
    """A model folder of these sizes with made-up weights, one held at a time, and the default model's tokenizer."""
    shapes = our_shapes(config)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    with atomic_folder(out) as folder:
        write_model_folder(
            folder,
            config,
            {name: 2 * math.prod(shape) for name, shape in shapes.items()},
            lambda name: made_up(name, shapes[name], block),
            make_vae(config.vae).state_dict(),
            Tokenizer.from_file(str(DEFAULT_MODEL / TOKENIZER_FILE)),
            "made up",
            None,
        )


def _plans(bundle: Path, exported: ExportResult, scratch: Path) -> dict[str, dict[str, Any]]:
    """Per graph what building its plan for TensorRT for RTX took, or why it was not tried: the builder's memory for the
    denoiser, which comes first, tells what the others need."""
    plans: dict[str, dict[str, Any]] = {}
    a_byte, memory = 0.0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    entries = exported.manifest.graphs
    for graph in sorted(entries, key=lambda name: name != "denoiser"):
        needed = a_byte * entries[graph].weights.bytes
        if needed > 0.8 * memory:
            plans[graph] = {"not_tried": f"not tried: needs about {needed / 1e9:.0f} GB of memory"}
            continue
        path = scratch / f"{graph}.plan"
        try:
            plans[graph] = rehearse_plan(bundle, graph, path) | {"bytes": path.stat().st_size}
        except (InputError, RuntimeError) as error:
            plans[graph] = {"failed": f"failed: {error}"}
            continue
        a_byte = a_byte or (plans[graph]["peak_bytes"] or 0) / entries[graph].weights.bytes
    return plans


def markdown(content: dict[str, Any]) -> str:
    """The table of a rehearsal, with its command and machine."""
    lines = [
        f"# Full-size export in {content['precision']}",
        "",
        f"`{content['command']}`, {content['date']}: {content['machine']}. Made-up weights of the published sizes, "
        f"{content['parameters'] / 1e9:.2f} billion parameters, kept in bfloat16. Each graph in a process of its own; "
        "`error` is the worst relative RMS error against PyTorch in float32 over two small shapes with random inputs, "
        "one of them with real ones as well; `memory` is the most that the process had resident, mapped files "
        "included. The last two columns: its plan for TensorRT for RTX (compute capabilities 8.0, 8.6, 8.9, 12.0).",
        "",
        "| graph | parameters | GB | export, s | check, s | memory, GB | error | limit | plan | its memory, GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for name, graph in content["graphs"].items():
        plan = content["plans"][name]
        built = (
            f"{plan['seconds']:.0f} s, {plan['bytes'] / 1e9:.2f} GB" if "seconds" in plan else " ".join(plan.values())
        )
        memory = f"{plan['peak_bytes'] / 1e9:.1f}" if plan.get("peak_bytes") else ""
        worst = max(graph["checks"], key=lambda check: check["rms"] / check["limit"])
        lines.append(
            f"| {name} | {graph['parameters']:,} | {graph['bytes'] / 1e9:.2f} | {graph['seconds']:.0f} | "
            f"{graph['validation_seconds']:.0f} | {graph['peak_bytes'] / 1e9:.1f} | {worst['rms']:.1e} | "
            f"{worst['limit']:.0e} | {built} | {memory} |"
        )
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--precision", default="fp16", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="xl", show_default=True, help="sizes of the model")
@click.option("--scratch", type=click.Path(path_type=Path), help="where the disk has room  [default: the system's]")
def main(precision: str, out: Path, preset: str, scratch: Path | None) -> None:
    console = Console(stderr=True)
    said = ""

    def say(what: str, done: int, total: int) -> None:
        nonlocal said
        if what != said:
            said = what
            console.log(what)

    try:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="rehearsal-") as name:
            folder = Path(name)
            console.log(f"making a model of the sizes {preset}")
            make_model(PRESETS[preset], folder / "model")
            exported = export_bundle(
                str(folder / "model"), folder / "bundle", precision, ExportLimits(1, 4), rehearsal=True, on_progress=say
            )
            console.log("plans")
            plans = _plans(folder / "bundle", exported, folder)
    except InputError as error:
        raise click.UsageError(str(error)) from error
    entries = exported.manifest.graphs
    content = {
        "precision": precision,
        "command": f"python -m export.rehearse --precision {precision}",
        "date": date.today().isoformat(),
        "machine": _machine(),
        "versions": exported.manifest.versions,
        "parameters": sum(entry.parameters for entry in entries.values()),
        "graphs": {
            graph: {**result, "bytes": entries[graph].onnx.bytes + entries[graph].weights.bytes}
            for graph, result in exported.report["graphs"].items()
        },
        "plans": plans,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"rehearsal-{precision}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / f"rehearsal-{precision}.md").write_text(markdown(content), encoding="utf-8")
    click.echo(out / f"rehearsal-{precision}.md")


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB of memory, no GPU"


if __name__ == "__main__":
    main()
