"""The server's step scheduler: an image made among others beside the same made alone, and captured steps beside others.

The default model is used: what is asked here does not depend on its size.
"""

from typing import Any

import numpy as np

from benchmarks.gpu_stay.record import Record, Stay
from benchmarks.step_batching import compare, make_alone, make_among_others, sample_tasks
from mige_rt.pipeline import MigePipeline

PRECISIONS = ("fp32", "fp16", "bf16")
MAX_ERROR = 0.1  # relative RMS error of the final latents in bf16, whose steps round to 2e-3; a wrong entry has 1


def measure_serving(stay: Stay, record: Record) -> None:
    """By precision: the difference between made alone and made among others, and between captured and not."""
    for precision in PRECISIONS[: 1 if stay.rehearsal else None]:
        with record.entry(precision) as entry:
            entry.update(_compare(stay, precision))


def _compare(stay: Stay, precision: str) -> dict[str, Any]:
    options: dict[str, Any] = {"engine": "pytorch", "device": stay.device, "precision": precision}
    plain = MigePipeline.from_pretrained(**options, cuda_graphs=False)
    tasks = sample_tasks(plain.config.size, 2 if stay.rehearsal else 8)
    # One call for several images on the CPU of a rehearsal, too.
    uncaptured = [make_among_others(plain, tasks, order, False) for order in range(1 if stay.rehearsal else 3)]
    difference = compare(make_alone(plain, tasks), uncaptured)
    captured = MigePipeline.from_pretrained(**options, cuda_graphs=True)
    made = [make_among_others(captured, tasks, 0, False) for _ in range(2)]
    captured_difference = max(
        float(np.abs(among.latents[name] - latents).max())
        for among in made
        for name, latents in uncaptured[0].latents.items()
    )
    return {
        "latents": difference.latents,
        "pixels": difference.pixels,
        "same": difference.same,
        "images_a_call": difference.batch_size,
        "captured_largest_difference": captured_difference,
        "ok": difference.latents <= MAX_ERROR and captured_difference == 0,
    }
