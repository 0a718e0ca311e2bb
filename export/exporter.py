"""`mige-rt export`: from a checkpoint to a bundle."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from export.context import ExportJob
from export.precision import TABLES, check_precision
from export.processes import WorkerFailedError, WorkerHooks, run_worker
from export.results import Check, GraphResult, PipelineResult, worst_check
from mige_rt.atomic import atomic_folder
from mige_rt.bundle import (
    DEFAULT_MODEL,
    MANIFEST,
    REPORT,
    SCHEMA,
    TOKENIZER_FILE,
    GraphEntry,
    Manifest,
    MergedLora,
    file_entry,
    onnx_path,
    weights_path,
)
from mige_rt.config import ModelConfig, Precision
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, AxisRange, GraphName, resolved_axes
from mige_rt.hub import local_folder
from mige_rt.known_files import remember, sha256
from mige_rt.lora import Lora
from trainer.checkpoints.open_checkpoint import CheckpointLocation, open_checkpoint

SCHEDULER = "dpm_solver_pp_2m"  # mige_rt.scheduler
SMALL = 300_000_000  # parameters up to which every shape is validated, and two graphs are exported at a time

WORKER = (sys.executable, "-P", "-m", "export.worker")  # -P: the working folder, a bundle perhaps, has no code of ours

OnProgress = Callable[[str, int, int], None]  # what is being done, jobs done, jobs in all
Result = TypeVar("Result", GraphResult, PipelineResult)


@dataclass(frozen=True)
class ExportLimits:
    """What the graphs are made for.

    Attributes:
        batch: images made at once.
        references: images that a prompt refers to.
        sizes: the smallest and the largest side in pixels; None: the trained size.
    """

    batch: int = 4
    references: int = 4
    sizes: tuple[int, int] | None = None


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        vae: the folder of a published checkpoint's VAE, by default `sd-vae-ft-ema` beside it.
        tokenizer: the folder of T5's tokenizer, by default `t5-v1_1-xxl` beside a published checkpoint.
        config: the sizes of a checkpoint in the published layout that has none of the published ones.
        validate: compare every graph with PyTorch.
        bf16_text_encoder: with the precision fp16, T5 in bfloat16: half the memory of its plan, and not for ONNX
            Runtime's CPU.
        loras: what is merged into the weights first.
        rehearsal: treat the model as a large one whatever its size, and keep a graph that fails its validation.
    """

    vae: Path | None = None
    tokenizer: Path | None = None
    config: ModelConfig | None = None
    validate: bool = True
    bf16_text_encoder: bool = False
    loras: tuple[Lora, ...] = ()
    rehearsal: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What was made.

    Attributes:
        manifest: the bundle's.
        graphs: what the export and the validation of each graph gave.
        pipeline: the validation of the whole; None: a large model, or not validated.
    """

    manifest: Manifest
    graphs: Mapping[GraphName, GraphResult]
    pipeline: PipelineResult | None

    def report(self) -> dict[str, Any]:
        """What the bundle's report.json holds."""
        content: dict[str, Any] = {"graphs": {graph: _as_json(result) for graph, result in self.graphs.items()}}
        return content if self.pipeline is None else content | {"pipeline": _as_json(self.pipeline)}


def _as_json(result: GraphResult | PipelineResult) -> dict[str, Any]:
    content = asdict(result)
    return {key: content[key] for key in content if content[key] is not None or key == "peak_bytes"}


