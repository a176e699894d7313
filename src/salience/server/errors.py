"""Errors as OpenAI's clients know them: a status and {"error": {message, type, param, code}}.

Their Python client raises by the status alone (400 BadRequestError, 429 RateLimitError, ...) and
tries 408, 409, 429 and 5xx again, after the seconds of `Retry-After`.
"""

from http import HTTPStatus
from typing import Any

from salience.errors import SalienceError

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """What a request is refused or ended with.

    Args:
        message: one line for the user.
        status: of HTTP.
        param: the field at fault.
        code: what programs compare.
        retry_after: seconds after which it may go better.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        # Messages quote what clients sent: SalienceError escapes and cuts it.
        super().__init__(str(SalienceError(message)))
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """What is answered."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code or HTTPStatus(self.status).name.lower(),
            }
        }

    def headers(self) -> dict[str, str]:
        """Beside the body."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers
