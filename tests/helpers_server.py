"""A server of the tiny model on a thread, and what it should say."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from openai import OpenAI

from salience.chat.prompt import encode
from salience.runtime import Engine, Result, Sampling
from salience.server.app import make_app
from salience.server.guard import Limits
from salience.server.metrics import Metrics
from salience.server.run import Server, bound, make_server
from salience.server.service import Service
from tiny_models import llama_config, make_model, make_tokenizer

MESSAGES: list[Any] = [
    {"role": "user", "content": "what is a module"},
]


class Served:
    """A running server."""

    def __init__(self, service: Service, server: Server, port: int) -> None:
        self.service = service
        self.server = server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def settles(self, what: Callable[[], bool], seconds: float = 10.0) -> bool:
        """Whether something becomes true."""
        until = time.monotonic() + seconds
        while not what() and time.monotonic() < until:
            time.sleep(0.01)
        return what()

    @property
    def is_idle(self) -> bool:
        worker = self.service.worker
        return worker.open == 0 and worker.running == 0 and worker.engine.waiting == 0

    def reply(self, sampling: Sampling, messages: Sequence[Any] = MESSAGES) -> Result:
        """What an engine says by itself."""
        prompt = encode(self.service.tokenizer, messages)
        model = self.service.engine.model
        engine = Engine(model, self.service.tokenizer, max_context=2048, fast=False)
        return engine.generate([prompt], sampling)[0]

    def connect(self) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return made


def tiny_engine(slots: int = 4, context: int = 2048) -> Engine:
    """An engine of the tiny model."""
    model = make_model(llama_config(max_position_embeddings=2048)).requires_grad_(False)
    return Engine(model, make_tokenizer(), max_batch=slots, max_context=context)


@contextmanager
def serving(
    engine: Engine | None = None,
    limits: Limits | None = None,
    queue: int = 64,
    cors: Sequence[str] = (),
    drain_seconds: float = 30.0,
    **service: Any,
) -> Iterator[Served]:
    """A server for a while."""
    engine = engine or tiny_engine()
    metrics = Metrics()
    made = Service(engine, engine.tokenizer, "tiny", queue=queue, watch=metrics, **service)
    app = make_app(made, metrics, limits, cors)
    server = make_server(app, made, drain_seconds)
    with bound("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        served = Served(made, server, sock.getsockname()[1])
        try:
            assert served.settles(lambda: server.started)
            yield served
        finally:
            server.drain()
            thread.join(2)
            if thread.is_alive():
                server.drain()
            thread.join(20)
            assert not thread.is_alive()


def raw(sock: socket.socket, request: bytes) -> tuple[int, bytes]:
    """The status and all bytes that come for some bytes, until the server closes or a body ends."""
    sock.sendall(request)
    return read_answer(sock)


def read_answer(sock: socket.socket) -> tuple[int, bytes]:
    """The status and the body of an answer."""
    got = b""
    while b"\r\n\r\n" not in got:
        part = sock.recv(65536)
        if not part:
            break
        got += part
    head, _, body = got.partition(b"\r\n\r\n")
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    while len(body) < length:
        part = sock.recv(65536)
        if not part:
            break
        body += part
    return int(head.split()[1]), body


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A request."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
