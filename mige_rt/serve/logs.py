"""The server's log on stderr, as lines of text or of JSON. Nothing in it is of a request's content."""

import logging
from typing import Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_FIELDS = ("levelname", "name", "message")
_LEFT_OUT = [*RESERVED_ATTRS, "color_message"]  # uvicorn's message once more, for terminals


def configure_logging(log_format: LogFormat) -> None:
    """Let the root logger write to stderr.

    Args:
        log_format: `json`: an object a line with `timestamp` (ISO 8601, UTC), `level`, `logger`, `message`, what a call
            gave as `extra`, and the traceback, if any, as `exc_info`.
    """
    handler = logging.StreamHandler()
    if log_format == "json":
        names = {"levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter(_FIELDS, rename_fields=names, reserved_attrs=_LEFT_OUT, timestamp=True))
    else:
        handler.setFormatter(logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
