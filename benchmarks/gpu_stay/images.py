"""Full-size images with made-up weights: by CUDA graph, with and without low memory, and as published beside ours."""

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.baseline import AsPublished
from benchmarks.gpu_stay.card import memory, synchronize
from benchmarks.gpu_stay.record import Record, Stay
from benchmarks.measure import InterleavedRuns, Latency
from benchmarks.worker import GraphTracer
from engines.wrapper import HookedEngine
from export.inputs import sample_requests
from export.made_up import make_model
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams

IMAGES = 3  # of each kind: the first captures, the others replay
ROUNDS = 3  # of the variants in turn


def measure_image(stay: Stay, record: Record) -> None:
    """An edit, by CUDA graph and without, with and without low memory."""
    for low_memory in (False, True):
        for cuda_graphs in (low_memory,) if stay.rehearsal else (True, False):
            name = f"{'low memory' if low_memory else 'plain'}, {'captured' if cuda_graphs else 'uncaptured'}"
            with record.entry(name) as entry:
                gc.collect()  # the pipeline before, whose parts refer to each other
                if stay.cuda:
                    torch.cuda.empty_cache()
                memory(stay.device, reset=True)
                started = time.perf_counter()
                pipe = _open(stay, low_memory=low_memory, cuda_graphs=cuda_graphs)
                entry["opening_seconds"] = time.perf_counter() - started
                entry["seconds"] = [_seconds(stay, pipe) for _ in range(1 if stay.rehearsal else IMAGES)]
                entry.update(memory(stay.device))
                if not cuda_graphs:
                    entry["graphs"] = _graphs(stay, pipe)
                del pipe


def measure_published(stay: Stay, record: Record) -> None:
    """The variants as published, encoding once, and ours, in turn."""
    pipe: Any = None
    with record.entry("opening"):
        pipe = _open(stay)
    if pipe is None:
        return
    variants = {
        "as published": AsPublished(pipe),
        "encode once": AsPublished(pipe, encode_once=True),
        "ours": pipe,
    }
    timed: dict[str, Callable[[], float]] = {name: partial(_seconds, stay, v) for name, v in variants.items()}
    runs = InterleavedRuns(timed, (Exception,))
    for number in range(0 if stay.rehearsal else -1, 1 if stay.rehearsal else ROUNDS):
        runs.run(iterations=int(number >= 0), warmup=int(number < 0))
        with record.entry(f"round {number}" if number >= 0 else "warm-up") as entry:
            entry.update({"seconds": {name: list(values) for name, values in runs.seconds.items()}, **runs.failed})
            entry["ok"] = not runs.failed
    with record.entry("medians") as entry:
        medians = {name: Latency.of(values).median for name, values in runs.seconds.items()}
        entry.update({"seconds": medians, "times_as_fast": medians["as published"] / medians["ours"]})


def _open(stay: Stay, **options: Any) -> MigePipeline:
    """The model of made-up weights, which is written once for all parts."""
    folder = stay.out / "model"
    if not folder.exists():
        make_model(stay.config, folder, stay.device)
    precision = "bf16" if stay.cuda else "fp32"
    return MigePipeline.from_pretrained(folder, engine="pytorch", device=stay.device, precision=precision, **options)


def _request() -> ResolvedRequest:
    return next(request for request in sample_requests() if request.task == "edit")


def _seconds(stay: Stay, variant: MigePipeline | AsPublished) -> float:
    """Of one image from its prompt on, nothing of which is remembered."""
    pipe = variant if isinstance(variant, MigePipeline) else variant.pipe
    pipe.condition_encoder.clear_cache()
    synchronize(stay.device)
    started = time.perf_counter()
    (image,) = variant.generate([_request()], SamplingParams(num_inference_steps=stay.num_inference_steps))
    took = time.perf_counter() - started
    assert np.asarray(image).std() > 0, "the image is of one colour"
    return took


def _graphs(stay: Stay, pipe: MigePipeline) -> dict[str, Any]:
    """Calls and seconds of each graph, the device synchronised around every call."""
    tracer = GraphTracer(lambda: synchronize(stay.device))
    traced = MigePipeline(
        pipe.config,
        pipe.condition_encoder.tokenize,
        HookedEngine(pipe.engine, tracer),
        low_memory=pipe.runner.low_memory,
    )
    traced.generate([_request()], SamplingParams(num_inference_steps=stay.num_inference_steps))
    return {graph: {"calls": calls, "seconds": seconds} for graph, (calls, seconds) in tracer.graphs.items()}
