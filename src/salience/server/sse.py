"""Server-sent events, and work that ends when its client goes away.

Starlette notices a client that left only when the next chunk is sent, or not at all. Here a task
waits for the disconnect beside the one that works, and the first to end ends the other.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from salience.server.errors import ApiError

_T = TypeVar("_T")

DONE = b"data: [DONE]\n\n"


def data(value: Any, event: str | None = None) -> bytes:
    """One frame. JSON has no bare line end, so it is one line."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


def failure(error: ApiError) -> bytes:
    """The frame of an error in the middle of a stream, as OpenAI sends it."""
    return data(error.body())


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Frames as they come. The generator is closed as soon as the client goes away.

    Args:
        frames: an async generator of whole frames.
        on_error: the frame of an ApiError that it raises.
        seconds: that a client may take to make room for a frame.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        on_error: Callable[[ApiError], bytes] = failure,
        seconds: float = 120.0,
    ) -> None:
        self.background = None
        self.status_code = 200
        self._frames = frames
        self._on_error = on_error
        self._seconds = seconds
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    def init_headers(self, headers: Any = None) -> None:
        super().init_headers(headers)
        # There is no length before the end.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            sending.cancel()
            _, ended = await asyncio.gather(gone, sending, return_exceptions=True)
            await self._frames.aclose()
        if isinstance(ended, Exception) and not isinstance(ended, asyncio.TimeoutError):
            raise ended

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for frame in self._frames:
                await self._part(send, frame, more=True)
        except ApiError as error:
            await self._part(send, self._on_error(error), more=True)
        await self._part(send, b"", more=False)

    async def _part(self, send: Send, body: bytes, more: bool) -> None:
        message = {"type": "http.response.body", "body": body, "more_body": more}
        await asyncio.wait_for(send(message), self._seconds)


async def until_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What a coroutine returns; it is cancelled when the client of a request goes away.

    Raises:
        ClientGoneError: it went away.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.gather(gone, working, return_exceptions=True)


class ClientGoneError(Exception):
    """The client went away; there is nobody to answer."""
