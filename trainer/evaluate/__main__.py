"""`python -m trainer.evaluate --world DIR --out DIR`: measure a model on concepts that were held out from training.

Writes evaluation.json (all figures), evaluation.md (tables) and grid.png (the first samples of each kind, not chosen);
with --guidance, guidance.json and guidance.png instead: what the two scales do, on things that the model knows.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mige_rt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mige_rt.pipeline import MigePipeline
    from trainer.synthetic.concepts import Concept

EVALUATION_SEED, GUIDANCE_SEED = 10**6 + 1, 10**6 + 2  # of series of the world that training never sees
SAMPLES, GUIDANCE_SAMPLES = 64, 8  # a kind
SHOWN = 2  # samples a kind in the grid


def held_out_concepts(world: Path) -> "list[Concept]":
    """Those of a world that are held out from training. Raises InputError when they are fewer than three."""
    from trainer.synthetic.concepts import load_concepts

    held_out = [concept for concept in load_concepts(world) if concept.held_out]
    if len(held_out) < 3:
        raise InputError(f"{world} has {len(held_out)} held-out concepts, 3 are needed; fetch it again")
    return held_out


def evaluate(
    pipe: "MigePipeline",
    concepts: "list[Concept]",
    seed: int,
    each: int,
    folder: Path,
    on_progress: "Callable[[str, int, int], None]",
) -> str:
    """Measure on the first `each` samples a kind of a series over these concepts; the files into a folder.

    Returns evaluation.md.
    """
    import numpy as np

    from mige_rt.sampling_params import SamplingParams
    from trainer.evaluate.identity import Gallery
    from trainer.evaluate.measure import Measured, bars, figures, measure, through_vae
    from trainer.evaluate.report import as_data, circumstances, markdown, write_json
    from trainer.preview import answer, first_of_each_kind, grid

    gallery = Gallery(concepts, pipe.config.size)
    gallery.network  # noqa: B018 - fails here rather than after minutes
    samples = first_of_each_kind(concepts, pipe.config.size, seed, each)
    results = answer(pipe, samples, SamplingParams(), seed, lambda done: on_progress("pictures", done, len(samples)))
    truths = through_vae(pipe, [sample.target for sample in samples])
    with_source = [k for k, sample in enumerate(samples) if sample.source is not None]
    coded = through_vae(pipe, [source for sample in samples if (source := sample.source) is not None])
    sources = dict(zip(with_source, coded, strict=True))
    measured: dict[str, list[Measured]] = {}
    for k, (sample, result, truth) in enumerate(zip(samples, results, truths, strict=True)):
        measured.setdefault(sample.kind, []).append(measure(sample, np.asarray(result), truth, sources.get(k), gallery))
        on_progress("figures", k + 1, len(samples))
    kinds = {kind: figures(of_kind) for kind, of_kind in measured.items()}
    reached = [bar for kind, of_kind in kinds.items() for bar in bars(kind, of_kind, 1 / len(concepts))]
    about = circumstances(pipe, seed, each)
    write_json(folder / "evaluation.json", as_data(about, kinds, reached, len(concepts)))
    text = markdown(about, kinds, reached, len(concepts))
    (folder / "evaluation.md").write_text(text)
    shown = [first + i for first in range(0, len(samples), each) for i in range(min(each, SHOWN))]
    grid([samples[k] for k in shown], [results[k] for k in shown], folder / "grid.png")
    return text


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option(
    "--model", type=click.Path(path_type=Path), help="a bundle or a model folder  [default: the one with mige-rt]"
)
@click.option("--engine", default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1")
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "fp16", "bf16", "int8"]), default="auto", show_default=True
)
@click.option(
    "--samples", type=click.IntRange(1), help=f"a kind  [default: {SAMPLES}; {GUIDANCE_SAMPLES} for --guidance]"
)
@click.option("--seed", type=click.IntRange(0), help="of the series of samples, and of the pictures' noise")
@click.option(
    "--world", type=click.Path(path_type=Path), required=True, help="folder made by python -m trainer.synthetic.fetch"
)
@click.option("--guidance", is_flag=True, help="measure what the guidance scales do instead")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="folder to make")
def main(
    model: Path | None,
    engine: str,
    device: str,
    precision: Any,
    samples: int | None,
    seed: int | None,
    world: Path,
    guidance: bool,
    out: Path,
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from mige_rt.atomic import atomic_folder
    from mige_rt.bundle import DEFAULT_MODEL
    from mige_rt.pipeline import MigePipeline
    from trainer.synthetic.concepts import load_concepts

    console = Console(stderr=True)
    try:
        with (
            atomic_folder(out) as folder,
            Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
        ):
            task = bar.add_task("")

            def advance(description: str, done: int, total: int) -> None:
                bar.update(task, description=description, completed=done, total=total)

            if guidance:
                from trainer.evaluate.sweep import check_matplotlib, known_concepts, sweep, write_sweep

                check_matplotlib()
                known = known_concepts(load_concepts(world))
                pipe = MigePipeline.from_pretrained(model or DEFAULT_MODEL, engine, device, precision)
                seed, each = GUIDANCE_SEED if seed is None else seed, samples or GUIDANCE_SAMPLES
                write_sweep(pipe, sweep(pipe, known, seed, each, advance), seed, each, folder)
            else:
                held_out = held_out_concepts(world)
                pipe = MigePipeline.from_pretrained(model or DEFAULT_MODEL, engine, device, precision)
                seed = EVALUATION_SEED if seed is None else seed
                text = evaluate(pipe, held_out, seed, samples or SAMPLES, folder, advance)
        if not guidance:
            click.echo(text)
    except InputError as error:
        raise click.UsageError(str(error)) from error
    click.echo(out)


if __name__ == "__main__":
    main()
