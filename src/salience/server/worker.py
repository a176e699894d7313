"""The thread that steps the engine, and the streams by which replies come to the event loop.

One thread owns the engine: it takes over what was asked for since the last step, steps, and hands
all that the step made to the event loop in one call. While nothing runs it sleeps. Nobody else
waits for the engine's lock, which a step holds from its beginning to its end.

A stream joins the pieces that its client was too slow to take. A reply is no longer than the
context, so that is also the bound of what a slow client costs; it never holds up a step.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from torch import Tensor

from salience.errors import SalienceError
from salience.runtime import Engine, Event, Request, Sampling, TokenLogprob
from salience.server.errors import ApiError

_logger = logging.getLogger(__name__)
_FAILURES = 3  # steps in a row
_RATE_SECONDS = 5.0  # that `tokens_per_second` looks back

State = Literal["ok", "draining", "failed"]


class Guide(Protocol):
    """What a guided reply may say. `mask` is int32 [vocabulary / 32], on the CPU."""

    def mask(self, left: int | None = None) -> Tensor: ...

    def accept(self, token: int) -> None: ...


class Watch(Protocol):
    """Who is told of what happens: the metrics. Called by the worker's thread."""

    def began(self, prompt_tokens: int, cached_tokens: int, seconds: float) -> None: ...

    def drew(self, tokens: int, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Job:
    """What to generate.

    Args:
        prompt: its tokens.
        sampling: of each reply; reply i is drawn with seed + i.
        n: replies.
        guide: makes a guide for a reply; None for any text.
        ended: is told of each reply that ended, on the engine's thread.
    """

    prompt: Sequence[int]
    sampling: Sampling
    n: int = 1
    guide: Callable[[], Guide] | None = None
    ended: Callable[[Request], None] | None = None


@dataclass(slots=True)
class Piece:
    """What was added to reply `index`. The last one has a finish_reason: "stop" or "length"."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, other: "Piece") -> None:
        """Join what comes after."""
        self.text += other.text
        self.tokens += other.tokens
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason


class Stream:
    """The replies of a job, on the event loop. `async with` it, so that leaving ends it:

    async with await service.start(job) as stream:
        async for piece in stream: ...
    """

    def __init__(self, job: Job, close: Callable[["Stream"], None]) -> None:
        self.job = job
        self.prompt_tokens = len(job.prompt)
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.left = job.n  # replies that go on
        self.error: ApiError | None = None
        self._pending: dict[int, Piece] = {}
        self._wake = asyncio.Event()
        self._close = close

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what still runs. Takes effect before the next step."""
        if self.left:
            self._close(self)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces, all there are at a time of a reply joined.

        Raises:
            ApiError: the engine failed or the server ends.
        """
        while self.left or self._pending or self.error:
            if not self._pending:
                if self.error is not None:
                    raise self.error
                self._wake.clear()
                await self._wake.wait()
            pending, self._pending = self._pending, {}
            for piece in pending.values():
                yield piece

    def put(self, index: int, event: Event) -> None:
        """Take a step's result."""
        ended = bool(event.tokens) and event.tokens[-1] in event.request.ends
        logprobs = [] if ended else list(event.logprobs)  # the end is no part of the reply
        piece = Piece(index, event.text, list(event.tokens), logprobs, event.finish_reason)
        if index in self._pending:
            self._pending[index].add(piece)
        else:
            self._pending[index] = piece
        self.completion_tokens += len(event.tokens)
        self.cached_tokens = max(self.cached_tokens, event.request.cached)
        self.left -= event.finish_reason is not None
        self._wake.set()

    def fail(self, error: ApiError) -> None:
        """End it."""
        self.error, self.left = error, 0
        self._wake.set()


@dataclass(slots=True)
class _Reply:
    """One of a stream's replies, on the worker's side."""

    stream: Stream
    index: int
    guide: Guide | None
    asked: float
    last: float = 0.0  # when its last token came


class Worker:
    """Steps an engine while there is anything to do.

    Args:
        engine: nobody else's.
        queue: replies that may wait for a slot.
        watch: told of tokens.
    """

    def __init__(self, engine: Engine, queue: int = 256, watch: Watch | None = None) -> None:
        self.engine = engine
        self.most = engine.max_batch + queue
        self.state: State = "ok"
        self.open = 0  # replies that are asked for and not finished
        self._watch = watch
        self._loop: asyncio.AbstractEventLoop | None = None
        self._condition = threading.Condition()
        self._inbox: deque[tuple[Stream, float]] = deque()
        self._closing: deque[Stream] = deque()
        self._stopping = False
        self._replies: dict[Request, _Reply] = {}
        self.cache_tokens = 0  # whose keys and values are kept
        self._rates: deque[tuple[float, int]] = deque()
        self._idle = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="salience-engine", daemon=True)

    # On the event loop.

    def start(self) -> None:
        """Begin, with the running event loop as the one that streams belong to."""
        self._loop = asyncio.get_running_loop()
        self._idle.set()
        self._thread.start()

    def submit(self, job: Job) -> Stream:
        """Queue a job.

        Raises:
            ApiError: 503 while draining or after a failure, 429 when the queue is full.
        """
        if job.n > self.most:
            raise ApiError(f"n is {job.n}, this server makes {self.most} at most", param="n")
        if self.open + job.n > self.most:
            raise ApiError("too many requests are waiting; try again later", 429, retry_after=1)
        stream = Stream(job, self._end)
        with self._condition:  # with the state, so that none is left in the inbox at the end
            if self.state != "ok":
                raise _refusal(self.state)
            self._inbox.append((stream, time.perf_counter()))
            self._condition.notify()
        self.open += job.n
        self._idle.clear()
        return stream

    def _end(self, stream: Stream) -> None:
        with self._condition:
            self._closing.append(stream)
            self._condition.notify()

    async def drain(self, seconds: float) -> None:
        """Take no more jobs; let the others finish, or end them after some time."""
        if self.state == "ok":
            self.state = "draining"
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except asyncio.TimeoutError:
            _logger.warning("%d replies were not finished in %g s", self.open, seconds)
            self.abandon()

    def abandon(self) -> None:
        """End everything after the step that runs."""
        with self._condition:
            self.state = "draining" if self.state == "ok" else self.state
            self._stopping = True
            self._condition.notify()

    async def stop(self) -> None:
        """End everything, and the thread."""
        self.abandon()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _deliver(self, results: list[tuple[_Reply, Event | ApiError]]) -> None:
        for reply, result in results:
            stream = reply.stream
            if isinstance(result, ApiError):
                self.open -= 1
                stream.fail(result)
            else:
                self.open -= result.finish_reason is not None
                stream.put(reply.index, result)
        if not self.open:
            self._idle.set()

    # What others may read at any time.

    @property
    def running(self) -> int:
        """Slots in use."""
        return self.engine.max_batch - self.engine.free_slots

    @property
    def waiting(self) -> int:
        """Replies that have no slot yet."""
        return max(self.open - self.running, 0)

    @property
    def tokens_per_second(self) -> float:
        """Of all replies together, in the last seconds."""
        now = time.perf_counter()
        recent = [(at, n) for at, n in list(self._rates) if now - at <= _RATE_SECONDS]
        if not recent:
            return 0.0
        return sum(n for _, n in recent) / max(now - recent[0][0], 1e-3)

    # On the thread.

    def _run(self) -> None:
        failed = 0
        while True:
            try:
                if not self._take():
                    break
                self._step()
                failed = 0
            except Exception:  # whatever it is, the server lives and says so
                _logger.exception("a step of the engine failed")
                failed += 1
                if not self._recover() or failed >= _FAILURES:
                    with self._condition:
                        self.state = "failed"
                    break
        self._refuse_all()

    def _take(self) -> bool:
        """Wait for work and take it over; False to end."""
        with self._condition:
            while not (self._stopping or self._inbox or self._closing or not self.engine.idle):
                self._condition.wait()
            if self._stopping:
                return False
            asked, self._inbox = self._inbox, deque()
            closed, self._closing = self._closing, deque()
        for stream, at in asked:
            self._begin(stream, at)
        gone = set(map(id, closed))
        for request, reply in self._replies.items():
            if id(reply.stream) in gone:
                request.cancel()
        return True

    def _begin(self, stream: Stream, at: float) -> None:
        results: list[tuple[_Reply, Event | ApiError]] = []
        for index in range(stream.job.n):
            reply = _Reply(stream, index, None, at)
            try:
                self._replies[self._request(stream.job, reply)] = reply
            except SalienceError as error:
                results.append((reply, ApiError(str(error))))
            except Exception:  # of this request alone; the others go on
                _logger.exception("a request could not begin")
                results.append((reply, ApiError("the request could not begin", 500)))
        self._hand_over(results)

    def _request(self, job: Job, reply: _Reply) -> Request:
        engine = self.engine
        sampling = replace(job.sampling, seed=job.sampling.seed + reply.index)
        if job.guide is None:
            return engine.submit(job.prompt, sampling)
        reply.guide = job.guide()
        request = engine.submit(job.prompt, sampling, guided=True)
        request.allow(reply.guide.mask(request.room))
        return request

    def _step(self) -> None:
        events = self.engine.step()
        now = time.perf_counter()
        results: list[tuple[_Reply, Event | ApiError]] = []
        count = 0
        for event in events:
            request, count = event.request, count + len(event.tokens)
            request.events.clear()
            if request not in self._replies:
                continue  # its guide failed
            reply = self._replies[request]
            self._note(event, reply, now)
            results.append((reply, event))
            if event.finish_reason:
                del self._replies[request]
                if reply.stream.job.ended is not None:
                    reply.stream.job.ended(request)
            elif reply.guide is not None:
                try:
                    for token in event.tokens:
                        reply.guide.accept(token)
                    left = request.room - len(request.tokens)
                    request.allow(reply.guide.mask(left))
                except SalienceError as error:
                    request.cancel()
                    del self._replies[request]
                    results.append((reply, ApiError(str(error), 500)))
        self.cache_tokens = self.engine.cache_tokens
        if count:
            self._rates.append((now, count))
            while now - self._rates[0][0] > _RATE_SECONDS:
                self._rates.popleft()
        self._hand_over(results)

    def _note(self, event: Event, reply: _Reply, now: float) -> None:
        if self._watch is None or not event.tokens:
            return
        if not reply.last:
            request = event.request
            self._watch.began(len(request.prompt), request.cached, now - reply.asked)
        self._watch.drew(len(event.tokens), now - reply.last if reply.last else 0.0)
        reply.last = now

    def _hand_over(self, results: list[tuple[_Reply, Event | ApiError]]) -> None:
        if results and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, results)

    def _recover(self) -> bool:
        """End all replies after a step that failed; False if the engine cannot go on."""
        self._fail(ApiError("the engine failed", 500))
        try:
            self.engine.reset()
        except Exception:
            _logger.exception("the engine cannot go on")
            return False
        return True

    def _fail(self, error: ApiError) -> None:
        replies, self._replies = self._replies, {}
        self._hand_over([(reply, error) for reply in replies.values()])

    def _refuse_all(self) -> None:
        error = _refusal(self.state)
        with self._condition:
            waiting, self._inbox = self._inbox, deque()
        results: list[tuple[_Reply, Event | ApiError]] = [
            (_Reply(stream, index, None, at), error)
            for stream, at in waiting
            for index in range(stream.job.n)
        ]
        self._hand_over(results)
        self._fail(error)


def _refusal(state: State) -> ApiError:
    if state == "failed":
        return ApiError("the engine failed; the server must be started again", 503)
    return ApiError("the server is shutting down", 503, retry_after=5)
