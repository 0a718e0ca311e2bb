"""Errors as OpenAI's API words them: a status, and one sentence with a type and a code."""

from collections.abc import Mapping

from fastapi.responses import JSONResponse

from mige_rt.serve.protocol import Failed

CLIENT_CLOSED_REQUEST = 499  # nginx's: the client has gone, nobody reads the answer

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_STATUSES = {
    "invalid_request": (400, None),
    "server_error": (500, "engine_error"),
    "timeout": (504, "deadline_exceeded"),
    "queue_full": (429, "queue_full"),
    "cancelled": (CLIENT_CLOSED_REQUEST, None),
}


class ApiError(Exception):
    """What a request is answered with instead of images.

    Attributes:
        status: Of HTTP.
        message: One sentence for the client.
        param: The field that is to blame, or None.
        code: For programs, or None.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, failure: Failed) -> "ApiError":
        """The error that a failed image's request is answered with."""
        status, code = _STATUSES[failure.kind]
        headers = {} if failure.retry_after is None else {"Retry-After": str(failure.retry_after)}
        return cls(status, failure.message, code=code, headers=headers)

    def content(self) -> dict[str, object]:
        """In OpenAI's shape."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.content(), self.status, self.headers)
