"""A stand-in for the server, and what tests of the page say often.

The stand-in speaks the server's protocol and does what a test says, so that the page can be tested
without a model. One thread a request; each body is kept for the test to look at.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from typing import Any

from salience.server.page import HEADERS, PAGE

GIB = 2**30
Open = Callable[..., Any]  # a page, by the fixture `visit`


@dataclass
class Refusal(Exception):
    status: int
    message: str
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


def pieces(text: str, size: int = 4) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def echo(body: dict[str, Any]) -> Iterable[str]:
    return pieces(f"You said: {body['messages'][-1]['content']}")


class FakeServer:
    """`with FakeServer() as server`; the attributes may be changed between requests.

    Args:
        reply: the pieces of the answer to a body; raises Refusal to refuse it, before the first
            piece as an answer of its own, later by closing the connection.
        delay: seconds before each piece.
        key: the API key that is wanted, or None.
    """

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Iterable[str]] = echo
        self.delay = 0.0
        self.key: str | None = None
        self.model = "tiny-w4g64"
        self.finish_reason = "stop"
        self.bodies: list[dict[str, Any]] = []
        self.left = threading.Event()  # a client went away in the middle of an answer
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def reset(self) -> None:
        self.reply, self.delay, self.key, self.finish_reason = echo, 0.0, None, "stop"
        self.bodies.clear()
        self.left.clear()

    def health(self) -> dict[str, Any]:
        memory = {"resident": int(0.4 * GIB), "available": 6 * GIB, "gpu_tensors": 0}
        memory |= {"gpu_reserved": 0, "gpu_used": 0, "gpu_total": 0}
        return {
            "status": "ok",
            "model": self.model,
            "context": 2048,
            "slots": {"total": 4, "running": 0, "waiting": 0},
            "memory": memory,
            "tokens_per_second": 0.0,
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def json(self, value: Any, status: int = 200, **headers: str) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                for name, text in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def refuse(self, refusal: Refusal) -> None:
                error = {"message": refusal.message, "type": "x", "param": None}
                self.json(
                    {"error": error | {"code": refusal.code}}, refusal.status, **refusal.headers
                )

            def known(self) -> bool:
                sent = self.headers.get("Authorization")
                return fake.key is None or sent == f"Bearer {fake.key}"

            def do_GET(self) -> None:
                if self.path == "/":
                    self.send_response(200)
                    for name, text in HEADERS.items():
                        self.send_header(name, text)
                    self.end_headers()
                    self.wfile.write(PAGE)
                elif self.path == "/health":
                    self.json(fake.health() if self.known() else {"status": "ok"})
                elif not self.known():
                    self.refuse(Refusal(401, "the API key is wrong or missing"))
                elif self.path == "/v1/models":
                    self.json({"object": "list", "data": [{"id": fake.model}]})
                else:
                    self.refuse(Refusal(404, f"there is no {self.path}"))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.bodies.append(body)
                if not self.known():
                    return self.refuse(Refusal(401, "the API key is wrong or missing"))
                try:
                    answer = iter(fake.reply(body))
                    first = next(answer, None)
                except Refusal as refusal:
                    return self.refuse(refusal)
                try:
                    self.stream(first, answer)
                except ConnectionError:
                    fake.left.set()
                except Refusal:
                    self.connection.close()

            def event(self, value: Any) -> None:
                self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

            def stream(self, first: str | None, rest: Iterable[str]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                self.end_headers()
                delta: dict[str, Any] = {"role": "assistant", "content": ""}
                self.event({"model": fake.model, "choices": [{"index": 0, "delta": delta}]})
                count = 0
                for piece in () if first is None else chain([first], rest):
                    time.sleep(fake.delay)
                    count += 1
                    choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
                    self.event({"model": fake.model, "choices": [choice]})
                end = {"index": 0, "delta": {}, "finish_reason": fake.finish_reason}
                self.event({"model": fake.model, "choices": [end]})
                usage = {"prompt_tokens": 20, "completion_tokens": count}
                self.event({"model": fake.model, "choices": [], "usage": usage})
                self.wfile.write(b"data: [DONE]\n\n")

        return Handler


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")
    settled(page)


def until(page: Any, expression: str) -> None:
    """Playwright's own way of waiting is eval, which the page's policy forbids."""
    end = time.monotonic() + 15
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never: {expression}"
        time.sleep(0.02)


def settled(page: Any) -> None:
    until(page, "!document.querySelector('[aria-busy]') && runs.size === 0")


def said(page: Any) -> list[str]:
    return page.locator(".message > :first-child").all_inner_texts()
