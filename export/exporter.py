"""`mige-rt export`: from a checkpoint to a bundle."""

import errno
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from export.precision import TABLES, check_precision
from export.processes import WorkerFailedError, run_worker
from mige_rt.atomic import atomic_folder
from mige_rt.bundle import (
    DEFAULT_MODEL,
    MANIFEST,
    REPORT,
    SCHEMA,
    TOKENIZER_FILE,
    GraphEntry,
    Manifest,
    file_entry,
    is_bundle,
    read_config,
    read_source,
)
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, AxisRange, resolved_axes
from trainer.checkpoints.model_folder import convert

SCHEDULER = "dpm_solver_pp_2m"  # mige_rt.scheduler
SMALL = 200_000_000  # parameters up to which every shape is validated, and two graphs are exported at a time

WORKER = (sys.executable, "-m", "export.worker")

OnProgress = Callable[[str, int, int], None]  # what is being done, jobs done, jobs in all


@dataclass(frozen=True)
class ExportLimits:
    """What the graphs are made for. sizes: the smallest and the largest side in pixels; None: the trained size."""

    batch: int = 4  # pictures made at once
    references: int = 4  # pictures that a prompt refers to
    sizes: tuple[int, int] | None = None


@dataclass(frozen=True)
class ExportResult:
    """What was made: the manifest, and the report with the measurements, as in the bundle's report.json."""

    manifest: Manifest
    report: dict[str, Any]


