"""The command `mige-rt`. Each command parses, calls one function, and prints; heavy imports stay inside."""

from typing import Any

import click

from mige_rt.cli.bench import bench
from mige_rt.cli.bundles import build, convert, export, info
from mige_rt.cli.compare import compare
from mige_rt.cli.data import convert_data, prepare
from mige_rt.cli.run import run
from mige_rt.errors import InputError


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
    """MIGE: put the subject of an image into a new scene, edit an image as told, or both at once."""


for command in (run, convert, export, build, info, bench, compare, convert_data, prepare):
    main.add_command(command)
