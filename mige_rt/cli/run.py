"""`mige-rt run`."""

import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from engines.factory import ENGINES
from engines.interface import Precision
from engines.plans import PLAN_ENGINES
from mige_rt.cli.shared import PATH, Range, Scale, Size, open_pipeline, progress
from mige_rt.config import Solver
from mige_rt.errors import InputError

if TYPE_CHECKING:
    from mige_rt.pipeline import MigePipeline, Settings
    from mige_rt.requests import RequestLine, Resolved

AT_ONCE = 4  # pictures of --num-images made together


def _numbered(out: Path, number: int) -> list[Path]:
    """out itself, or for several pictures out-1.png, out-2.png, ..."""
    return [out] if number == 1 else [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(number)]


@click.command()
@click.option("--prompt", help="what to make; <imagehere> stands for a picture, in the order of --image")
@click.option("--image", "images", type=PATH, multiple=True, help="a picture for the next <imagehere>; may be repeated")
@click.option("--source", type=PATH, help="the picture to edit; without it, a new picture is made")
@click.option("--out", type=PATH, default=Path("out.png"), show_default=True, help=".png, .jpg or .webp")
@click.option("--batch", type=PATH, help="JSON lines with prompt, images, source, task, seed, id; out-ID.png each")
@click.option(
    "--num-images", type=click.IntRange(1, 64), default=1, show_default=True, help="out-1.png, out-2.png, ..."
)
@click.option("--seed", type=click.IntRange(0), help="of the first picture; drawn and printed if not given")
@click.option("--steps", type=int, help="of the solver; at least 2  [default: the model's for the task]")
@click.option("--text-scale", type=Scale(), help="how strongly the words count  [default: the model's for the task]")
@click.option(
    "--source-scale", type=Scale(), help="how strongly the source counts  [default: the model's for the task]"
)
@click.option("--size", type=Size(), help="of the picture in pixels  [default: the model's trained size]")
@click.option(
    "--fit",
    type=click.Choice(["crop", "pad", "aspect"]),
    help="how a picture of another shape is fitted: cut (crop), black bars (pad), or the result takes the source's "
    "shape (aspect)  [default: crop; references of a new picture are padded]",
)
@click.option(
    "--edit-scope",
    type=click.Choice(["local", "global"]),
    default="local",
    show_default=True,
    help="how a prompt without <imagehere> is completed: 'in' the picture, or 'of' it",
)
@click.option("--task", type=click.Choice(["subject", "edit", "compose"]), help="[default: read off the pictures]")
@click.option("--model", type=PATH, help="a bundle or a model folder  [default: the model that comes with mige-rt]")
@click.option("--engine", type=click.Choice(["auto", *ENGINES]), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1")
@click.option("--precision", type=click.Choice(["auto", *get_args(Precision)]), default="auto", show_default=True)
@click.option("--solver", type=click.Choice(get_args(Solver)), help="[default: dpm_solver_pp_2m, the published one]")
@click.option(
    "--guidance-range",
    type=Range(),
    help="compute guidance in this part of the steps alone, as 0.1-0.8: faster, a little different",
)
@click.option(
    "--reuse",
    type=click.FloatRange(0, 1, max_open=True),
    help="skip the model while the picture changed by less than this share since it last ran, as 0.05: faster, a "
    "little different",
)
@click.option("--low-vram", is_flag=True, help="load each part of the model when it is needed and release it: slower")
@click.option("--compile", "compiled", is_flag=True, help="put the denoiser through torch.compile (engine pytorch)")
@click.option("--build", "build_missing", is_flag=True, help="build plans for this machine if the bundle has none")
def run(
    prompt: str | None,
    images: tuple[Path, ...],
    source: Path | None,
    out: Path,
    batch: Path | None,
    num_images: int,
    seed: int | None,
    steps: int | None,
    text_scale: float | None,
    source_scale: float | None,
    size: tuple[int, int] | None,
    fit: Any,
    edit_scope: str,
    task: str | None,
    model: Path | None,
    engine: str,
    device: str,
    precision: Any,
    solver: Any,
    guidance_range: tuple[float, float] | None,
    reuse: float | None,
    low_vram: bool,
    compiled: bool,
    build_missing: bool,
) -> None:
    """Make a picture, or edit one.

    \b
      mige-rt run --prompt "a <imagehere> beside a <imagehere>" --image cat.png --image dog.png
      mige-rt run --prompt "make the background blue" --source scene.png
      mige-rt run --prompt "replace the cat in <imagehere> with <imagehere>" --source scene.png \\
          --image scene.png --image dog.png

    Transparent parts of a picture are put on white; of an animated one the first frame is taken. The written paths go
    to stdout, everything else to stderr. One bad line of a batch does not stop the others: the exit code is then 1.
    """
    from mige_rt.images import check_output
    from mige_rt.pipeline import Settings
    from mige_rt.requests import RequestLine

    if build_missing and engine not in ("auto", *PLAN_ENGINES):
        raise InputError(f"--build is for the engines {' and '.join(PLAN_ENGINES)}, and {engine} was given")
    if (prompt is None) == (batch is None):
        raise InputError("give either --prompt or --batch")
    if batch is not None and (images or source):
        raise InputError("--image and --source stand in the lines of the --batch file; leave them out here")
    if seed is None:
        seed = secrets.randbelow(2**31)
        click.echo(f"seed {seed}", err=True)
    settings = Settings(steps, text_scale, source_scale, size, fit, solver, guidance_range, reuse)
    settings.savings()  # now, since opening the model takes longer
    job = _Job(settings, num_images, edit_scope, task)

    def open_pipe() -> "MigePipeline":
        return open_pipeline(model, engine, device, precision, build_missing, low_vram, compiled)

    if prompt is not None:
        for path in _numbered(out, num_images):
            check_output(path)
        line = RequestLine(prompt, tuple(map(str, images)), None if source is None else str(source))
        request = job.read(line, Path(), seed)  # first, since it costs less than opening the model
        job.make(open_pipe(), prompt, request, out)
    elif batch is not None and not _run_batch(batch, out, seed, job, open_pipe):
        sys.exit(1)


@dataclass(frozen=True)
class _Job:
    """What all requests of one command have in common."""

    settings: "Settings"
    number: int  # of pictures a request
    scope: Any
    task: Any

    def read(self, line: "RequestLine", folder: Path, seed: int) -> "Resolved":
        from dataclasses import replace

        from mige_rt.requests import resolve

        request = line.open(folder, seed)
        return resolve(replace(request, task=request.task or self.task), self.scope)

    def make(self, pipe: "MigePipeline", prompt: str, request: "Resolved", out: Path) -> None:
        """Make and write the request's pictures, AT_ONCE at a time, and print their paths.

        prompt is the user's own, which the pictures' metadata repeats, not the rewritten one.
        """
        from dataclasses import asdict, replace

        from mige_rt.images import save_picture

        said: set[str] = set()

        def warn(sentence: str) -> None:
            if sentence not in said:
                said.add(sentence)
                click.echo(f"warning: {sentence}", err=True)

        settings = pipe.complete(self.settings, request.task)
        engine = pipe.engine
        info = {"prompt": prompt, "model": pipe.model_name, "task": request.task, "edit_scope": self.scope}
        info |= {"engine": engine.name, "device": engine.device, "precision": engine.precision}
        info |= {name: str(value) for name, value in asdict(settings).items() if value is not None}
        outs = _numbered(out, self.number)
        at_once = min(AT_ONCE, pipe.most_at_once)
        for first in range(0, len(outs), at_once):
            batch = [replace(request, seed=request.seed + first + i) for i in range(len(outs[first : first + at_once]))]
            with progress("steps") as advance:
                pictures = pipe.make(batch, settings, lambda done, total: advance("steps", done, total), warn)
            for one, path, picture in zip(batch, outs[first:], pictures, strict=False):
                size = f"{picture.width}x{picture.height}"
                save_picture(picture, path, {**info, "seed": str(one.seed), "size": size})
                click.echo(path)


def _run_batch(batch: Path, out: Path, seed: int, job: _Job, open_pipe: Callable[[], "MigePipeline"]) -> bool:
    """Make every line's pictures; a line that cannot be used is said and passed over. Returns whether none was."""
    from mige_rt.images import check_output
    from mige_rt.requests import parse_request, read_lines

    check_output(out.with_name(f"{out.stem}-1{out.suffix}"))  # a folder that cannot be written is no line's fault
    failures = 0
    names: set[str] = set()
    pipe: MigePipeline | None = None

    def said(number: int, error: InputError) -> None:
        nonlocal failures
        failures += 1
        click.echo(f"{batch} line {number}: {error}", err=True)

    for number, text in read_lines(batch):
        try:
            line = parse_request(text)
            name = line.id or str(number)
            if name in names:
                raise InputError(f"the id {name!r} stands in an earlier line; its pictures would be overwritten")
            names.add(name)
            path = out.with_name(f"{out.stem}-{name}{out.suffix}")
            for numbered in _numbered(path, job.number):
                check_output(numbered)
            request = job.read(line, batch.parent, seed + (number - 1) * job.number)
        except InputError as error:
            said(number, error)
            continue
        pipe = pipe or open_pipe()  # a model that cannot be opened is no line's fault
        try:
            job.make(pipe, line.prompt, request, path)
        except InputError as error:
            said(number, error)
    return failures == 0
