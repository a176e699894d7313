"""Load on `salience serve`: many streaming clients, clients that leave, second turns.

    python benchmarks/serve_load.py MODEL --clients 64 --seconds 60 [-o FILE]
    python benchmarks/serve_load.py MODEL --disconnects 200 --minutes 10
    python benchmarks/serve_load.py MODEL --second-turn 1024

It starts the server itself, on a free port. `--clients N` also measures one client alone first, for
as long: aggregate tokens a second are compared with its. Clients ask again as soon as they have
their reply, with prompts of 20 to 60 words and replies of 16 to 64 tokens.

Targets: no error; the worst time to first token at most 4 times the median; 3 times the tokens a
second of one client; no slot in use and a flat RSS after clients that left; the first token of a
second turn with N tokens of history at most 1.3 times as late as that of a first turn.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from salience.machine import describe

WORDS = [
    "river",
    "stone",
    "paper",
    "engine",
    "garden",
    "light",
    "winter",
    "number",
    "music",
    "letter",
    "bridge",
    "station",
    "island",
    "market",
    "forest",
    "window",
    "history",
    "science",
    "village",
    "machine",
    "question",
    "answer",
    "morning",
    "painter",
]


class Server:
    """`salience serve` in a process of its own."""

    def __init__(self, model: str, *options: str) -> None:
        command = [sys.executable, "-m", "salience", "serve", model, "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said = ""
        while not (found := re.search(r"served at (http://\S+)", said)):
            line = self.process.stderr.readline()
            if not line:
                raise SystemExit(f"the server did not start: {said}")
            said += line
        self.url = found[1]
        os.set_blocking(self.process.stderr.fileno(), False)
        while True:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        self.model = httpx.get(f"{self.url}/health").json()["model"]

    def health(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/health", timeout=60).json())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def prompt(generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(20, 60)))


async def ask(
    client: httpx.AsyncClient, url: str, messages: list[dict[str, str]], tokens: int, **more: Any
) -> dict[str, Any]:
    """One streamed reply: seconds to the first text, text, usage, times of the chunks."""
    body = {
        "messages": messages,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **more,
    }
    start, first, text, usage = time.perf_counter(), None, "", None
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content")
                if piece or choice["finish_reason"]:
                    first = first or time.perf_counter()
                    text += piece or ""
    if usage is None or first is None:
        raise RuntimeError("the stream ended early")
    return {"first": first - start, "text": text, "usage": usage, "end": time.perf_counter()}


async def load(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    """So many clients for some time; each asks again as soon as it has its reply."""
    until = time.perf_counter() + seconds
    firsts: list[float] = []
    errors: list[str] = []
    began, tokens = time.perf_counter(), 0
    ends: list[float] = []
    limits = httpx.Limits(max_connections=clients)

    async def one(number: int, client: httpx.AsyncClient) -> None:
        nonlocal tokens
        generator = random.Random(number)
        while time.perf_counter() < until:
            messages = [{"role": "user", "content": prompt(generator)}]
            try:
                count = generator.randint(16, 64)
                said = await ask(client, server.url, messages, count, temperature=0.7)
            except (RuntimeError, httpx.HTTPError) as error:
                errors.append(f"{type(error).__name__}: {error}")
                continue
            firsts.append(said["first"])
            tokens += said["usage"]["completion_tokens"]
            ends.append(said["end"])

    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        await asyncio.gather(*(one(i, client) for i in range(clients)))
    return {
        "clients": clients,
        "replies": len(firsts),
        "errors": errors,
        "tokens_per_second": tokens / (max(ends) - began),
        "first_token_median": statistics.median(firsts),
        "first_token_worst": max(firsts),
        "worst_to_median": max(firsts) / statistics.median(firsts),
    }


async def leave(server: Server, count: int, minutes: float) -> dict[str, Any]:
    """Clients that go away in the middle of their streams, then rounds of them for some time."""
    resident: list[tuple[float, int]] = []
    start = time.monotonic()

    async def one(number: int, client: httpx.AsyncClient) -> None:
        generator = random.Random(number)
        messages = [{"role": "user", "content": prompt(generator)}]
        body = {"messages": messages, "stream": True, "ignore_eos": True, "max_tokens": 1000}
        async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer:
            wanted = generator.randint(1, 5)
            async for line in answer.aiter_lines():
                wanted -= '"content"' in line
                if wanted < 0:
                    return

    rounds = 0
    while True:
        async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=100)) as c:
            await asyncio.gather(*(one(rounds * count + i, c) for i in range(count)))
        rounds += 1
        until = time.monotonic() + 30
        while (slots := server.health()["slots"])["running"] + slots["waiting"]:
            if time.monotonic() > until:
                break
            await asyncio.sleep(0.1)
        resident.append((time.monotonic() - start, server.health()["memory"]["resident"]))
        if time.monotonic() - start >= 60 * minutes:
            break
    later = resident[len(resident) // 4 :]  # buffers have their size by then
    slope = 0.0
    if len(later) > 1:
        slope = statistics.linear_regression(*zip(*later, strict=True)).slope
    return {
        "clients": rounds * count,
        "slots_in_use": slots["running"] + slots["waiting"],
        "resident_first": resident[0][1],
        "resident_last": resident[-1][1],
        "mebibytes_per_minute": 60 * slope / 2**20,
    }


async def second_turn(server: Server, history: int, rounds: int) -> dict[str, Any]:
    """First tokens of first turns, and of turns after a talk that say as much that is new.

    The talk is a long text and as many short turns as make up its length, with replies drawn at
    temperature 1 up to their own ends: a reply that goes on after its end (`ignore_eos`) has tokens
    that its text does not show, which no next turn can have.
    """
    first, later, cached, long = [], [], [], []
    async with httpx.AsyncClient(timeout=600) as client:
        for number in range(rounds):
            generator = random.Random(number)

            def words(count: int, generator: random.Random = generator) -> dict[str, str]:
                return {"role": "user", "content": " ".join(generator.choices(WORDS, k=count))}

            talk = [words(40)]
            first.append((await ask(client, server.url, talk, 2, temperature=0))["first"])
            talk, had = [words(history // 2)], 0
            while had < history:
                said = await ask(
                    client,
                    server.url,
                    talk,
                    min(history // 4, max(history - had, 16)),
                    temperature=1.0,
                    seed=number + len(talk),
                    ignore_eos=False,
                )
                had = said["usage"]["prompt_tokens"] + said["usage"]["completion_tokens"]
                talk += [{"role": "assistant", "content": said["text"]}, words(40)]
            again = await ask(client, server.url, talk, 2, temperature=0)
            later.append(again["first"])
            cached.append(again["usage"]["prompt_tokens_details"]["cached_tokens"])
            long.append(again["usage"]["prompt_tokens"])
    return {
        "cached_tokens": cached,
        "prompt_tokens": long,
        "first_turn": statistics.median(first),
        "second_turn": statistics.median(later),
        "ratio": statistics.median(later) / statistics.median(first),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--disconnects", type=int)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--second-turn", type=int, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", default="", help="more options of salience serve")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    server = Server(options.model, *options.serve.split())
    result: dict[str, Any] = {"model": options.model, "serve": options.serve, **describe()}
    try:
        if options.clients:
            alone = asyncio.run(load(server, 1, options.seconds))
            many = asyncio.run(load(server, options.clients, options.seconds))
            ratio = many["tokens_per_second"] / alone["tokens_per_second"]
            result["load"] = {"alone": alone, "many": many, "ratio": ratio}
            result["slots"] = server.health()["slots"]
        if options.disconnects:
            result["leave"] = asyncio.run(leave(server, options.disconnects, options.minutes))
        if options.second_turn:
            turns = asyncio.run(second_turn(server, options.second_turn, options.rounds))
            result["second_turn"] = turns
    finally:
        server.stop()
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
