"""Numbers as reports have them, Markdown tables, and JSON to read."""

import json
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from tabulate import tabulate

PREFIXES = ("", "k", "M", "G", "T", "P")


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{1000 * value:.3g} ms" if value < 0.1 else f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def amount(value: float | None, unit: str = "B") -> str:
    """A large number with a decimal prefix: 568 MB, 1.3 TFLOP."""
    if value is None:
        return ""
    power = next((k for k in range(len(PREFIXES)) if abs(value) / 1000**k < 999.5), len(PREFIXES) - 1)
    return f"{value / 1000**power:.3g} {PREFIXES[power]}{unit}"


def interval(estimate: Mapping[str, float], digits: str = ".2f") -> str:
    """A value and the ends of its interval."""
    value, low, high = (format(estimate[key], digits) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> str:
    """A pipe table without the columns that are empty. words: the columns that are no numbers, besides the first."""
    columns = [k for k in range(len(headers)) if any(row[k] for row in rows)]
    align = ["left" if k == 0 or k in words else "right" for k in columns]
    cells = [[row[k].replace("|", "\\|") for k in columns] for row in rows]
    return tabulate(cells, [headers[k] for k in columns], "pipe", colalign=align, disable_numparse=True)


def json_text(data: Any) -> str:
    """JSON with each list of numbers in a line; numbers of six digits, and null for one that is not finite."""
    text = json.dumps(_rounded(data), indent=1, allow_nan=False)
    return re.sub(r"\[\s+([^][{}\"]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def _rounded(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_rounded(value) for value in data]
    return data if not isinstance(data, float) else float(f"{data:.6g}") if isfinite(data) else None
