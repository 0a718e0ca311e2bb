"""The errors that are the user's to mend."""


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
