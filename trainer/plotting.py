"""Plots need matplotlib, which only the extra `eval` installs."""

from typing import TYPE_CHECKING

from mige_rt.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_figure(width: float, height: float) -> "Figure":
    """An empty matplotlib figure that needs no display.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        InputError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def check_matplotlib() -> None:
    """Fail before a long run whose results will be plotted.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"plots need matplotlib ({error}); install it with: pip install 'mige-rt[eval]'") from error
