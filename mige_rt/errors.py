"""The one error that is the user's to mend."""


class InputError(ValueError):
    """What the user gave cannot be used; the command line prints it and exits with 2.

    The message says what was given, what was expected and what to do.
    """
