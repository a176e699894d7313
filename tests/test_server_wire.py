"""The server and clients that do not behave: what they send, how slowly, and that they leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from helpers_server import MESSAGES, Served, post, raw, read_answer, serving, tiny_engine
from salience.server.guard import Limits

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(limits=Limits(body_bytes=2**20, body_seconds=1.0)) as made:
        yield made


def body(**changes: Any) -> bytes:
    values = {"messages": MESSAGES, "max_tokens": 2, "temperature": 0, **changes}
    return json.dumps(values).encode()


def refused(answer: tuple[int, bytes], status: int) -> str:
    """The message of an error that has OpenAI's shape."""
    assert answer[0] == status, answer
    error = json.loads(answer[1])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"] and "\n" not in error["message"]
    return str(error["message"])


def lives(served: Served) -> bool:
    with served.connect() as sock:
        return raw(sock, post(CHAT, body()))[0] == 200


BROKEN = {
    "cut": b'{"messages": [{"role": "us',
    "empty": b"",
    "garbage": bytes(range(256)) * 8,
    "not an object": b"[1, 2]",
    "a number": b"1" * 5000,
    "not UTF-8": b'{"messages": "\xff\xfe"}',
    "half a surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "deep": b"[" * 100_000,
    "a key twice and NaN": b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
    "null messages": b'{"messages": null}',
    "a deep message": b'{"messages": [{"role": {"a": []}, "content": "x"}]}',
    "a wrong template variable": body(chat_template_kwargs={"messages": 3}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bodies_that_are_no_requests(served: Served, name: str) -> None:
    with served.connect() as sock:
        refused(raw(sock, post(CHAT, BROKEN[name])), 400)
    assert lives(served)


def test_ten_megabytes(served: Served) -> None:
    big = body(padding="x" * 10_000_000)
    with served.connect() as sock:
        assert "longer than 1048576 bytes" in refused(raw(sock, post(CHAT, big)), 413)
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(p), p)
        for p in [big[i : i + 65536] for i in range(0, len(big), 65536)]
    )
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with served.connect() as sock:
        request = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
        refused(raw(sock, request), 413)
    assert lives(served)


def test_a_body_that_never_comes(served: Served) -> None:
    with served.connect() as sock:
        start = time.monotonic()
        assert "within 1 s" in refused(raw(sock, post(CHAT, b'{"me', length=100)), 408)
        assert time.monotonic() - start < 5
    with served.connect() as sock:
        sock.sendall(post(CHAT, b"", length=1000))
        for _ in range(12):  # a byte now and then does not buy more time
            time.sleep(0.1)
            try:
                sock.sendall(b" ")
            except OSError:
                break
        refused(read_answer(sock), 408)
    assert lives(served)


def test_other_routes_methods_and_kinds(served: Served) -> None:
    with httpx.Client(base_url=served.url) as client:
        for answer, status in (
            (client.get("/v2/nothing"), 404),
            (client.get(CHAT), 405),
            (client.post("/v1/models", json={}), 405),
            (client.post(CHAT, content=body(), headers={"Content-Type": "text/plain"}), 415),
            (client.post(CHAT, content=body()), 415),
        ):
            refused((answer.status_code, answer.content), status)
        assert client.get(CHAT).headers["allow"] == "POST"
        document = client.get("/openapi.json").json()
        assert CHAT in document["paths"] and "description" in document["info"]


def test_bytes_that_are_no_http(served: Served) -> None:
    with served.connect() as sock:
        sock.sendall(os.urandom(4096) + b"\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 400")
    assert lives(served)


def test_clients_that_leave_free_their_slots(served: Served) -> None:
    before = served.service.worker.engine
    for stream in (True, False):
        request = post(CHAT, body(max_tokens=2000, stream=stream, ignore_eos=True))
        socks = [served.connect() for _ in range(8)]  # twice the slots: half of them wait
        for sock in socks:
            sock.sendall(request)
        assert served.settles(lambda: served.service.worker.open == 8)
        assert served.settles(lambda: before.free_slots == 0)
        if stream:
            assert b"assistant" in socks[0].recv(4096)
        for sock in socks:
            sock.close()
        assert served.settles(lambda: served.is_idle, 3), "they would take longer to finish"
    assert lives(served)


def test_a_client_that_reads_nothing_loses_nothing(served: Served) -> None:
    request = post(CHAT, body(max_tokens=600, stream=True, ignore_eos=True))
    with served.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(request + post("/tokenize", b"{}", "Connection: close"))
        assert served.settles(lambda: served.is_idle), "it holds up no slot"
        got = b""
        while part := sock.recv(65536):
            got += part
    lines = [line for line in got.split(b"\n") if line.startswith(b"data: {")]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines]
    text = "".join(delta.get("content", "") for delta in deltas)
    answer = httpx.post(
        served.url + CHAT, json=json.loads(body(max_tokens=600, ignore_eos=True)), timeout=60
    )
    assert text == answer.json()["choices"][0]["message"]["content"]


