"""The work of an image, counted: each graph's floating-point operations and least bytes, in three variants.

And the operations that a step of the loop launches.

`benchmarks.schedule` has the variants. With --write, the counts that the tests compare with are written anew.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import click

from benchmarks.case import VARIANT_TITLES, Variant
from benchmarks.meter import flops, least_bytes, step_launches
from benchmarks.schedule import WorkOptions, prompt_tokens, schedule
from export.formatting import amount, markdown_table
from export.precision import check_precision
from mige_rt.atomic import atomic_file
from mige_rt.bundle import read_config
from mige_rt.config import PRESETS, ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, GraphName
from mige_rt.instruction import Task

VARIANTS: tuple[Variant, ...] = get_args(Variant)
TASKS: tuple[Task, ...] = get_args(Task)
RESULTS = Path(__file__).parent / "results"
WRITE = "python -m benchmarks.work --write"
COUNTED_MODELS = ("tiny", "xl")
REFERENCES: dict[Task, int] = {"subject": 1, "edit": 1, "compose": 2}  # images a prompt usually refers to
USUAL = {task: WorkOptions(task=task, references=number) for task, number in REFERENCES.items()}
EDIT = USUAL["edit"]


@dataclass(frozen=True)
class GraphWork:
    """All calls of one graph together: floating-point operations, and least bytes."""

    calls: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """One variant's work, in the order of GRAPHS."""

    graphs: dict[GraphName, GraphWork]

    @property
    def flops(self) -> int:
        return sum(work.flops for work in self.graphs.values())

    @property
    def bytes(self) -> int:
        return sum(work.bytes for work in self.graphs.values())

    def to_json(self) -> dict[str, Any]:
        return {"flops": self.flops, "bytes": self.bytes, **asdict(self)}


def count(config: ModelConfig, variant: Variant, options: WorkOptions = EDIT) -> Work:
    """The work of a batch of images. Raises InputError when the options do not fit the model or the variant."""
    check_precision(options.precision)
    graphs: dict[GraphName, GraphWork] = {}
    calls = schedule(config, variant, options)
    for graph in GRAPHS:
        of_graph = [call for call in calls if call.graph == graph]
        operations = sum(call.times * flops(config, graph, call.sizes) for call in of_graph)
        moved = sum(call.times * least_bytes(config, graph, call.sizes, options.precision) for call in of_graph)
        graphs[graph] = GraphWork(sum(call.times for call in of_graph), operations, moved)
    return Work(graphs)


def count_variants(config: ModelConfig, options: WorkOptions) -> dict[Variant, Work]:
    return {variant: count(config, variant, options) for variant in VARIANTS}


def roofline_seconds(work: Work, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
    """Per graph, the seconds that a machine of these peaks needs at least: the larger of computing and moving."""
    return {g: max(w.flops / flops_per_second, w.bytes / bytes_per_second) for g, w in work.graphs.items()}


def regressions() -> dict[str, Any]:
    """The content of results/work.json: what the tests expect."""
    pairs = list(product(TASKS, VARIANTS))
    counts = {
        model: {f"{task}, {variant}": count(PRESETS[model], variant, USUAL[task]).to_json() for task, variant in pairs}
        for model in COUNTED_MODELS
    }
    launches = {model: step_launches(PRESETS[model]) for model in COUNTED_MODELS}
    return {"command": WRITE, "launches_per_step": launches, "counts": counts}


def work_table(works: Mapping[Variant, Work]) -> str:
    """The variants' work by graph and in all. Ratio: how many times the operations of ours the published one needs."""
    saved = works["published"].flops - works["ours"].flops

    def row(name: str, of_variants: Mapping[Variant, Work | GraphWork]) -> dict[str, str]:
        row = {"graph": name}
        for variant, work in of_variants.items():
            title = VARIANT_TITLES[variant]
            row[f"{title}: calls"] = str(work.calls) if isinstance(work, GraphWork) else ""
            row |= {f"{title}: work": amount(work.flops, "FLOP"), f"{title}: bytes": amount(work.bytes)}
        published, ours = of_variants["published"].flops, of_variants["ours"].flops
        row["ratio"] = f"{published / ours:.2f}" if ours else ""
        return {**row, "of the saving": f"{(published - ours) / saved:.1%}" if saved else ""}

    rows = [row(graph, {variant: work.graphs[graph] for variant, work in works.items()}) for graph in GRAPHS]
    return markdown_table([*rows, row("total", works)])


def full_size() -> str:
    """The content of results/work.md: the published sizes, at the published defaults of every task."""
    config = PRESETS["xl"]
    sections = []
    for task, references in REFERENCES.items():
        steps, length = getattr(config.defaults, task).num_inference_steps, prompt_tokens(config, task, references)
        images = f"{references} image{'s' * (references > 1)}"
        title = f"{task}: {steps} steps, prompts of {length} tokens that refer to {images}"
        sections.append(f"## {title}\n\n{work_table(count_variants(config, USUAL[task]))}\n")
    return f"""# The work of an image at full size

Counted on the meta device, nothing measured; written by `{WRITE}`. Published sizes, {config.size} pixels, fp16, the
published defaults of each task. A multiply-add is two operations; bytes are the least, each graph's weights, inputs and
outputs once a call. `benchmarks/schedule.py` says what the variants are.

A step of the loop with two guidance branches launches {step_launches(config)} operations in eager PyTorch on CUDA,
attention counted as one.

{chr(10).join(sections)}"""


def write_results(folder: Path = RESULTS) -> list[Path]:
    """Write work.json and work.md, each whole or not at all."""
    contents = {"work.json": json.dumps(regressions(), indent=1) + "\n", "work.md": full_size()}
    for name, content in contents.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return [folder / name for name in contents]


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="xl", show_default=True, help=f"{', '.join(PRESETS)}, or a model folder or bundle")
@click.option("--task", type=click.Choice(TASKS), default="edit", show_default=True)
@click.option("--references", type=int, help="images each prompt refers to  [default: 1; compose 2]")
@click.option("--num-inference-steps", "--steps", type=int, help="[default: the model's for the task]")
@click.option("--json", "as_json", is_flag=True, help="the counts as JSON")
@click.option("--write", is_flag=True, help="write benchmarks/results/work.json and work.md anew, and nothing else")
def main(model: str, as_json: bool, write: bool, **given: Any) -> None:
    try:
        if write:
            click.echo("\n".join(map(str, write_results())))
            return
        config = PRESETS.get(model) or read_config(Path(model))
        if given["references"] is None:
            given["references"] = REFERENCES[given["task"]]
        works = count_variants(config, WorkOptions(**given))
    except (InputError, OSError) as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps({variant: work.to_json() for variant, work in works.items()}, indent=1))
    else:
        click.echo(f"{config.name}, {given['task']}, fp16\n\n{work_table(works)}")


if __name__ == "__main__":
    main()
