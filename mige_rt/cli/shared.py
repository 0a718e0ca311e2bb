"""What several commands share: option types, progress, opening a model, building plans."""

import math
import shlex
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

import click
from click.core import ParameterSource

from engines.factory import ENGINES
from engines.interface import Attention
from engines.plans import NoPlanError, PlanEngine
from mige_rt.cli.limits import given_limits
from mige_rt.config import Precision
from mige_rt.errors import InputError
from mige_rt.lora import Lora, require_pytorch
from mige_rt.terminal import console, printable, report

if TYPE_CHECKING:
    from mige_rt.pipeline import MigePipeline

PATH = click.Path(path_type=Path)
PRECISIONS = click.Choice(["auto", *get_args(Precision)])
INTERRUPTED = 130  # the exit code of what Ctrl-C ended

_VERBOSE = "mige_rt.verbose"  # a key of the context's `meta`

F = TypeVar("F", bound=Callable[..., Any])


def model_options(command: F) -> F:
    """The options that name a model and what runs it: --model, --engine, --device, --precision."""
    for option in (
        click.option("--precision", type=PRECISIONS, default="auto", show_default=True),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1"),
        click.option("--engine", type=click.Choice(["auto", *ENGINES]), default="auto", show_default=True),
        click.option(
            "--model",
            help="a bundle, a model folder, or a repository on the Hugging Face hub  [default: the model that comes "
            "with mige-rt]",
        ),
    ):
        command = option(command)
    return command


def verbose_option(command: F) -> F:
    """The option --verbose, which `is_verbose` asks for."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[_VERBOSE] = value

    return click.option(
        "--verbose",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        help="when something fails, print where, with the texts of the libraries",
    )(command)


def is_verbose() -> bool:
    """Whether the running command was given --verbose."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_VERBOSE))


@contextmanager
def progress(description: str) -> Generator[Callable[[str, int, int], None], None, None]:
    """A progress bar on stderr; the function given takes a description, what is done, and the total."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    stderr = console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(printable(description), total=None)

        def advance(description: str, done: int, total: int) -> None:
            bar.update(task, description=printable(description), completed=done, total=total)

        yield advance


class LoraType(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A LoRA and its scale, as FILE or FILE:0.8."""

    name = "FILE[:SCALE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lora:
        """See `click.ParamType.convert`."""
        try:
            return Lora.parse(str(value))
        except InputError as error:
            self.fail(str(error), param, ctx)


class Scale(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A finite number."""

    name = "scale"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType.convert`."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is no number", param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not finite; give a number such as 5", param, ctx)
        return number


class StepRange(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A part of the steps, as 0.1-0.8."""

    name = "A-B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """See `click.ParamType.convert`."""
        try:
            first, last = map(float, str(value).split("-"))
        except ValueError:
            self.fail(f"{value!r} is no range; give two shares of the steps, as 0.1-0.8", param, ctx)
        return first, last


class Size(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """(width, height) in pixels, as 512 or 768x512."""

    name = "N|WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """See `click.ParamType.convert`."""
        from mige_rt.image_size import parse_size

        try:
            return parse_size(str(value))
        except InputError as error:
            self.fail(str(error), param, ctx)


def engine_for(engine: str, loras: Sequence[Lora]) -> str:
    """The engine that a user's choice comes to: with LoRAs, `auto` is the engine pytorch.

    Raises:
        NotAvailableError: Another engine was chosen, and there are LoRAs.
    """
    if not loras:
        return engine
    engine = "pytorch" if engine == "auto" else engine
    require_pytorch(engine)
    return engine


class _Values(tuple[Any, ...]):
    """Values that were given as one text, which they are again as a string."""

    def __str__(self) -> str:
        return ",".join(
            "x".join(map(str, cast("tuple[object, ...]", v))) if isinstance(v, tuple) else str(v) for v in self
        )


class Several(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """Values separated by commas, each of a type."""

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> _Values:
        """See `click.ParamType.convert`."""
        if isinstance(value, _Values):
            return value
        values = _Values(self.of.convert(part.strip(), param, ctx) for part in str(value).split(","))
        if len(set(values)) < len(values):
            self.fail(f"{value!r} names a value twice", param, ctx)
        return values


class Part(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A part and how many there are, as 2/6."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """See `click.ParamType.convert`."""
        if isinstance(value, tuple):
            return value  # pyright: ignore[reportUnknownVariableType]  # the default
        numbers = [int(n) for n in str(value).split("/") if n.isascii() and n.isdigit() and len(n) < 7]
        if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
            self.fail(f"{value!r} is no part; give its number and how many there are, as 2/6", param, ctx)
        return numbers[0], numbers[1]


def open_pipeline(  # noqa: PLR0913, the options of from_pretrained
    model: str | Path | None,
    *,
    engine: str = "auto",
    device: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    low_memory: bool = False,
    compile: bool = False,
    attention: Attention = "auto",
    build_missing: bool = False,
    loras: Sequence[Lora] = (),
) -> "MigePipeline":
    """`MigePipeline.from_pretrained` for a command: says on stderr what was chosen.

    Args:
        model: None: the default model.
        engine: See `MigePipeline.from_pretrained`.
        device: The same.
        precision: The same.
        low_memory: The same.
        compile: The same.
        attention: The same.
        build_missing: Where a plan is missing for this machine, build it.
        loras: What is merged into the weights; then `auto` is the engine pytorch.
    """
    from mige_rt.bundle import DEFAULT_MODEL
    from mige_rt.pipeline import MigePipeline

    if model is None:
        report("using the small default model; --model names another")
    is_chosen = engine != "auto"
    engine = engine_for(engine, loras)
    options: dict[str, Any] = {
        "engine": engine,
        "device": device,
        "precision": precision,
        "low_memory": low_memory,
        "compile": compile,
        "attention": attention,
        **given_limits(),
    }
    try:
        pipe = MigePipeline.from_pretrained(model or DEFAULT_MODEL, **options)
    except NoPlanError as error:
        if not build_missing:
            raise
        report(f"building plans for {error.machine}")
        build_plans(error.bundle, error.machine.engine, None, device)
        pipe = MigePipeline.from_pretrained(error.bundle, **options)
    for lora in loras:
        pipe.load_lora_weights(lora.path, scale=lora.scale)
    if not is_chosen:
        chosen = pipe.engine
        report(f"engine {chosen.name} on {chosen.device} in {chosen.precision}")
    return pipe


def command_line() -> str:
    """The running command with the options that were given, as one would type it again."""
    context = click.get_current_context()
    names, parent = [str(context.info_name)], context.parent
    while parent is not None and parent.parent is not None:  # groups of commands, the outermost one left out
        names, parent = [str(parent.info_name), *names], parent.parent
    words = ["mige-rt", *names]
    for param in context.command.params:
        name = str(param.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE or name not in context.params:
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


def build_plans(
    bundle: Path, engine: PlanEngine, capabilities: Sequence[str] | None, device: str, *, refittable: bool = False
) -> Path:
    """Build a bundle's plans with a progress bar; returns their folder."""
    from export.build_plans import build
    from export.plan_job import PlanOptions

    with progress("build") as advance:
        try:
            return build(bundle, engine, capabilities, advance, device, options=PlanOptions(refittable=refittable))
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
