"""The errors that are the user's to mend."""

from collections.abc import Generator
from contextlib import contextmanager


class InputError(ValueError):
    """What the user gave cannot be used; the command line prints it and exits with 2.

    The message says what was given, what was expected and what to do.
    """


class NotAvailableError(InputError):
    """What was asked for is not to be had on this machine, or not with this model; another engine may have it."""


class NotFiniteError(InputError):
    """The model overflowed: there are NaN or infinite values where an image should be."""


def reason(error: OSError | ValueError) -> str:
    """Why the system refused a path, in its own words, but without its numbers and the path."""
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return "the name holds a zero byte" if "null" in str(error) else str(error)


@contextmanager
def requires(extra: str, purpose: str) -> Generator[None, None, None]:
    """Imports in this block are of packages that come with an extra.

    Args:
        extra: Its name in pyproject.toml.
        purpose: What needs them, as in "exporting".

    Raises:
        InputError: One of them is not here; with the command that installs it.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{purpose} needs a package that is not here ({error}); install it with: pip install 'mige-rt[{extra}]'"
        ) from error