def test_health_and_metrics(served: Served) -> None:
    assert lives(served)
    said = httpx.get(f"{served.url}/health").json()
    assert said["status"] == "ok" and said["model"] == "tiny" and said["context"] == 2048
    assert said["slots"] == {"total": 4, "running": 0, "waiting": 0}
    assert said["memory"]["resident"] > 2**20
    text = httpx.get(f"{served.url}/metrics").text
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    assert values["salience_time_to_first_token_seconds_count"] >= 1
    assert values["salience_generated_tokens_total"] >= 2
    assert values["salience_slots"] == 4 and values["salience_slots_in_use"] == 0
    assert values[f'salience_requests_total{{route="{CHAT}",status="200"}}'] >= 1
    assert values["salience_cache_tokens"] > 0


def test_tokenize_and_back(served: Served) -> None:
    with httpx.Client(base_url=served.url) as client:
        answer = client.post("/tokenize", json={"prompt": "the module"}).json()
        assert answer["count"] == len(answer["tokens"])
        back = client.post("/detokenize", json={"tokens": answer["tokens"]}).json()
        assert back == {"prompt": "the module"}
        wrong = client.post("/detokenize", json={"tokens": [-1]})
        refused((wrong.status_code, wrong.content), 400)


def test_what_a_key_covers() -> None:
    with serving(limits=Limits(api_key="k"), cors=["https://a.example"]) as served:
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
        headers = {"Authorization": "Bearer k"}
        assert "slots" in httpx.get(f"{served.url}/health", headers=headers).json()
        for path in ("/metrics", "/v1/models", "/nothing"):
            answer = httpx.get(served.url + path)
            refused((answer.status_code, answer.content), 401)
        # A page of that origin may ask; no other.
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            answer = httpx.options(served.url + CHAT, headers=asks)
            assert ("access-control-allow-origin" in answer.headers) == allowed
            answer = httpx.get(f"{served.url}/v1/models", headers={"Origin": origin, **headers})
            assert ("access-control-allow-origin" in answer.headers) == allowed


def test_no_other_page_may_read_by_default(served: Served) -> None:
    answer = httpx.get(f"{served.url}/v1/models", headers={"Origin": "https://a.example"})
    assert "access-control-allow-origin" not in answer.headers


def _stream_of(served: Served, count: int) -> tuple[threading.Thread, list[Any]]:
    """A stream that another thread reads: its chunks, or the error at its end."""
    chunks: list[Any] = []

    def read() -> None:
        try:
            chunks.extend(
                served.client().chat.completions.create(
                    model="tiny",
                    messages=MESSAGES,
                    max_tokens=count,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
            )
        except (openai.APIError, httpx.HTTPError) as error:
            chunks.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert served.settles(lambda: served.service.worker.running == 1)
    return thread, chunks


def test_a_drain_lets_replies_finish_and_takes_no_new_ones() -> None:
    with serving(drain_seconds=30) as served:
        thread, chunks = _stream_of(served, 500)
        served.server.drain()
        assert served.settles(lambda: served.service.worker.state == "draining")
        answer = httpx.post(
            served.url + CHAT, content=body(), headers={"Content-Type": "application/json"}
        )
        assert "shutting down" in refused((answer.status_code, answer.content), 503)
        assert "retry-after" in answer.headers
        health = httpx.get(f"{served.url}/health")
        assert health.status_code == 503 and health.json()["status"] == "draining"
        thread.join(30)
        assert chunks[-1].choices[0].finish_reason == "length"


def test_a_drain_ends_what_takes_too_long() -> None:
    with serving(drain_seconds=0.2) as served:
        thread, chunks = _stream_of(served, 2000)
        served.server.drain()
        thread.join(10)
        assert isinstance(chunks[-1], openai.APIError) and "shutting down" in str(chunks[-1])


@pytest.mark.slow
def test_the_command_ends_by_a_signal(tmp_path: Path, llama: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a secret\nmore\n")
    command = [sys.executable, "-m", "salience", "serve", str(llama), "--port", "0"]
    command += ["--served-model-name", "mine", "--api-key", str(key), "--access-log"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "mine is served at http://127.0.0.1:" in line, line
        url = line.split(" ")[4]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="a secret", max_retries=5)
        answer = client.chat.completions.create(model="mine", messages=MESSAGES, max_tokens=2)
        assert answer.usage is not None and answer.usage.completion_tokens == 2
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(20) == 0
    assert '"status": 200' in rest and "Traceback" not in rest


def test_the_fields_of_the_engine_are_empty_after_all(served: Served) -> None:
    assert served.is_idle and served.service.worker.tokens_per_second >= 0
    assert tiny_engine().cache_tokens == 0
