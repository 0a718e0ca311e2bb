"""`mige-rt eval`: the benchmarks of the paper, and a blind user study."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mige_rt.cli.limits import limit_options
from mige_rt.cli.shared import PATH, Part, Scale, command_line, model_options, open_pipeline, progress
from mige_rt.errors import InputError, requires
from mige_rt.terminal import echo, report, report_lines

if TYPE_CHECKING:
    from benchmarks.evaluation.encoders import EncoderOptions

_BENCHMARK = click.option(
    "--benchmark",
    required=True,
    metavar="LAYOUT:FOLDER",
    help="dreambench, emu-edit, magicbrush, migebench or synthetic, and the folder that it was downloaded to",
)
_SAMPLING = (
    click.option("--num-inference-steps", "--steps", type=int, help="at least 2  [default: the model's for the task]"),
    click.option("--guidance-scale", "--text-scale", type=Scale(), help="[default: the model's for the task]"),
    click.option("--image-guidance-scale", "--source-scale", type=Scale(), help="[default: the model's for the task]"),
    click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="images made at once"),
    click.option("--limit", type=click.IntRange(1), help="the first so many samples alone"),
    click.option(
        "--part",
        type=Part(),
        default=(1, 1),
        help="one part alone, as 2/6 on the second of six devices  [default: all]",
    ),
)
_ENCODERS = (
    click.option("--clip", help="folder, or repository in the hub's cache  [default: openai/clip-vit-base-patch32]"),
    click.option("--dino", help="the same  [default: facebook/dino-vits16]"),
    click.option("--detector", help="the same, a Grounding DINO  [default: IDEA-Research/grounding-dino-base]"),
    click.option("--segmenter", help="the same, a SAM  [default: facebook/sam-vit-huge]"),
    click.option(
        "--stand-in", is_flag=True, help="EfficientNet-Lite0, which a package ships, for the encoders not named"
    ),
    click.option("--judge-device", default="cpu", show_default=True, help="of the encoders: cpu, cuda, cuda:1"),
    click.option("--against", type=PATH, help="another results folder: how much its metrics differ, image by image"),
)


def _options(*options: Any) -> Any:
    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.group("eval")
def evaluate() -> None:
    """Evaluate a model on public benchmarks, and by people.

    A benchmark is named by its layout and its folder, as dreambench:FOLDER. Images are made in one step and judged in
    another; each goes on where it was stopped.
    """


@evaluate.command()
@_BENCHMARK
@model_options
@_options(*_SAMPLING)
@click.option("--out", type=PATH, required=True, help="results folder to make, or to go on with")
def generate(benchmark: str, out: Path, **options: Any) -> None:
    """Make a benchmark's images.

    \b
      mige-rt eval generate --benchmark dreambench:dreambooth/dataset --model MIGE --out results

    A run that was stopped goes on by the same command. Several may share a folder, one for each device, by --part. The
    exit code is 1 where a sample could not be used.
    """
    if not _generate(benchmark, out, options):
        sys.exit(1)


@evaluate.command()
@click.argument("results", type=PATH)
@_BENCHMARK
@_options(*_ENCODERS)
@click.option("--out", type=PATH, required=True, help="folder of the report, to make or to go on with")
def judge(results: Path, benchmark: str, out: Path, **options: Any) -> None:
    """Measure the images of a results folder: report.html, report.md, report.json.

    \b
      mige-rt eval judge results --benchmark dreambench:dreambooth/dataset --out report

    Encoders come from folders here or from the hub's cache; nothing is downloaded. For a default one that is missing,
    the report has the command that gets it, and the other metrics go on. On the synthetic world, and by --stand-in
    elsewhere, EfficientNet-Lite0 judges, and the encoders that are named.
    """
    _judge(results, benchmark, out, options, _encoder_options(benchmark, options))


@evaluate.command("run")
@_BENCHMARK
@model_options
@_options(*_SAMPLING)
@_options(*_ENCODERS)
@click.option("--out", type=PATH, required=True, help="folder of both: OUT/results and OUT/report")
def run_both(benchmark: str, out: Path, **options: Any) -> None:
    """Make a benchmark's images and measure them.

    \b
      mige-rt eval run --benchmark synthetic:world --out evaluation
    """
    encoders = _encoder_options(benchmark, options)
    encoders.check_named()  # before hours of images
    complete = _generate(benchmark, out / "results", options)
    _judge(out / "results", benchmark, out / "report", options, encoders)
    if not complete:
        sys.exit(1)


@evaluate.command("user-study")
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@_BENCHMARK
@click.option("--votes", type=PATH, required=True, help="JSON lines to write, or to go on with")
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on; 0.0.0.0: all of them")
@click.option("--port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="0: a free one")
def user_study(first: Path, second: Path, benchmark: str, votes: Path, host: str, port: int) -> None:
    """Show people the images of two results folders side by side, not telling which is whose.

    \b
      mige-rt eval user-study results-a results-b --benchmark dreambench:dreambooth/dataset --votes votes.jsonl
      mige-rt eval preference votes.jsonl
    """
    with requires("eval,serve", "a user study"):
        from benchmarks.evaluation.layouts import open_benchmark
        from benchmarks.evaluation.results import open_results
        from benchmarks.evaluation.user_study import Study, create_app, open_pairs
        from mige_rt.serve.server import serve_page

    if first.resolve() == second.resolve():
        raise InputError(f"{first} is given twice; give the folders of two systems")
    if not votes.absolute().parent.is_dir():
        raise InputError(f"{votes} cannot be written: {votes.parent} is no folder; make it first")
    pairs = open_pairs(open_benchmark(benchmark), (open_results(first), open_results(second)))
    study = Study(pairs, (str(first), str(second)), votes)
    serve_page(create_app(study), host, port, f"{len(pairs)} pairs; votes go to {votes}")


@evaluate.command()
@click.argument("votes", type=PATH, nargs=-1, required=True)
def preference(votes: tuple[Path, ...]) -> None:
    """Rank systems by the votes of a user study (Bradley-Terry scores)."""
    with requires("eval", "a user study"):
        from benchmarks.evaluation.preference import preferences, read_votes
        from export.formatting import markdown_table

    rows = [
        {
            "system": place.system,
            "score": place.score.text("{:.2f}"),
            "wins": f"{place.wins:g} of {place.votes}",
        }
        for place in preferences(read_votes(votes))
    ]
    for line in markdown_table(rows).split("\n"):
        echo(line)


def _generate(spec: str, out: Path, options: dict[str, Any]) -> bool:
    """Make the images; returns whether all could be made."""
    with requires("eval", "evaluating"):
        from benchmarks.evaluation.generate import GenerateOptions, generate, open_run
        from benchmarks.evaluation.layouts import open_benchmark
    from mige_rt.sampling_params import SamplingParams

    opened = open_benchmark(spec)  # first, since it costs less than opening a model
    names = ("num_inference_steps", "guidance_scale", "image_guidance_scale")
    params = SamplingParams(**{name: options[name] for name in names})
    pipe = open_pipeline(
        options["model"], engine=options["engine"], device=options["device"], precision=options["precision"]
    )
    results = open_run(out, pipe, opened, params)
    given = GenerateOptions(params=params, **{name: options[name] for name in ("batch", "part", "limit")})
    with progress("images") as advance:
        generated = generate(pipe, opened, results, given, advance)
    for name, reason in generated.failures.items():
        report(f"warning: {name} could not be made: {reason}")
    report(f"{generated.images} images made, {generated.there} were there")
    echo(out)
    return not generated.failures


def _judge(results: Path, spec: str, out: Path, options: dict[str, Any], encoders: "EncoderOptions") -> None:
    with requires("eval", "judging"):
        from benchmarks.evaluation.judge import judge
        from benchmarks.evaluation.layouts import open_benchmark
        from benchmarks.evaluation.report import write_report
        from benchmarks.evaluation.results import open_results

    opened, folder = open_benchmark(spec), open_results(results)
    against = None if options["against"] is None else open_results(options["against"])
    with progress("judging") as advance:
        judgement = judge(opened, folder, out, encoders, against=against, on_progress=advance)
    report_lines(write_report(judgement, out, command_line()))
    echo(out)


def _encoder_options(spec: str, options: dict[str, Any]) -> "EncoderOptions":
    """The encoders that were named, and for the others the paper's, or the stand-in."""
    with requires("eval", "judging"):
        from benchmarks.evaluation.encoders import EncoderOptions

    stand_in = options["stand_in"] or spec.startswith("synthetic:")
    names = ("clip", "dino", "detector", "segmenter")
    instead: dict[str, Any] = {**dict.fromkeys(names), "lpips": False, "efficientnet": True}
    given = {name: options[name] for name in names if options[name] is not None}
    return EncoderOptions(**{**(instead if stand_in else {}), **given}, device=options["judge_device"])


limit_options(generate)
limit_options(run_both)
COMMANDS = (generate, judge, run_both, user_study, preference)
