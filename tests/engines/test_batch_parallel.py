"""A batch in parts on the CPU: what is computed is what one run computes."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engines.batch_parallel import batch_size, parts_of, usable_cores
from engines.interface import to_numpy
from engines.onnx_runtime import OnnxRuntimeEngine
from export.inputs import random_feed
from mige_rt.bundle import DEFAULT_MODEL, read_manifest
from mige_rt.errors import InputError

MANIFEST = read_manifest(DEFAULT_MODEL)
SIDE = MANIFEST.model.size // MANIFEST.model.vae.factor


def _engine(cores: int) -> OnnxRuntimeEngine:
    engine = OnnxRuntimeEngine(DEFAULT_MODEL, MANIFEST, "cpu")
    engine.cores, engine.pool = cores, ThreadPoolExecutor(cores)
    return engine


@pytest.mark.parametrize(("batch", "parts"), [(1, 1), (2, 2), (3, 1), (4, 2), (5, 2), (8, 2)])
def test_a_batch_is_run_in_parts_where_few_cores_idle(batch: int, parts: int) -> None:
    assert parts_of(batch, 2) == parts
    assert parts_of(batch, 1) == 1
    assert parts_of(batch, 64) == 1


@pytest.mark.parametrize("batch", [2, 3, 4, 5])
def test_parts_give_what_one_run_gives(batch: int) -> None:
    sizes = {"R": batch, "L": 9, "h": SIDE, "w": SIDE}
    alone, together = _engine(1), _engine(2)
    for graph in ("conditioner", "denoiser"):
        feed = random_feed(graph, MANIFEST.model, sizes)
        assert batch_size(graph, feed) == batch
        for name, values in alone.run(graph, feed).items():
            np.testing.assert_allclose(
                to_numpy(together.run(graph, feed)[name]), to_numpy(values), rtol=1e-4, atol=1e-5
            )
        assert (graph, 1) in alone.sessions
        assert (graph, 1 if parts_of(batch, 2) == 2 else 2) in together.sessions


def test_graphs_without_such_a_batch_are_run_at_once() -> None:
    engine = _engine(2)
    engine.run("vae_encoder", random_feed("vae_encoder", MANIFEST.model, {"M": 2, "eh": SIDE, "ew": SIDE}))
    assert set(engine.sessions) == {("vae_encoder", 2)}


def test_a_part_that_cannot_be_run_is_said() -> None:
    feed = random_feed("denoiser", MANIFEST.model, {"R": 2, "L": 9, "h": SIDE, "w": SIDE})
    with pytest.raises(InputError, match="ONNX Runtime could not run denoiser"):
        _engine(2).run("denoiser", {**feed, "text_mask": feed["text_mask"][:, :5]})


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes to processors")
def test_a_process_bound_to_one_processor_has_one_core() -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= usable_cores() <= len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
        assert not OnnxRuntimeEngine(DEFAULT_MODEL, MANIFEST, "cpu").split_batch
    finally:
        os.sched_setaffinity(0, allowed)
