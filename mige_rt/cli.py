"""The command `mige-rt`. Each command parses, calls one function, and prints; heavy imports stay inside."""

import json
import math
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from engines.interface import Precision
from engines.opening import ENGINES
from engines.plans import PLAN_ENGINES, NoPlanError, PlanEngine
from mige_rt.errors import InputError

if TYPE_CHECKING:
    from mige_rt.pipeline import MigePipeline, Resolved, Settings
    from mige_rt.requests import RequestLine

PATH = click.Path(path_type=Path)
AT_ONCE = 4  # pictures of --num-images made together
_TORCH = "install it with: pip install 'mige-rt[torch]'"


class _Commands(click.Group):
    """Turns what the user can mend into one sentence and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise click.UsageError(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="mige-rt")
def main() -> None:
    """MIGE: put the thing in a picture into a new scene, change a picture as told, or both at once."""


@contextmanager
def _progress(description: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr; the function given takes a description, what is done, and the total."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)

        def advance(description: str, done: int, total: int) -> None:
            bar.update(task, description=description, completed=done, total=total)

        yield advance


class _Scale(click.ParamType):
    name = "scale"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is no number", param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not finite; give a number such as 5", param, ctx)
        return number


class _Size(click.ParamType):
    name = "N|WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        parts = str(value).lower().split("x")
        if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
            self.fail(f"{value!r} is no size; give pixels as 512, or as 768x512 (width x height)", param, ctx)
        return int(parts[0]), int(parts[-1])


def _numbered(out: Path, number: int) -> list[Path]:
    """out itself, or for several pictures out-1.png, out-2.png, ..."""
    return [out] if number == 1 else [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(number)]


@main.command()
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
@click.option("--text-scale", type=_Scale(), help="how strongly the words count  [default: the model's for the task]")
@click.option(
    "--source-scale", type=_Scale(), help="how strongly the source counts  [default: the model's for the task]"
)
@click.option("--size", type=_Size(), help="of the picture in pixels  [default: the model's trained size]")
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
    from mige_rt.pictures import check_output
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
    settings = Settings(steps, text_scale, source_scale, size, fit)
    job = _Job(settings, num_images, edit_scope, task)

    def open_pipe() -> "MigePipeline":
        return _open(model, engine, device, precision, build_missing)

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

        from mige_rt.pipeline import resolve

        request = line.open(folder, seed)
        return resolve(replace(request, task=request.task or self.task), self.scope)

    def make(self, pipe: "MigePipeline", prompt: str, request: "Resolved", out: Path) -> None:
        """Make and write the request's pictures, AT_ONCE at a time, and print their paths.

        prompt is the user's own, which the pictures' metadata repeats, not the rewritten one.
        """
        from dataclasses import asdict, replace

        from mige_rt.pictures import save_picture

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
            with _progress("steps") as advance:
                pictures = pipe.make(batch, settings, lambda done, total: advance("steps", done, total), warn)
            for one, path, picture in zip(batch, outs[first:], pictures, strict=False):
                size = f"{picture.width}x{picture.height}"
                save_picture(picture, path, {**info, "seed": str(one.seed), "size": size})
                click.echo(path)


def _run_batch(batch: Path, out: Path, seed: int, job: _Job, open_pipe: Callable[[], "MigePipeline"]) -> bool:
    """Make every line's pictures; a line that cannot be used is said and passed over. Returns whether none was."""
    from mige_rt.pictures import check_output
    from mige_rt.requests import parse_request

    check_output(out.with_name(f"{out.stem}-1{out.suffix}"))  # a folder that cannot be written is no line's fault
    failures = 0
    names: set[str] = set()
    pipe: MigePipeline | None = None

    def said(number: int, error: InputError) -> None:
        nonlocal failures
        failures += 1
        click.echo(f"{batch} line {number}: {error}", err=True)

    for number, text in _lines(batch):
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


