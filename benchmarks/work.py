"""The work of a picture, counted exactly: `python -m benchmarks.work [--model xl] [--task edit] [--references 1]`.

Per graph, the floating-point operations and the least bytes of the program as published, of one that encodes once but
computes every guidance branch, and of ours (`benchmarks.variants` says what each runs how often; `benchmarks.meter`
what an operation and a byte is: matrix products, convolutions and attention, a multiply-add as two; weights, inputs
and outputs once a call). With --write, the counts that `pytest benchmarks` compares with are written anew.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table

from benchmarks.baseline import AsPublished, CountingEngine
from benchmarks.meter import flops, least_bytes
from benchmarks.table import markdown, table_rows
from benchmarks.variants import Program, prompt_tokens, schedule
from export.inputs import sample_requests
from export.precision import check_precision
from mige_rt.bundle import read_config
from mige_rt.cli.shared import Size
from mige_rt.config import PRESETS, ModelConfig, Precision
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS
from mige_rt.instruction import Task
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams

PROGRAMS: tuple[Program, ...] = get_args(Program)
TASKS: tuple[Task, ...] = get_args(Task)
RESULTS = Path(__file__).parent / "results"
WRITE = "python -m benchmarks.work --write"
COUNTED_MODELS = ("tiny", "xl")
REFERENCES: dict[Task, int] = {"subject": 1, "edit": 1, "compose": 2}  # pictures a prompt usually refers to
CALL_STEPS = 4  # of the pictures whose engine calls are counted


@dataclass(frozen=True)
class GraphWork:
    """All calls of one graph together: floating-point operations, and least bytes."""

    graph: str
    calls: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """One program's work: one GraphWork for each of the six graphs, in the order of GRAPHS."""

    program: Program
    graphs: tuple[GraphWork, ...]

    @property
    def flops(self) -> int:
        return sum(work.flops for work in self.graphs)

    @property
    def bytes(self) -> int:
        return sum(work.bytes for work in self.graphs)

    def of(self, graph: str) -> GraphWork:
        return next(work for work in self.graphs if work.graph == graph)

    def to_json(self) -> dict[str, Any]:
        """As plain data, with the totals."""
        graphs = {work.graph: {"calls": work.calls, "flops": work.flops, "bytes": work.bytes} for work in self.graphs}
        return {"flops": self.flops, "bytes": self.bytes, "graphs": graphs}


def count(
    config: ModelConfig,
    program: Program,
    *,
    task: Task = "edit",
    references: int = 1,
    tokens: int | None = None,
    steps: int | None = None,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    precision: Precision = "fp16",
    guidance_scale: float | None = None,
    image_guidance_scale: float | None = None,
) -> Work:
    """The work of `batch` pictures of one task, made at once.

    references: how many pictures each prompt refers to. In an edit all are the source, so that ours encodes one a
    prompt; in the other tasks all differ, between prompts, too. tokens: a prompt's length, pictures and end of
    sequence included; None for that of a sample prompt (`programs.prompt_tokens`). size: (width, height) in pixels;
    None for the trained one. steps and scales: None for the model's defaults of the task.

    Raises InputError when the numbers do not fit the model or the program.
    """
    check_precision(precision)
    calls = schedule(
        config, program, task, references, tokens, steps, batch, size, guidance_scale, image_guidance_scale
    )

    def total(graph: str) -> GraphWork:
        own = [call for call in calls if call.graph == graph]
        return GraphWork(
            graph,
            sum(call.times for call in own),
            sum(call.times * flops(config, graph, call.sizes) for call in own),
            sum(call.times * least_bytes(config, graph, call.sizes, precision) for call in own),
        )

    return Work(program, tuple(total(graph) for graph in GRAPHS))


