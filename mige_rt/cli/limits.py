"""The options --memory-limit and --trust, which every command that runs a model has."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

_META = "mige_rt.limits"  # a key of the context's `meta`
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

F = TypeVar("F", bound=Callable[..., Any])


class MemorySize(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A number of bytes, as 8G."""

    name = "N[K|M|G]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See `click.ParamType.convert`."""
        match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([KMGT]?)(?:i?B)?", str(value), re.ASCII | re.IGNORECASE)
        size = 0 if match is None else int(float(match[1]) * _UNITS[match[2].upper()])
        if not size:
            self.fail(f"{value!r} is no size; give a number of bytes above 0, as 8G or 500M", param, ctx)
        return size


def limit_options(command: F) -> F:
    """Give a command the options, whose values `given_limits` returns."""

    def remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        ctx.meta.setdefault(_META, {})[str(param.name)] = value

    for option in (
        click.option(
            "--trust",
            is_flag=True,
            expose_value=False,
            callback=remember,
            help="run a bundle that was not made on this machine, and its plans, without trying it first",
        ),
        click.option(
            "--memory-limit",
            type=MemorySize(),
            expose_value=False,
            callback=remember,
            help="refuse what would need more memory, as 8G  [default: on the CPU what is free]",
        ),
    ):
        command = option(command)
    return command


def given_limits() -> dict[str, Any]:
    """The values that the running command was given, as `MigePipeline.from_pretrained` takes them."""
    context = click.get_current_context(silent=True)
    return {} if context is None else dict(context.meta.get(_META, {}))
