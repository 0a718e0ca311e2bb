"""The work of an image, counted exactly: `python -m benchmarks.work [--model xl] [--task edit] [--references 1]`.

Per graph, the floating-point operations and the least bytes of three variants (see `benchmarks.schedule`; what counts:
`benchmarks.meter`). With --write, the counts that `pytest benchmarks` compares with are written anew.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import click

from benchmarks.baseline import AsPublished, CountingEngine
from benchmarks.case import VARIANT_TITLES, Variant
from benchmarks.formatting import markdown_table
from benchmarks.meter import flops, least_bytes
from benchmarks.schedule import WorkOptions, prompt_tokens, schedule
from export.inputs import sample_requests
from export.precision import check_precision
from mige_rt.atomic import atomic_file
from mige_rt.bundle import read_config
from mige_rt.config import PRESETS, ModelConfig, Precision
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, GraphName
from mige_rt.image_size import parse_size
from mige_rt.instruction import Task
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams

VARIANTS: tuple[Variant, ...] = get_args(Variant)
TASKS: tuple[Task, ...] = get_args(Task)
RESULTS = Path(__file__).parent / "results"
WRITE = "python -m benchmarks.work --write"
COUNTED_MODELS = ("tiny", "xl")
REFERENCES: dict[Task, int] = {"subject": 1, "edit": 1, "compose": 2}  # images a prompt usually refers to
USUAL = {task: WorkOptions(task=task, references=number) for task, number in REFERENCES.items()}
EDIT = USUAL["edit"]
CALL_STEPS = 4  # of the images whose engine calls are counted


@dataclass(frozen=True)
class GraphWork:
    """All calls of one graph together: floating-point operations, and least bytes."""

    graph: GraphName
    calls: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """One variant's work: one GraphWork for each of the six graphs, in the order of GRAPHS."""

    variant: Variant
    graphs: tuple[GraphWork, ...]
    flops: int
    bytes: int

    def of(self, graph: GraphName) -> GraphWork:
        return next(work for work in self.graphs if work.graph == graph)

    def to_json(self) -> dict[str, Any]:
        graphs = {work.graph: {"calls": work.calls, "flops": work.flops, "bytes": work.bytes} for work in self.graphs}
        return {"flops": self.flops, "bytes": self.bytes, "graphs": graphs}


def count(config: ModelConfig, variant: Variant, options: WorkOptions = EDIT) -> Work:
    """The work of a batch of images. Raises InputError when the options do not fit the model or the variant."""
    check_precision(options.precision)
    graphs = []
    calls = schedule(config, variant, options)
    for graph in GRAPHS:
        of_graph = [call for call in calls if call.graph == graph]
        operations = sum(call.times * flops(config, graph, call.sizes) for call in of_graph)
        moved = sum(call.times * least_bytes(config, graph, call.sizes, options.precision) for call in of_graph)
        graphs.append(GraphWork(graph, sum(call.times for call in of_graph), operations, moved))
    return Work(variant, tuple(graphs), sum(work.flops for work in graphs), sum(work.bytes for work in graphs))


def count_variants(config: ModelConfig, options: WorkOptions) -> dict[Variant, Work]:
    return {variant: count(config, variant, options) for variant in VARIANTS}


