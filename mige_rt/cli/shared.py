"""What several commands share: progress, parameter types, opening a model, building plans."""

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from engines.plans import NoPlanError, PlanEngine

if TYPE_CHECKING:
    from mige_rt.pipeline import MigePipeline

PATH = click.Path(path_type=Path)
INTERRUPTED = 130  # the exit code of what Ctrl-C ended
NO_TORCH = "install it with: pip install 'mige-rt[torch]'"


@contextmanager
def progress(description: str) -> Iterator[Callable[[str, int, int], None]]:
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


class Scale(click.ParamType):
    name = "scale"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is no number", param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not finite; give a number such as 5", param, ctx)
        return number


class Range(click.ParamType):
    name = "A-B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        try:
            first, last = map(float, str(value).split("-"))
        except ValueError:
            self.fail(f"{value!r} is no range; give two shares of the steps, as 0.1-0.8", param, ctx)
        return first, last


class Size(click.ParamType):
    name = "N|WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        parts = str(value).lower().split("x")
        if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
            self.fail(f"{value!r} is no size; give pixels as 512, or as 768x512 (width x height)", param, ctx)
        return int(parts[0]), int(parts[-1])


def open_pipeline(
    model: Path | None,
    engine: str,
    device: str,
    precision: Any,
    build_missing: bool,
    low_vram: bool,
    compiled: bool,
) -> "MigePipeline":
    from mige_rt.bundle import DEFAULT_MODEL
    from mige_rt.pipeline import MigePipeline

    if model is None:
        click.echo("using the small default model; --model names another", err=True)
    folder = model or DEFAULT_MODEL
    try:
        pipe = MigePipeline.from_pretrained(folder, engine, device, precision, low_memory=low_vram, compile=compiled)
    except NoPlanError as error:
        if not build_missing:
            raise
        click.echo(f"building plans for {error.machine}", err=True)
        build_plans(folder, error.machine.engine, None, device)
        pipe = MigePipeline.from_pretrained(folder, engine, device, precision, low_memory=low_vram, compile=compiled)
    if engine == "auto":
        opened = pipe.engine
        click.echo(f"engine {opened.name} on {opened.device} in {opened.precision}", err=True)
    return pipe


def command_line() -> str:
    """The running command with the options that were given, as one would type it again."""
    context = click.get_current_context()
    words = ["mige-rt", str(context.info_name)]
    for param in context.command.params:
        name = str(param.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        values = value if param.multiple else [value]
        if isinstance(param, click.Option) and param.is_flag:
            words.append(param.opts[0] if value else param.secondary_opts[0])
        elif isinstance(param, click.Option):
            words += [word for one in values for word in (param.opts[0], str(one))]
        else:
            words += [str(one) for one in values]
    return shlex.join(words)


def build_plans(bundle: Path, engine: PlanEngine, capabilities: Sequence[str] | None, device: str) -> Path:
    from export.build_plans import build

    with progress("build") as advance:
        try:
            return build(bundle, engine, capabilities, advance, device)
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
