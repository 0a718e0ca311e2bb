"""One graph's export in a process of its own; see `export.processes`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.graphs import export_graph
from export.memory import peak_bytes
from export.processes import serve
from export.quantise import quantise
from export.validate import validate_graph, validate_pipeline
from mige_rt.errors import InputError
from mige_rt.graphs import AxisRange
from trainer.checkpoints.model_folder import empty_model, load_model


def work(job: dict[str, Any], on_phase: Callable[[str], None]) -> dict[str, Any]:
    """Do a job of `export.exporter`; returns what its report says of it."""
    started = time.monotonic()
    model, folder, precision = Path(job["model"]), Path(job["folder"]), job["precision"]
    if job["graph"] == "pipeline":
        on_phase("pictures")
        checks = validate_pipeline(model, folder, precision)
        return {"checks": [check.to_json() for check in checks], "seconds": round(time.monotonic() - started, 1)}
    graph, ranges = job["graph"], {axis: AxisRange(**sizes) for axis, sizes in job["ranges"].items()}
    onnx_path, weights_path = folder / f"onnx/{graph}.onnx", folder / f"onnx/{graph}.safetensors"
    on_phase("graph")
    opened = load_model(model, dtype=None, only=[graph])
    weights = getattr(opened, graph).state_dict()
    empty = getattr(empty_model(opened.config), graph)
    written = (opened.config, ranges, onnx_path, weights_path)
    parameters = export_graph(graph, empty, weights.__getitem__, precision, *written)
    if precision == "int8":
        on_phase("quantise")
        quantise(graph, onnx_path, weights_path)
    result: dict[str, Any] = {"parameters": parameters, "seconds": round(time.monotonic() - started, 1)}
    if job["validate"]:
        del opened, weights, empty
        checks = validate_graph(
            graph, model, onnx_path, precision, ranges, job["small"], lambda what: on_phase(f"check {what}")
        )
        result["checks"] = [check.to_json() for check in checks]
        result["validation_seconds"] = round(time.monotonic() - started - result["seconds"], 1)
    result["peak_bytes"] = peak_bytes()
    return result


if __name__ == "__main__":
    serve(work, (InputError,))
