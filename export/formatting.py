"""Numbers as reports have them, Markdown tables, and JSON to read."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from trainer.evaluate.metrics import rounded

PREFIXES = ("", "k", "M", "G", "T", "P")


def seconds(value: float | None) -> str:
    """A time in milliseconds or seconds; nothing for None."""
    if not value:  # also jinja2's undefined
        return ""
    return f"{1000 * value:.3g} ms" if value < 0.1 else f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def amount(value: float | None, unit: str = "B") -> str:
    """A large number with a decimal prefix: 568 MB, 1.3 TFLOP."""
    if not value:  # also jinja2's undefined
        return ""
    power = next((k for k in range(len(PREFIXES)) if abs(value) / 1000**k < 999.5), len(PREFIXES) - 1)
    return f"{value / 1000**power:.3g} {PREFIXES[power]}{unit}"


def interval(estimate: Mapping[str, float]) -> str:
    """A value and the ends of its interval."""
    return "{value:.2f} ({low:.2f} to {high:.2f})".format(**estimate)


def markdown_table(rows: Sequence[Mapping[str, str]], words: Sequence[str] = ()) -> str:
    """A pipe table of rows by header, without empty columns. words: columns of text, as the first one is."""
    headers = [header for header in (rows[0] if rows else ()) if any(row[header] for row in rows)]
    align = ["left" if header == headers[0] or header in words else "right" for header in headers]
    cells = [[row[header].replace("|", "\\|") for header in headers] for row in rows]
    return tabulate(cells, headers, "pipe", colalign=align, disable_numparse=True) if cells else ""


def json_text(data: Any) -> str:
    """JSON with each list of numbers in a line; numbers of six digits, and null for one that is not finite."""
    text = json.dumps(rounded(data), indent=1, allow_nan=False)
    # The line breaks keep it out of strings, which have none in JSON.
    return re.sub(r"\[\n\s*([^][{}\"]*?)\n\s*\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"