def roofline_seconds(work: Work, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
    """Per graph, the seconds that a machine of these peaks needs at least: the larger of computing and moving."""
    return {w.graph: max(w.flops / flops_per_second, w.bytes / bytes_per_second) for w in work.graphs}


def engine_calls(task: Task, variant: Variant, steps: int = CALL_STEPS) -> dict[str, int]:
    """How often the default model's engine, PyTorch on the CPU, runs each graph for the first sample of a task."""
    request = next(request for request in sample_requests() if request.task == task)
    pipe = MigePipeline.from_pretrained(engine="pytorch", device="cpu")
    counting = CountingEngine(pipe.engine)
    ours = MigePipeline(pipe.config, pipe.condition_encoder.tokenize, counting)
    runner = ours if variant == "ours" else AsPublished(ours, encode_once=variant == "encode_once")
    runner.generate([request], SamplingParams(num_inference_steps=steps))
    return {graph: counting.calls[graph] for graph in GRAPHS}


def regressions() -> dict[str, Any]:
    """The content of results/work.json: what `pytest benchmarks` expects."""
    counts: dict[str, dict[str, Any]] = {model: {} for model in COUNTED_MODELS}
    for model, task in product(COUNTED_MODELS, TASKS):
        for variant, work in count_variants(PRESETS[model], USUAL[task]).items():
            counts[model][f"{task}, {variant}"] = work.to_json()
    calls = {f"{task}, {variant}": engine_calls(task, variant) for task, variant in product(TASKS, VARIANTS)}
    return {"command": WRITE, "counts": counts, "engine_calls": calls}


def work_rows(works: Mapping[Variant, Work]) -> tuple[list[str], list[list[str]]]:
    """The headers, a row for each graph, and one of totals.

    Ratio: how many times the operations of ours the published variant needs.
    """
    published, once, ours = works["published"], works["encode_once"], works["ours"]
    saved = published.flops - ours.flops
    large = published.flops > 1e12
    flop, byte = (1e12, 1e9) if large else (1e9, 1e6)
    flops_unit, bytes_unit = ("TFLOP", "GB") if large else ("GFLOP", "MB")

    def numbers(work: Work | GraphWork) -> list[str]:
        return [f"{work.flops / flop:.4g}", f"{work.bytes / byte:.4g}"]

    def compared(old: int, new: int) -> list[str]:
        return [f"{old / new:.2f}" if new else "", f"{(old - new) / saved:.1%}" if saved else ""]

    headers = ["graph", "as published: calls", flops_unit, bytes_unit, f"encode once: {flops_unit}"]
    headers += ["ours: calls", flops_unit, bytes_unit, "ratio", "of the saving"]
    rows = []
    for graph in GRAPHS:
        old, every_branch, new = published.of(graph), once.of(graph), ours.of(graph)
        cells = [graph, str(old.calls), *numbers(old), numbers(every_branch)[0], str(new.calls), *numbers(new)]
        rows.append([*cells, *compared(old.flops, new.flops)])
    cells = ["total", "", *numbers(published), numbers(once)[0], "", *numbers(ours)]
    return headers, [*rows, [*cells, *compared(published.flops, ours.flops)]]


def full_size() -> str:
    """The content of results/work.md: the published sizes, at the published defaults of every task."""
    config = PRESETS["xl"]
    works = {task: count_variants(config, USUAL[task]) for task in TASKS}
    described = {
        task: f"{getattr(config.defaults, task).num_inference_steps} steps, prompts of "
        f"{prompt_tokens(config, task, number)} tokens that refer to {number} image{'s' * (number > 1)}"
        for task, number in REFERENCES.items()
    }
    totals = [
        [
            f"{task}: {described[task]}",
            *(f"{of_task[variant].flops / 1e12:.4g}" for variant in VARIANTS),
            f"{of_task['published'].flops / of_task['ours'].flops:.2f}",
        ]
        for task, of_task in works.items()
    ]
    return f"""# The work of an image at full size

Counted on the meta device, nothing measured; written by `{WRITE}`. Published sizes, {config.size} pixels, fp16, the
published defaults of each task. A multiply-add is two operations; bytes are the least, each graph's weights, inputs and
outputs once a call. `benchmarks/schedule.py` says what the variants are.

## Editing: {described["edit"]}

{markdown_table(*work_rows(works["edit"]))}

## The three tasks, TFLOP in all

{markdown_table(["task", *VARIANT_TITLES.values(), "ratio"], totals)}
"""


def changes(expected: Any, counted: Any, where: str = "") -> list[str]:
    """Where two such contents differ, one line a number."""
    if isinstance(expected, dict) and isinstance(counted, dict):
        keys = dict.fromkeys([*expected, *counted])
        deeper = (changes(expected.get(key), counted.get(key), f"{where} / {key}" if where else key) for key in keys)
        return [line for lines in deeper for line in lines]
    return [] if expected == counted else [f"{where}: {counted} instead of {expected}"]


def write_results(folder: Path = RESULTS) -> list[Path]:
    """work.json and work.md, each whole or not at all. Raises InputError when they cannot be written."""
    contents = {"work.json": json.dumps(regressions(), indent=1) + "\n", "work.md": full_size()}
    for name, content in contents.items():
        try:
            with atomic_file(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error}); run this in a checkout of your own") from error
    return [folder / name for name in contents]


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="xl", show_default=True, help=f"{', '.join(PRESETS)}, or a model folder or bundle")
@click.option("--task", type=click.Choice(TASKS), default="edit", show_default=True)
@click.option("--references", type=int, help="images each prompt refers to  [default: 1; compose 2]")
@click.option("--tokens", type=int, help="of each prompt  [default: those of a sample prompt]")
@click.option("--num-inference-steps", "--steps", type=int, help="[default: the model's for the task]")
@click.option("--batch", type=int, default=1, show_default=True, help="images made at once")
@click.option("--size", metavar="N|WxH", help="of the image  [default: the trained one]")
@click.option("--precision", type=click.Choice(get_args(Precision)), default="fp16", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="the counts as JSON")
@click.option("--write", is_flag=True, help="write benchmarks/results/work.json and work.md anew, and nothing else")
def main(model: str, size: str | None, as_json: bool, write: bool, **given: Any) -> None:
    try:
        if write:
            click.echo("\n".join(map(str, write_results())))
            return
        config = PRESETS.get(model) or read_config(Path(model))
        if given["references"] is None:
            given["references"] = REFERENCES[given["task"]]
        works = count_variants(config, WorkOptions(**given, size=parse_size(size) if size else None))
    except InputError as error:
        raise click.UsageError(str(error)) from error
    as_data = json.dumps({variant: work.to_json() for variant, work in works.items()}, indent=1)
    click.echo(
        as_data
        if as_json
        else f"{config.name}, {given['task']}, {given['precision']}\n\n{markdown_table(*work_rows(works))}"
    )


if __name__ == "__main__":
    main()
