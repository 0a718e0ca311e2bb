"""Plans of single graphs without a bundle, for tests of what the builder makes of them."""

from dataclasses import replace
from pathlib import Path

from export.build_plans import PLAN_OPTIONS, profile
from export.context import ExportTarget
from export.exporter import ExportLimits, axis_ranges
from export.graphs import export_graph
from export.made_up import made_up, make_block
from export.plan_job import Kernel, PlanJob
from export.plan_worker import work
from mige_rt.bundle import DEFAULT_MODEL, read_manifest
from mige_rt.config import ModelConfig
from mige_rt.graphs import GraphName, resolved_axes
from trainer.checkpoints.weights import empty_model

LIMITS = ExportLimits(1, 2)


def export_made_up(config: ModelConfig, graph: GraphName, folder: Path) -> ExportTarget:
    """A graph's files in fp16, with made-up weights."""
    target = ExportTarget(config, "fp16", axis_ranges(config, LIMITS), folder)
    module, block = empty_model(config).graph(graph), make_block()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    export_graph(graph, module, lambda name: made_up(name, shapes[name], block), target)
    return target


def kernels_of(target: ExportTarget, graph: GraphName, *capabilities: str) -> list[Kernel]:
    """The kernels of a graph's plan for GPUs that need not be here."""
    manifest = read_manifest(DEFAULT_MODEL)
    entry = replace(manifest.graphs[graph], axes=resolved_axes(target.config)[graph])
    manifest = replace(manifest, ranges=target.ranges, graphs={graph: entry})
    job = PlanJob(
        engine="tensorrt-rtx",
        graph=graph,
        onnx=target.onnx_path(graph),
        plan=target.folder / f"{graph}.plan",
        profile=profile(manifest, graph),
        capabilities=capabilities,
        workspace=None,
        gpu=None,
        timing_cache=target.folder / "timing.cache",
        options=PLAN_OPTIONS,
        list_kernels=True,
    )
    built = work(job, lambda phase: None)
    assert built.kernels and job.plan.stat().st_size > 0
    return built.kernels