def axis_ranges(config: ModelConfig, limits: ExportLimits) -> dict[str, AxisRange]:
    """The named axes' ranges.

    Raises:
        InputError: the limits are not possible for this model.
    """
    low, high = limits.sizes or (config.size, config.size)
    if not 0 < low <= high or low % config.multiple or high % config.multiple:
        raise InputError(
            f"the sizes are {low} to {high}; multiples of {config.multiple} pixels are expected, the smaller first"
        )
    factor, trained = config.vae.factor, config.size // config.vae.factor
    h = AxisRange(low // factor, min(max(trained, low // factor), high // factor), high // factor)
    encoded = AxisRange(min(h.min, trained), trained, max(h.max, trained))
    images = limits.batch * limits.references
    if images > 63:
        raise InputError(
            f"{limits.batch} images at once with {limits.references} references each are {images} images; the VAE "
            "takes at most 63"
        )
    return {
        "N": AxisRange(1, 1, images),
        "M": AxisRange(1, 1, images),
        "B": AxisRange(1, 1, limits.batch),
        "R": AxisRange(1, 2, 3 * limits.batch),  # at most three guidance branches
        "L": AxisRange(1, min(config.max_tokens, 32 + config.qformer.queries), config.max_tokens),
        "h": h,
        "w": h,
        "eh": encoded,
        "ew": encoded,
    }


def graph_precisions(precision: Precision, options: ExportOptions) -> dict[GraphName, Precision]:
    """What each graph computes in.

    Raises:
        InputError: T5 is to be bfloat16 beside another precision than fp16.
    """
    if options.bf16_text_encoder and precision != "fp16":
        raise InputError(f"T5 in bfloat16 goes with the precision fp16, and {precision} was given")
    precisions: dict[GraphName, Precision] = dict.fromkeys(GRAPHS, precision)
    if options.bf16_text_encoder:
        precisions["text_encoder"] = "bf16"
    return precisions


def locate_checkpoint(ckpt: str, options: ExportOptions = ExportOptions()) -> CheckpointLocation:
    """Find the weights, and download them if they are on the Hugging Face hub.

    Args:
        ckpt: `tiny` for the shipped bundle, a path, or the name of a repository on the hub.
        options: the VAE's and the tokenizer's paths, the sizes and the LoRAs, where they are given.

    Raises:
        InputError: the repository cannot be downloaded. A path is not checked here.
    """
    path = DEFAULT_MODEL if ckpt == "tiny" and not Path(ckpt).exists() else local_folder(ckpt)
    return CheckpointLocation(path.absolute(), options.vae, options.tokenizer, options.config, options.loras)


def export_bundle(
    ckpt: str,
    out: Path,
    precision: str = "fp32",
    limits: ExportLimits = ExportLimits(),
    *,
    options: ExportOptions = ExportOptions(),
    on_progress: OnProgress | None = None,
) -> ExportResult:
    """Write the bundle `out`: six graphs, each validated against PyTorch, tokenizer, manifest, and report.

    Published weights are read where they are; no copy of them is written but the bundle's own.

    Args:
        ckpt: `tiny`, a model folder, a bundle, the published model.pth or a folder with it, or a repository on the
            Hugging Face hub.
        out: the folder to make.
        precision: fp32, fp16, bf16, int8, fp8 or int8-sq.
        limits: what the graphs are made for.
        options: how they are exported.
        on_progress: gets what is being done, how many jobs are done, and how many there are.

    Raises:
        InputError: the input cannot be used, a graph fails its validation, or the disk is full. Nothing is left at
            `out`.
        RuntimeError: a graph's process ends otherwise.
    """
    checked = check_precision(precision)
    precisions = graph_precisions(checked, options)
    with _disk_errors(out), atomic_folder(out) as folder:
        location = locate_checkpoint(ckpt, options)
        checkpoint = open_checkpoint(location)
        config = checkpoint.config
        ranges = axis_ranges(config, limits)
        small = checkpoint.stored_bytes < 2 * SMALL and not options.rehearsal  # two bytes a parameter
        (folder / "onnx").mkdir()
        (folder / TOKENIZER_FILE).parent.mkdir()
        checkpoint.save_tokenizer(folder / TOKENIZER_FILE)
        source = checkpoint.source
        del checkpoint  # whose memory the workers may need
        job = ExportJob(None, location, folder, checked, ranges, options.validate, small)
        jobs = _Jobs(job, accept_failures=options.rehearsal, on_progress=on_progress)
        graphs = jobs.run_graphs(precisions)
        axes = resolved_axes(config)
        manifest = Manifest(
            schema=SCHEMA,
            model=config,
            source=source,
            precision=checked,
            validated=False,
            scheduler=SCHEDULER,
            ranges=ranges,
            graphs={
                graph: GraphEntry(
                    file_entry(folder, onnx_path(graph)),
                    file_entry(folder, weights_path(graph)),
                    axes[graph],
                    TABLES[precisions[graph]][graph],
                    result.parameters,
                )
                for graph, result in graphs.items()
            },
            tokenizer=file_entry(folder, TOKENIZER_FILE),
            versions={name: version(name) for name in ("mige-rt", "onnx", "onnxruntime", "onnxscript", "torch")},
            loras=tuple(MergedLora(lora.path.absolute().name, sha256(lora.file), lora.scale) for lora in options.loras)
            or None,
        )
        _write(folder / MANIFEST, manifest.to_json())  # which the pipeline's engine reads
        pipeline = jobs.run_pipeline() if options.validate and small else None
        result = ExportResult(replace(manifest, validated=options.validate), graphs, pipeline)
        _write(folder / REPORT, result.report())
        _write(folder / MANIFEST, result.manifest.to_json())
    remember(out / MANIFEST)
    return result


@contextmanager
def _disk_errors(out: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO):
            raise
        raise InputError(f"{out} cannot be written ({error}): make room on the disk, or give another path") from error


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _require_good(graph: str, checks: list[Check]) -> None:
    if failed := [check for check in checks if not check.ok]:
        worst = worst_check(failed)
        sizes = ", ".join(f"{axis} {size}" for axis, size in worst.shape.items())
        raise InputError(
            f"{graph} is not what PyTorch computes: {len(failed)} of {len(checks)} comparisons failed, the worst in "
            f"{worst.output} at {sizes} with {worst.inputs} inputs, a relative RMS error of {worst.rms:.1e} "
            f"where {worst.limit:.0e} is allowed. Nothing was written; --no-validate writes the bundle all the same"
        )


class _Jobs:
    """Runs `export.worker` once for each graph."""

    def __init__(self, job: ExportJob, *, accept_failures: bool, on_progress: OnProgress | None) -> None:
        self.job, self.accept_failures, self.on_progress = job, accept_failures, on_progress
        self.processes: list[subprocess.Popen[str]] = []
        self.stopped = False
        self.done = 0

    def run_graphs(self, precisions: Mapping[GraphName, Precision]) -> dict[GraphName, GraphResult]:
        """Export every graph; those of a small model two at a time. One that fails ends the others."""
        with ThreadPoolExecutor(2 if self.job.small else 1) as pool:
            futures = {
                pool.submit(
                    self._run, graph, replace(self.job, graph=graph, precision=precisions[graph]), GraphResult
                ): graph
                for graph in GRAPHS
            }
            try:
                results = {futures[future]: future.result() for future in as_completed(futures)}
            except BaseException:
                self.stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self.processes:
                    process.kill()
                raise
        return {graph: results[graph] for graph in GRAPHS}

    def run_pipeline(self) -> PipelineResult:
        """Validate the six graphs together."""
        return self._run("pipeline", self.job, PipelineResult)

    def _run(self, name: str, job: ExportJob, result_type: type[Result]) -> Result:
        """The worker's result. Raises InputError with its sentence, RuntimeError when it ended without one."""
        hooks = WorkerHooks(on_phase=lambda phase: self._report(name, phase), on_start=self._on_start)
        try:
            result = run_worker(WORKER, job, result_type, hooks)
        except WorkerFailedError as error:
            if error.explained:
                raise InputError(f"{name}: {error}") from error
            reason = str(error) or (
                "it was killed, most likely since memory ran out" if error.code == -9 else "it was ended"
            )
            raise RuntimeError(f"the export of {name} ended with exit code {error.code}: {reason}") from error
        if not self.accept_failures:
            _require_good(name, result.checks or [])
        self.done += 1
        return result

    def _on_start(self, process: subprocess.Popen[str]) -> None:
        self.processes.append(process)
        if self.stopped:  # a thread took the next graph before the one that failed could stop it
            process.kill()

    def _report(self, name: str, phase: str) -> None:
        if self.on_progress is not None:
            self.on_progress(f"{name}: {phase}", self.done, len(GRAPHS) + 1)
