"""What commands print. Strings from outside (file names, prompts, manifests) are escaped here, and nowhere else.

Otherwise such a string could move the cursor, retitle the window, hide a part of a path or break rich's markup.
"""

import json
import traceback
import unicodedata
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

LONGEST_MESSAGE = 1000  # characters of a line on stderr

_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control and format characters, halves of characters, line separators
_JOINERS = "\u200c\u200d"  # format characters that words and emoji are written with


def printable(value: object) -> str:
    r"""A value's text in one line, with escapes such as `\x1b` and `\n` for what a terminal would not just show."""
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _UNSAFE and char not in _JOINERS
        else char
        for char in str(value)
    )


def message(value: object) -> str:
    """`printable`, cut in the middle to LONGEST_MESSAGE: the beginning says what is wrong, the end what to do."""
    text, half = printable(value), LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: half - 3]} ... {text[-half + 2 :]}"


def echo(value: object) -> None:
    """Print a line to stdout."""
    click.echo(printable(value))


def echo_json(content: Any) -> None:
    """Print JSON to stdout, in ASCII."""
    click.echo(json.dumps(content, indent=1).replace("\x7f", "\\u007f"))


def report(value: object) -> None:
    """Print a line to stderr."""
    click.echo(message(value), err=True)


def report_lines(text: str) -> None:
    """Print a text of several lines to stderr."""
    for line in text.split("\n"):
        report(line)


def report_cause(error: BaseException) -> None:
    """Print to stderr where an error comes from, with the texts of the libraries beneath it."""
    report_lines("".join(traceback.format_exception(error)).rstrip("\n"))


def console(*, stderr: bool = False) -> "Console":
    """A rich console for tables and progress bars: no string is markup, and all are `printable`."""
    from rich.console import Console
    from rich.text import Text

    class EscapingConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    return EscapingConsole(stderr=stderr, markup=False, emoji=False)
