"""Runs an app by uvicorn until a signal ends it, and lets replies finish first.

The first SIGTERM or SIGINT: no new requests (503), running ones go on for a while; then what is
left ends, the sockets close, and the process. A second signal ends it at once.
"""

import asyncio
import socket
from types import FrameType
from typing import Any

import uvicorn

from salience.errors import SalienceError
from salience.server.service import Service

_BACKLOG = 2048
_CLOSING_SECONDS = 2  # for answers on their way, after the replies have ended


class Server(uvicorn.Server):
    """uvicorn's, which drains at the first signal."""

    def __init__(self, config: uvicorn.Config, service: Service, seconds: float) -> None:
        super().__init__(config)
        self._service = service
        self._seconds = seconds
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.drain()

    def drain(self) -> None:
        """End it; called again, at once. From any thread."""
        if self._loop is None or self._loop.is_closed():
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            self._service.worker.abandon()
            return
        self._draining = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        await self._service.worker.drain(self._seconds)
        self.should_exit = True


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        SalienceError: the address is not to be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        message = f"--host {host} --port {port} cannot be listened on: {error}"
        raise SalienceError(message) from error
    return made


def make_server(app: Any, service: Service, drain_seconds: float = 30.0) -> Server:
    """A server whose `run(sockets=[...])` returns when a signal, or `drain`, has ended it.

    Args:
        app: of `make_app`.
        service: the app's.
        drain_seconds: that running replies may take after the signal.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
        ws="none",
    )
    return Server(config, service, drain_seconds)