def axis_ranges(config: ModelConfig, limits: ExportLimits) -> dict[str, AxisRange]:
    """The named axes' ranges. Raises InputError when the limits are not possible for this model."""
    low, high = limits.sizes or (config.size, config.size)
    if not 0 < low <= high or low % config.multiple or high % config.multiple:
        raise InputError(
            f"the sizes are {low} to {high}; multiples of {config.multiple} pixels are expected, the smaller first"
        )
    factor, trained = config.vae.factor, config.size // config.vae.factor
    h = AxisRange(low // factor, min(max(trained, low // factor), high // factor), high // factor)
    encoded = AxisRange(min(h.min, trained), trained, max(h.max, trained))
    pictures = limits.batch * limits.references
    if pictures > 63:
        raise InputError(
            f"{limits.batch} pictures at once with {limits.references} references each are {pictures} pictures; the "
            "VAE takes at most 63"
        )
    return {
        "N": AxisRange(1, 1, pictures),
        "M": AxisRange(1, 1, pictures),
        "B": AxisRange(1, 1, limits.batch),
        "R": AxisRange(1, 2, 3 * limits.batch),  # at most three guidance branches
        "L": AxisRange(1, min(config.max_tokens, 32 + config.qformer.queries), config.max_tokens),
        "h": h,
        "w": h,
        "eh": encoded,
        "ew": encoded,
    }


@contextmanager
def open_checkpoint(ckpt: str, vae: Path | None, tokenizer: Path | None, beside: Path) -> Iterator[Path]:
    """A model folder or a bundle: the shipped one for `tiny`, the given one, or one made for the time being, beside
    `beside`, of published weights, which are downloaded if ckpt is the name of a repository on the Hugging Face hub.

    Raises InputError when there is no such checkpoint.
    """
    path = Path(ckpt)
    if ckpt == "tiny" and not path.exists():
        yield DEFAULT_MODEL
    elif is_bundle(path) or _is_model_folder(path):
        yield path
    elif path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", ckpt):
        with tempfile.TemporaryDirectory(prefix=f"{beside.name}.converted-", dir=beside.absolute().parent) as scratch:
            convert(path, Path(scratch) / "model", vae, tokenizer)
            yield Path(scratch) / "model"
    else:
        with open_checkpoint(_download(ckpt), vae, tokenizer, beside) as folder:
            yield folder


def _is_model_folder(path: Path) -> bool:
    try:
        return "schema" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _download(name: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name)
    except Exception as error:  # the library's errors and those of the network have no common class
        raise InputError(
            f"{name} is no path here, and could not be downloaded from the Hugging Face hub ({error}); give tiny, the "
            "published model.pth or a folder with it, a model folder, a bundle, or the name of a repository"
        ) from error


def export_bundle(
    ckpt: str,
    out: Path,
    precision: str,
    limits: ExportLimits = ExportLimits(),
    vae: Path | None = None,
    tokenizer: Path | None = None,
    validate: bool = True,
    rehearsal: bool = False,
    on_progress: OnProgress | None = None,
) -> ExportResult:
    """Write the bundle `out`: six graphs in `precision`, each validated against PyTorch, tokenizer, manifest, report.

    ckpt: see `open_checkpoint`. rehearsal: treat the model as a large one whatever its size, and keep a graph that
    fails its validation.
    Raises InputError, with nothing left at `out`, when the input cannot be used, a graph fails its validation, or the
    disk is full; RuntimeError when a graph's process ends otherwise.
    """
    checked = check_precision(precision)
    with _disk_errors(out), atomic_folder(out) as folder, open_checkpoint(ckpt, vae, tokenizer, out) as model:
        config = read_config(model)
        ranges = axis_ranges(config, limits)
        jobs = _Jobs(model, folder, checked, ranges, validate, rehearsal, on_progress)
        (folder / "onnx").mkdir()
        (folder / TOKENIZER_FILE).parent.mkdir()
        shutil.copyfile(model / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        graphs = jobs.graphs()
        axes = resolved_axes(config)
        manifest = Manifest(
            schema=SCHEMA,
            model=config,
            source=read_source(model),
            precision=checked,
            validated=False,
            scheduler=SCHEDULER,
            ranges=ranges,
            graphs={
                graph: GraphEntry(
                    file_entry(folder, f"onnx/{graph}.onnx"),
                    file_entry(folder, f"onnx/{graph}.safetensors"),
                    axes[graph],
                    TABLES[checked][graph],
                    result["parameters"],
                )
                for graph, result in graphs.items()
            },
            tokenizer=file_entry(folder, TOKENIZER_FILE),
            versions={name: version(name) for name in ("mige-rt", "onnx", "onnxruntime", "onnxscript", "torch")},
        )
        _write(folder / MANIFEST, manifest.to_json())
        report: dict[str, Any] = {"graphs": graphs}
        if validate and jobs.small:
            report["pipeline"] = jobs.run("pipeline")
        _write(folder / REPORT, report)
        manifest = replace(manifest, validated=validate)
        _write(folder / MANIFEST, manifest.to_json())
    return ExportResult(manifest, report)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO):
            raise
        raise InputError(f"{out} cannot be written ({error}): make room on the disk, or give another path") from error


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _require_good(graph: str, checks: list[dict[str, Any]]) -> None:
    if bad := [check for check in checks if not check["ok"]]:
        worst = max(bad, key=lambda check: check["rms"] / check["limit"])
        sizes = ", ".join(f"{axis} {size}" for axis, size in worst["shape"].items())
        raise InputError(
            f"{graph} is not what PyTorch computes: {len(bad)} of {len(checks)} comparisons failed, the worst in "
            f"{worst['output']} at {sizes} with {worst['inputs']} inputs, a relative RMS error of {worst['rms']:.1e} "
            f"where {worst['limit']:.0e} is allowed. Nothing was written; --no-validate writes the bundle all the same"
        )


class _Jobs:
    """Runs `export.worker` once for each graph."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        precision: str,
        ranges: dict[str, AxisRange],
        validate: bool,
        rehearsal: bool,
        on_progress: OnProgress | None,
    ) -> None:
        self.model, self.folder, self.precision, self.ranges = model, folder, precision, ranges
        self.validate, self.rehearsal, self.on_progress = validate, rehearsal, on_progress
        stored = sum(path.stat().st_size for path in model.rglob("*.safetensors"))
        self.small = stored < 2 * SMALL and not rehearsal  # two bytes a parameter
        self.processes: list[subprocess.Popen[str]] = []
        self.done = 0

    def graphs(self) -> dict[str, dict[str, Any]]:
        """Export every graph; those of a small model two at a time. One that fails ends the others."""
        with ThreadPoolExecutor(2 if self.small else 1) as pool:
            futures = {pool.submit(self.run, graph): graph for graph in GRAPHS}
            try:
                results = {futures[future]: future.result() for future in as_completed(futures)}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self.processes:
                    process.kill()
                raise
        return {graph: results[graph] for graph in GRAPHS}

    def run(self, graph: str) -> dict[str, Any]:
        """The worker's result. Raises InputError with its sentence, RuntimeError when it ended without one."""
        job = {
            "graph": graph,
            "model": str(self.model.absolute()),
            "folder": str(self.folder),
            "precision": self.precision,
            "ranges": {axis: vars(span) for axis, span in self.ranges.items()},
            "validate": self.validate,
            "small": self.small,
        }
        try:
            result = run_worker(WORKER, job, lambda phase: self._tell(graph, phase), started=self.processes.append)
        except WorkerFailedError as error:
            if error.said:
                raise InputError(f"{graph}: {error}") from error
            why = str(error) or (
                "it was killed, most likely since memory ran out" if error.code == -9 else "it was ended"
            )
            raise RuntimeError(f"the export of {graph} ended with exit code {error.code}: {why}") from error
        if not self.rehearsal:
            _require_good(graph, result.get("checks", []))
        self.done += 1
        return result

    def _tell(self, graph: str, phase: str) -> None:
        if self.on_progress is not None:
            self.on_progress(f"{graph}: {phase}", self.done, len(GRAPHS) + 1)
