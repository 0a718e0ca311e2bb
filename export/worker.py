"""One graph's export in a process of its own; see `export.processes`."""

import time

from export.calibrate import input_ranges
from export.context import ExportContext, ExportJob, ExportTarget
from export.graphs import export_graph
from export.memory import peak_bytes
from export.processes import OnPhase, serve
from export.quantise import quantise
from export.quantise_static import quantise_static
from export.results import GraphResult, PipelineResult
from export.validate import make_cases, validate_graph, validate_pipeline
from mige_rt.bundle import TOKENIZER_FILE
from mige_rt.config import QUANTISED
from mige_rt.errors import InputError
from mige_rt.graphs import GraphName
from mige_rt.tokenizer import load_tokenizer
from trainer.checkpoints.open_checkpoint import open_checkpoint
from trainer.checkpoints.weights import empty_model


def work(job: ExportJob, on_phase: OnPhase) -> GraphResult | PipelineResult:
    """Do a job of `export.exporter`. The checkpoint is opened here, once, for all that is done with it."""
    checkpoint = open_checkpoint(job.checkpoint)
    if job.graph is None:
        started = time.monotonic()
        on_phase("images")
        checks = validate_pipeline(checkpoint, job.bundle, job.precision)
        return PipelineResult(checks, round(time.monotonic() - started, 1))
    target = ExportTarget(checkpoint.config, job.precision, job.ranges, job.bundle / "onnx")
    context = ExportContext(checkpoint, load_tokenizer(job.bundle / TOKENIZER_FILE), target, job.small)
    return _export(context, job.graph, job.validate, on_phase)


def _export(context: ExportContext, graph: GraphName, validate: bool, on_phase: OnPhase) -> GraphResult:
    started = time.monotonic()
    # First, since it takes the weights of other graphs, whose memory is given back before this one's are read.
    on_phase("check real inputs" if validate else "graph")
    cases = make_cases(context, graph) if validate else []
    cases_made = time.monotonic()
    on_phase("graph")
    weights = context.module(graph).state_dict()
    parameters = export_graph(graph, empty_model(context.config).graph(graph), weights.__getitem__, context.target)
    context.checkpoint.release_pages()
    if context.target.precision == "int8":
        on_phase("quantise")
        quantise(graph, context.target)
    elif context.target.precision in QUANTISED and graph == "denoiser":
        ranges = input_ranges(context.checkpoint, context.tokenize, lambda call: on_phase(f"calibrate, call {call}"))
        on_phase("quantise")
        quantise_static(context.target, ranges)
    exported = time.monotonic()
    seconds = round(exported - cases_made, 1)
    if not validate:
        return GraphResult(parameters, seconds, peak_bytes())
    del weights
    checks = validate_graph(context, graph, cases, lambda what: on_phase(f"check {what}"))
    validation_seconds = round(time.monotonic() - started - seconds, 1)
    return GraphResult(parameters, seconds, peak_bytes(), checks, validation_seconds)


if __name__ == "__main__":
    serve(work, ExportJob, (InputError,))
