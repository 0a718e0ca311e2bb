"""Benchmarks, each read from the layout in which its authors publish it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.evaluation.layouts.dreambench import open_dreambench
from benchmarks.evaluation.layouts.emu_edit import open_emu_edit
from benchmarks.evaluation.layouts.magicbrush import open_magicbrush
from benchmarks.evaluation.layouts.migebench import open_migebench
from benchmarks.evaluation.layouts.synthetic import open_synthetic
from benchmarks.evaluation.sample import Benchmark, check_files
from mige_rt.errors import InputError

LAYOUTS: Mapping[str, Callable[[Path], Benchmark]] = {
    "dreambench": open_dreambench,
    "emu-edit": open_emu_edit,
    "magicbrush": open_magicbrush,
    "migebench": open_migebench,
    "synthetic": open_synthetic,
}


def open_benchmark(spec: str) -> Benchmark:
    """Open a benchmark, and check that all of its files are there.

    Args:
        spec: `LAYOUT:FOLDER`.

    Raises:
        InputError: There is no such layout or folder, or the folder is not in that layout; missing files are listed.
    """
    layout, colon, name = spec.partition(":")
    if not colon or not name or layout not in LAYOUTS:
        raise InputError(
            f"--benchmark is {spec!r}; give a layout and the folder, as dreambench:FOLDER; layouts are "
            + ", ".join(LAYOUTS)
        )
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the one that the benchmark was downloaded to")
    benchmark = LAYOUTS[layout](folder)
    if not benchmark.samples:
        raise InputError(f"{folder} holds no sample of {benchmark.title}; download it again")
    check_files(benchmark.samples, folder)
    return benchmark
