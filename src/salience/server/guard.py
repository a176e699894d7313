"""What is checked before a route runs: the key, the kind and size of the body, and its speed.

A plain ASGI layer: it reads the whole body, counting, before FastAPI sees the request, so a body
that has no length, lies about it or never ends costs no more than the limit. A body that is too
long is read on for a while and thrown away, since most clients read no answer before they have sent
everything.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from salience.server.errors import ApiError

_OPEN = ("/", "/health", "/openapi.json", "/favicon.ico")
_THROWN_AWAY = 8  # times the limit
access_log = logging.getLogger("salience.access")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes.

    Args:
        api_key: that clients must have; None for none.
        body_bytes: of a request.
        body_seconds: that it may take to arrive.
    """

    api_key: str | None = None
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0


def answer(error: ApiError) -> Response:
    """The response of an error."""
    return JSONResponse(error.body(), error.status, error.headers())


def authorized(scope: Scope, key: str | None) -> bool:
    """Whether a request has the key, in a time that tells nothing of how near it came."""
    if key is None:
        return True
    given = b""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            given = value[7:].strip()
    # Digests have one length, so that this is not told either.
    ours, theirs = (hashlib.sha256(each).digest() for each in (key.encode(), given))
    return hmac.compare_digest(ours, theirs)


class Guard:
    """The layer around an app.

    Args:
        app: that answers.
        limits: what it takes.
        answered: called with the path and the status of each answer.
    """

    def __init__(self, app: ASGIApp, limits: Limits, answered: Callable[[str, int], None]) -> None:
        self._app = app
        self._limits = limits
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # what logs call a client that went away

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, noting)
        except Exception:
            status = 500 if status == 499 else status
            raise
        finally:
            self._answered(scope["path"], status)
            access_log.info("%s", _Line(scope, status, time.perf_counter() - start))

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] not in _OPEN and not authorized(scope, self._limits.api_key):
                message = "the API key is missing or wrong; send Authorization: Bearer KEY"
                raise ApiError(message, 401, code="invalid_api_key")
            if scope["method"] == "POST":
                _check_kind(scope)
                receive = _replayed(await self._body(scope, receive), receive)
        except ApiError as error:
            await answer(error)(scope, receive, send)
            return
        except _GoneError:
            return
        await self._app(scope, receive, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit, until = self._limits.body_bytes, time.monotonic() + self._limits.body_seconds
        told = dict(scope["headers"]).get(b"content-length", b"0")
        parts: list[bytes] = []
        count, more = 0, True
        while more and count <= limit * _THROWN_AWAY:
            try:
                message = await asyncio.wait_for(receive(), max(until - time.monotonic(), 0.001))
            except asyncio.TimeoutError:
                if count > limit:
                    break
                seconds = self._limits.body_seconds
                raise ApiError(f"the body did not arrive within {seconds:g} s", 408) from None
            if message["type"] == "http.disconnect":
                raise _GoneError
            body, more = message.get("body", b""), message.get("more_body", False)
            count += len(body)
            if count <= limit:
                parts.append(body)
            else:
                parts.clear()
        if count > limit or (told.isdigit() and int(told) > limit):
            raise ApiError(f"the body is longer than {limit} bytes", 413, code="body_too_large")
        return b"".join(parts)


def _check_kind(scope: Scope) -> None:
    """Refuse a body that does not say it is JSON: a page elsewhere can send others unasked."""
    kind = dict(scope["headers"]).get(b"content-type", b"").split(b";")[0].strip().lower()
    if not (kind == b"application/json" or kind.endswith(b"+json")):
        raise ApiError("the body must be JSON; send Content-Type: application/json", 415)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives a body at once, then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


class _GoneError(Exception):
    """The client went away."""


class _Line:
    """A line of the access log, made when it is written."""

    def __init__(self, scope: Scope, status: int, seconds: float) -> None:
        client: Any = scope.get("client") or (None,)
        self._values = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": client[0],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
        }

    def __str__(self) -> str:
        return json.dumps(self._values)