def _lines(batch: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    try:
        lines = [(n, line) for n, line in enumerate(batch.read_text("utf-8-sig").split("\n"), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{batch} cannot be read as a text file of JSON lines: {error}") from error
    if not lines:
        raise InputError(f"{batch} holds no line; one JSON object a line is expected")
    return lines


def _open(model: Path | None, engine: str, device: str, precision: Any, build_missing: bool) -> "MigePipeline":
    from mige_rt.bundle import DEFAULT_MODEL
    from mige_rt.pipeline import MigePipeline

    if model is None:
        click.echo("using the small default model; --model names another", err=True)
    folder = model or DEFAULT_MODEL
    try:
        pipe = MigePipeline.from_pretrained(folder, engine, device, precision)
    except NoPlanError as error:
        if not build_missing:
            raise
        click.echo(f"building plans for {error.machine}", err=True)
        _build(folder, error.machine.engine, None, device)
        pipe = MigePipeline.from_pretrained(folder, engine, device, precision)
    if engine == "auto":
        opened = pipe.engine
        click.echo(f"engine {opened.name} on {opened.device} in {opened.precision}", err=True)
    return pipe


@main.command()
@click.option("--ckpt", type=PATH, required=True, help="the published model.pth, or a folder that holds it")
@click.option("--out", type=PATH, required=True, help="the model folder to make")
@click.option("--vae", type=PATH, help="the folder sd-vae-ft-ema  [default: beside the checkpoint]")
@click.option("--tokenizer", type=PATH, help="the folder t5-v1_1-xxl  [default: beside the checkpoint]")
def convert(ckpt: Path, out: Path, vae: Path | None, tokenizer: Path | None) -> None:
    """Turn published weights into a model folder that `mige-rt run --model` opens."""
    try:
        from trainer.checkpoint import convert as convert_checkpoint
    except ImportError as error:
        raise InputError(f"converting needs a package that is not here ({error}); {_TORCH}") from error
    with _progress("convert") as advance:
        convert_checkpoint(ckpt, out, vae, tokenizer, advance)
    click.echo(out)


_CAPABILITIES = click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    help="of the GPUs to build for, as 8.9; may be repeated; tensorrt-rtx only  [default: this machine's GPU's; where "
    "there is none, 8.0, 8.6, 8.9 and 12.0]",
)


class _Sizes(click.ParamType):
    name = "A-B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        parts = str(value).split("-")
        if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
            self.fail(
                f"{value!r} are no sizes; give the smallest and the largest side in pixels as 256-1024", param, ctx
            )
        return int(parts[0]), int(parts[-1])


@main.command()
@click.option(
    "--ckpt",
    default="tiny",
    show_default=True,
    help="the published model.pth or a folder with it, a model folder, a bundle, a repository on the Hugging Face hub, "
    "or tiny, the model that comes with mige-rt",
)
@click.option("--precision", default="fp32", show_default=True, help=", ".join(get_args(Precision)))
@click.option("--out", type=PATH, required=True, help="the bundle to make")
@click.option(
    "--engine",
    type=click.Choice(["onnxruntime", *PLAN_ENGINES]),
    default="onnxruntime",
    show_default=True,
    help="what to build for; every bundle runs on ONNX Runtime, the others get plans of their own besides",
)
@_CAPABILITIES
@click.option("--max-batch", type=click.IntRange(1, 63), default=4, show_default=True, help="pictures made at once")
@click.option(
    "--max-references",
    type=click.IntRange(1, 63),
    default=4,
    show_default=True,
    help="pictures referred to, for each of these",
)
@click.option("--size", type=click.IntRange(1), help="side of the pictures in pixels  [default: the trained size]")
@click.option("--sizes", type=_Sizes(), help="smallest and largest side instead, as 256-1024: flexible, slower plans")
@click.option("--vae", type=PATH, help="the folder sd-vae-ft-ema  [default: beside the checkpoint]")
@click.option("--tokenizer", type=PATH, help="the folder t5-v1_1-xxl  [default: beside the checkpoint]")
@click.option("--validate/--no-validate", default=True, show_default=True, help="compare every graph with PyTorch")
def export(
    ckpt: str,
    precision: str,
    out: Path,
    engine: Any,
    capabilities: tuple[str, ...],
    max_batch: int,
    max_references: int,
    size: int | None,
    sizes: tuple[int, int] | None,
    vae: Path | None,
    tokenizer: Path | None,
    validate: bool,
) -> None:
    """Turn a checkpoint into a bundle of validated graphs that runs without PyTorch.

    \b
      mige-rt export --precision fp16 --out bundle
      mige-rt run --model bundle --prompt "make the background blue" --source docs/scene.png
    """
    try:
        from export.bundle import Limits, export_bundle
        from export.table import exported_table
    except ImportError as error:
        raise InputError(f"exporting needs a package that is not here ({error}); {_TORCH}") from error
    from rich.console import Console

    if size is not None and sizes is not None:
        raise InputError("give either --size or --sizes")
    limits = Limits(max_batch, max_references, sizes or (None if size is None else (size, size)))
    if capabilities and engine != "tensorrt-rtx":
        raise InputError(f"--compute-capability is for --engine tensorrt-rtx, and {engine} was given")
    if engine in PLAN_ENGINES:
        from export.tensorrt import check_request

        check_request(engine, precision, capabilities or None)  # now, since an export takes long
    with _progress("export") as advance:
        try:
            exported = export_bundle(ckpt, out, precision, limits, vae, tokenizer, validate, on_progress=advance)
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
    Console(stderr=True).print(exported_table(exported))
    click.echo(out)
    if engine in PLAN_ENGINES:
        _build(out, engine, capabilities or None, "auto")


@main.command()
@click.option("--bundle", type=PATH, required=True, help="as `mige-rt export` writes; the plans are added to it")
@click.option("--engine", type=click.Choice(PLAN_ENGINES), required=True)
@_CAPABILITIES
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1: the GPU to build for")
def build(bundle: Path, engine: PlanEngine, capabilities: tuple[str, ...], device: str) -> None:
    """Build, or build anew, a bundle's plans for TensorRT or TensorRT for RTX.

    \b
      mige-rt build --bundle bundle --engine tensorrt-rtx
      mige-rt run --model bundle --engine tensorrt-rtx --prompt "make the background blue" --source docs/scene.png

    TensorRT builds for this machine's GPU and measures on it, which takes minutes. TensorRT for RTX builds in seconds,
    without a GPU too, and compiles the rest when the plans are first run.
    """
    click.echo(_build(bundle, engine, capabilities or None, device))


def _build(bundle: Path, engine: PlanEngine, capabilities: Sequence[str] | None, device: str) -> Path:
    from export.tensorrt import build as build_plans

    with _progress("build") as advance:
        try:
            return build_plans(bundle, engine, capabilities, advance, device)
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="for programs")
@click.option("--verify", is_flag=True, help="hash every file again")
def info(bundle: Path, as_json: bool, verify: bool) -> None:
    """Show what is inside a bundle."""
    from engines import plans
    from mige_rt.bundle import check_files, describe, read_manifest

    manifest = read_manifest(bundle)
    check_files(bundle, manifest, everything=verify)
    content = describe(bundle, manifest) | {"plans": plans.describe(bundle, manifest)}
    if verify:
        for found in plans.plans(bundle):
            plans.check_plans(bundle, found, everything=True)
        content["verified"] = True
    if as_json:
        click.echo(json.dumps(content, indent=1))
        return
    from rich.console import Console

    from mige_rt.show import bundle_tables

    console = Console()
    for part in bundle_tables(content):
        console.print(part)


if __name__ == "__main__":
    main()