def floor_seconds(work: Work, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
    """Per graph, the seconds that a machine of these peaks needs at least: the larger of computing and moving."""
    return {w.graph: max(w.flops / flops_per_second, w.bytes / bytes_per_second) for w in work.graphs}


def engine_calls(task: Task, program: Program, steps: int = CALL_STEPS) -> dict[str, int]:
    """How often the default model's engine, PyTorch on the CPU, runs each graph for the first sample of a task."""
    request = next(request for request in sample_requests() if request.task == task)
    pipe = MigePipeline.from_pretrained(engine="pytorch", device="cpu")
    counting = CountingEngine(pipe.engine)
    counted = MigePipeline(pipe.config, pipe.encoder.tokenize, counting)
    maker = counted if program == "ours" else AsPublished(counted, encode_once=program == "encode_once")
    maker.make([request], SamplingParams(steps=steps))
    return {graph: counting.calls[graph] for graph in GRAPHS}


def regressions() -> dict[str, Any]:
    """The content of results/work.json: what `pytest benchmarks` expects."""
    every: list[tuple[Task, Program]] = [(task, program) for task in TASKS for program in PROGRAMS]
    counts = {
        model: {
            f"{task}, {program}": count(PRESETS[model], program, task=task, references=REFERENCES[task]).to_json()
            for task, program in every
        }
        for model in COUNTED_MODELS
    }
    calls = {f"{task}, {program}": engine_calls(task, program) for task, program in every}
    return {"command": WRITE, "counts": counts, "engine_calls": calls}


def full_size() -> str:
    """The content of results/work.md: the published sizes, at the published defaults of every task."""
    config = PRESETS["xl"]
    works: dict[Task, dict[Program, Work]] = {
        task: _count_all(config, task=task, references=REFERENCES[task]) for task in TASKS
    }
    described: dict[Task, str] = {
        task: f"{getattr(config.defaults, task).steps} steps, prompts of {prompt_tokens(config, task, number)} tokens "
        f"that refer to {number} picture{'s' * (number > 1)}"
        for task, number in REFERENCES.items()
    }
    introduction = (
        f"Counted on the meta device, nothing measured; written by `{WRITE}`. Published sizes, {config.size} pixels, "
        "fp16, the published defaults of each task. A multiply-add is two operations; bytes are the least, each "
        "graph's weights, inputs and outputs once a call. `benchmarks/variants.py` says what the programs are."
    )
    return markdown(introduction, works, described)


def _count_all(config: ModelConfig, **options: Any) -> dict[Program, Work]:
    return {program: count(config, program, **options) for program in PROGRAMS}


def changes(expected: Any, found: Any, where: str = "") -> list[str]:
    """Where two such contents differ, one line a number."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = dict.fromkeys([*expected, *found])
        deeper = ((key, expected.get(key), found.get(key)) for key in keys)
        return [line for key, old, new in deeper for line in changes(old, new, f"{where} / {key}" if where else key)]
    return [] if expected == found else [f"{where}: {found} instead of {expected}"]


def write_results(folder: Path = RESULTS) -> list[Path]:
    """work.json and work.md, each whole or not at all. Raises InputError when they cannot be written."""
    contents = {"work.json": json.dumps(regressions(), indent=1) + "\n", "work.md": full_size()}
    try:
        for name, content in contents.items():
            temporary = folder / f"{name}.partial-{os.getpid()}"
            temporary.write_text(content, encoding="utf-8")
            os.replace(temporary, folder / name)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}); run this in a checkout of your own") from error
    return [folder / name for name in contents]


class _Command(click.Command):
    """Turns what the user can mend into one sentence and exit code 2, as `mige-rt` does."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise click.UsageError(str(error)) from error


@click.command(cls=_Command, help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="xl", show_default=True, help=f"{', '.join(PRESETS)}, or a model folder or bundle")
@click.option("--task", type=click.Choice(TASKS), default="edit", show_default=True)
@click.option("--references", type=int, help="pictures each prompt refers to  [default: 1; compose 2]")
@click.option("--tokens", type=int, help="of each prompt  [default: those of a sample prompt]")
@click.option("--steps", type=int, help="[default: the model's for the task]")
@click.option("--batch", type=int, default=1, show_default=True, help="pictures made at once")
@click.option("--size", type=Size(), help="of the picture  [default: the trained one]")
@click.option("--precision", type=click.Choice(get_args(Precision)), default="fp16", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="the counts as JSON")
@click.option("--write", is_flag=True, help="write benchmarks/results/work.json and work.md anew, and nothing else")
def main(
    model: str, task: Task, references: int | None, precision: Precision, as_json: bool, write: bool, **options: Any
) -> None:
    if write:
        for path in write_results():
            click.echo(path)
        return
    config = PRESETS.get(model) or read_config(Path(model))
    number = REFERENCES[task] if references is None else references
    works = _count_all(config, task=task, references=number, precision=precision, **options)
    if as_json:
        click.echo(json.dumps({program: work.to_json() for program, work in works.items()}, indent=1))
        return
    table = Table(title=f"{config.name}, {task}, {precision}")
    heads, *rows = table_rows(works)
    for head in heads:
        table.add_column(head, justify="left" if head == "graph" else "right", no_wrap=head == "graph")
    for row in rows:
        table.add_row(*row, end_section=row[0] == "vae_decoder")
    Console().print(table)


if __name__ == "__main__":
    main()
