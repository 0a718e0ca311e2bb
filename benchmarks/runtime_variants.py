"""Variants of ONNX Runtime's settings for CPUs, and what runs in the process of one.

Nothing here imports PyTorch: the memory of such a process is that of one that makes pictures.
"""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from engines.onnx_runtime import OnnxRuntimeEngine
from export.memory import peak_bytes
from mige_rt.bundle import TOKENIZER_FILE, read_manifest
from mige_rt.pipeline import MigePipeline
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams
from mige_rt.tokenizer import load_tokenizer

_LEVELS = {
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclass(frozen=True)
class Variant:
    """A session's options, all of them set, whatever the engine's own are; as they stand here, ONNX Runtime's defaults.

    threads: within a node; 0 is one a core, each bound to its own. arena: memory is kept between runs. pattern: it is
    laid out in advance for a shape that was seen. spinning: threads wait for work in a loop. int8: the quantised model.
    rows: rows side by side, with as many threads as the engine has for that.
    """

    threads: int = 0
    arena: bool = True
    pattern: bool = True
    optimisation: Literal["basic", "extended", "all"] = "all"
    spinning: bool = True
    int8: bool = False
    rows: bool = False

    def set_options(self, options: onnxruntime.SessionOptions) -> None:
        if not self.rows:
            options.intra_op_num_threads = self.threads
        options.enable_cpu_mem_arena = self.arena
        options.enable_mem_pattern = self.pattern
        options.graph_optimization_level = _LEVELS[self.optimisation]
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spinning)))


DEFAULTS = "defaults"
OURS = "rows side by side, neither arena nor pattern"  # what the engine sets
VARIANTS: dict[str, Variant] = {
    DEFAULTS: Variant(),
    "1 thread": Variant(threads=1),
    "2 threads": Variant(threads=2),
    "no arena": Variant(arena=False),
    "no memory pattern": Variant(pattern=False),
    "neither arena nor pattern": Variant(arena=False, pattern=False),
    "extended optimisation": Variant(optimisation="extended"),
    "basic optimisation": Variant(optimisation="basic"),
    "no spinning": Variant(spinning=False),
    "1 thread, neither arena nor pattern": Variant(threads=1, arena=False, pattern=False),
    "rows side by side": Variant(rows=True),
    OURS: Variant(rows=True, arena=False, pattern=False),
    "int8": Variant(int8=True),
    "int8, rows side by side": Variant(int8=True, rows=True),
    f"int8, {OURS}": Variant(int8=True, rows=True, arena=False, pattern=False),
    "int8, no spinning": Variant(int8=True, spinning=False),
    "int8, 1 thread": Variant(int8=True, threads=1),
}


_pipe: MigePipeline  # a process has one


def open_variant(bundle: Path, variant: Variant) -> None:
    """The start of a process."""
    global _pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    manifest = read_manifest(bundle)
    engine = OnnxRuntimeEngine(bundle, manifest, "cpu", variant.set_options, split_rows=variant.rows)
    _pipe = MigePipeline(manifest.model, load_tokenizer(bundle / TOKENIZER_FILE), engine)


def make_picture(request: ResolvedRequest, steps: int) -> tuple[float, NDArray[np.uint8], int | None]:
    """In a process: the seconds that a picture takes from words and pictures on, the picture, and the most memory. The
    scales are the published ones, as in `benchmarks.candidates.Case`."""
    pipe = MigePipeline(_pipe.config, _pipe.encoder.tokenize, _pipe.engine)  # one that remembers no prompt
    start = time.perf_counter()
    (picture,) = pipe.make([request], SamplingParams(steps=steps, guidance_scale=5.0, image_guidance_scale=1.0))
    return time.perf_counter() - start, np.asarray(picture), peak_bytes()
