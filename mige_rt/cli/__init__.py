"""The command `mige-rt`. Each command parses, calls one function, and prints; heavy imports stay inside."""

import errno
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from copy import copy
from typing import Any

import click

from mige_rt.cli.annotate import COMMANDS as ANNOTATE_COMMANDS
from mige_rt.cli.annotate import annotate
from mige_rt.cli.bench import bench
from mige_rt.cli.bench_serve import bench_serve
from mige_rt.cli.bundles import build, convert, export, info
from mige_rt.cli.compare import compare
from mige_rt.cli.data import COMMANDS as DATA_COMMANDS
from mige_rt.cli.data import convert_data, data_group, prepare
from mige_rt.cli.eval import COMMANDS as EVAL_COMMANDS
from mige_rt.cli.eval import evaluate
from mige_rt.cli.hub import pull, push
from mige_rt.cli.limits import limit_options
from mige_rt.cli.run import run
from mige_rt.cli.serve import serve, ui
from mige_rt.cli.shared import is_verbose, verbose_option
from mige_rt.cli.signing import sign, verify
from mige_rt.cli.train import train
from mige_rt.cli.train_lora import train_lora
from mige_rt.errors import InputError
from mige_rt.terminal import message, report_cause


class _Commands(click.Group):
    """Every error is one sentence; what the user can mend has exit code 2."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _one_sentence():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_sentence():
            return super().invoke(ctx)


@contextmanager
def _one_sentence() -> Generator[None, None, None]:
    """Turns errors into what `click` prints, escaped. Before, `--verbose` prints where they come from.

    Warnings of Python are the libraries', and for programmers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # whoever reads stdout has read enough, which `click` knows
        if is_verbose():
            report_cause(error)
        raise _click_error(error) from error


def _click_error(error: Exception) -> click.ClickException:
    if isinstance(error, click.UsageError):
        return click.UsageError(message(error.format_message()), error.ctx)
    if isinstance(error, click.ClickException):
        return click.ClickException(message(error.format_message()))
    if isinstance(error, InputError):
        return click.UsageError(message(error))
    if isinstance(error, MemoryError):
        return click.ClickException("this takes more memory than there is; make smaller images, or fewer at once")
    name = type(error).__name__
    return click.ClickException(f"{name}: this is a bug in mige-rt; report it with what --verbose prints")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="mige-rt")
def main() -> None:
    """MIGE: put the subject of an image into a new scene, edit an image as told, or both at once."""


for command in (run, serve, ui, compare):
    limit_options(command)
for command in (run, serve, ui, convert, export, build, info, push, pull, sign, verify):
    main.add_command(verbose_option(command))
for command in (bench, bench_serve, compare, train, train_lora):
    main.add_command(verbose_option(command))
for command in (*ANNOTATE_COMMANDS, *DATA_COMMANDS, *EVAL_COMMANDS):
    verbose_option(command)
for command in (annotate, data_group, evaluate):
    main.add_command(command)
for name, command in (("convert-data", convert_data), ("prepare", prepare)):  # their names before there was `data`
    former = copy(command)
    former.hidden = True
    main.add_command(former, name)
