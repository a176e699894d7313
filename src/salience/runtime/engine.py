"""The engine: prompts in, replies out, many at once.

    engine = Engine(model, tokenizer, max_batch=4)
    results = engine.generate([ids, more_ids], Sampling(max_new_tokens=64))
    for event in engine.stream(ids, Sampling()): print(event.text, end="")

Below both is what a server needs: `submit` queues a prompt, each `step` prefills one chunk of one
prompt, or several short prompts, and makes one token for every slot that is past its prompt, and
`Request.cancel` ends one.

On a GPU a step of all slots is one CUDA graph, from the embedding to the sampled token, which is
the next step's input without the host seeing it. The host reads the tokens one step behind, so a
reply that ends by a token has made one more, which is dropped. On a CPU the same functions run one
by one, and attention reads as much of the cache as is in use.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from salience.errors import SalienceError
from salience.runtime.limits import check_prompt, context, end_tokens
from salience.runtime.request import Event, Request, Result
from salience.runtime.runner import Drawn, Runner
from salience.runtime.sampling import Features, Sampling
from salience.runtime.slots import Slot, place

_GREEDY = Sampling()


class Engine:
    """Generates text with a Transformers causal language model.

    Args:
        model: the model, on its devices.
        tokenizer: for texts and stop strings; None for tokens only.
        max_context: tokens of prompt and reply together; None for what the model was made for, at
            most 8192.
        max_batch: replies that are made at once.
        prefill_chunk: tokens of a prompt that are computed between two steps.
        graphs: capture steps in CUDA graphs; None for where that works.
        fast: merge the linears of the model that read the same tensor (`merge_linears`), and trace
            the model call of a step and rewrite it to fused ops (`trace.optimize`). The first
            changes the model, in place: it gives the same outputs to whoever calls it, can be saved
            and unpacked, but not trained. The second takes a second or two at the first step of
            each number of rows, or in `prepare`.

    Raises:
        SalienceError: a value out of its range, or graphs where they are not possible.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_context: int | None = None,
        max_batch: int = 1,
        prefill_chunk: int = 512,
        graphs: bool | None = None,
        fast: bool = True,
    ) -> None:
        if max_batch < 1 or prefill_chunk < 1:
            raise SalienceError("max_batch and prefill_chunk must be at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.max_context = context(model, max_context)
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self._runner = Runner(model, max_batch, self.max_context, graphs, fast)
        self._slots = [Slot(index) for index in range(max_batch)]
        self._queue: deque[Request] = deque()
        self._unread: deque[tuple[Drawn, list[Request]]] = deque()
        self._clock = 0
        self._lock = threading.RLock()

    @property
    def static(self) -> bool:
        """Whether slots share a step, and prompts what is in the cache.

        A model that needs its own kind of cache runs one slot after the other.
        """
        return self._runner.static

    @property
    def graphs(self) -> bool:
        """Whether steps are captured in CUDA graphs."""
        return self._runner.graphs

    @property
    def device(self) -> torch.device:
        """Where tokens are drawn."""
        return self._runner.device

    @property
    def free_slots(self) -> int:
        """How many replies could begin at once."""
        return sum(slot.request is None for slot in self._slots)

    @property
    def waiting(self) -> int:
        """How many prompts wait for a slot."""
        return len(self._queue)

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values are kept, of replies and for later prompts."""
        with self._lock:
            return sum(slot.position for slot in self._slots)

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._queue and self.free_slots == self.max_batch

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling] = _GREEDY
    ) -> list[Result]:
        """The replies to prompts, in their order. What is more than the slots waits.

        Raises:
            SalienceError: a prompt that is empty, too long or has tokens that do not exist.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(prompts):
            raise SalienceError(f"{len(prompts)} prompts have {len(each)} samplings")
        requests = [self._request(*pair) for pair in zip(prompts, each, strict=True)]
        with self._lock:
            self._queue.extend(requests)
        try:
            while not all(request.finished for request in requests):
                self.step()
        finally:
            self._cancel(requests)
        return [request.result() for request in requests]

    def stream(self, prompt: Sequence[int], sampling: Sampling = _GREEDY) -> Iterator[Event]:
        """The reply to a prompt, as it comes. Closing the iterator ends it.

        Raises:
            SalienceError: as `generate`, when it is called.
        """
        return self._stream(self._request(prompt, sampling))

    def _stream(self, request: Request) -> Iterator[Event]:
        with self._lock:
            self._queue.append(request)
        yield from self.events(request)

    def events(self, request: Request) -> Generator[Event, None, None]:
        """The events of a submitted request, as they come. Closing the iterator ends it."""
        finished = False
        try:
            while not finished:
                with self._lock:  # another thread's step may bring them
                    if not request.events and not request.finished:
                        self.step()
                    found, finished = list(request.events), request.finished
                    request.events.clear()
                yield from found
        finally:
            self._cancel([request])

    def _cancel(self, requests: Sequence[Request]) -> None:
        unfinished = [request for request in requests if not request.finished]
        for request in unfinished:
            request.cancel()
        if unfinished:
            with self._lock:
                self._end_cancelled()

    def submit(
        self, prompt: Sequence[int], sampling: Sampling = _GREEDY, guided: bool = False
    ) -> Request:
        """Queue a prompt; `step` takes it up when a slot is free. From any thread.

        Args:
            prompt: its tokens.
            sampling: how the reply is drawn.
            guided: each token waits for a mask by `Request.allow`.
        """
        request = self._request(prompt, sampling, guided)
        with self._lock:
            self._queue.append(request)
        return request

    def _request(self, prompt: Sequence[int], sampling: Sampling, guided: bool = False) -> Request:
        check_prompt(self.model, prompt, self.max_context)
        if sampling.stop and self.tokenizer is None:
            raise SalienceError("stop strings need a tokenizer; give one to the engine")
        ends = set(sampling.stop_token_ids) | (
            set() if sampling.ignore_eos else end_tokens(self.model, self.tokenizer)
        )
        room = min(sampling.max_new_tokens, self.max_context - len(prompt))
        return Request(prompt, sampling, self.tokenizer, frozenset(ends), room, guided)

    def prepare(self, *samplings: Sampling) -> None:
        """Capture the graphs that such replies need, while there are none to wait for it."""
        with self._lock:
            for sampling in (samplings or (_GREEDY,)) if self.idle else ():
                self._runner.prepare(Features.of([sampling]))

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Go on with all replies by one token, and with the oldest prompts by one chunk.

        Returns:
            what was read of the device since the last step, of all requests; each is also in its
            request's `events`.
        """
        with self._lock:
            events = self._end_cancelled()
            self._admit()
            filling = [slot for slot in self._slots if slot.filling]
            if filling:
                self._prefill(self._together(filling))
            running = [slot for slot in self._slots if slot.running]
            if running:
                self._decode(running)
            ahead = self._runner.device.type == "cuda" and bool(filling or running)
            guided = any(slot.request.guided for slot in self._slots if slot.request is not None)
            return events + self._read(1 if ahead and not guided else 0)

    def _admit(self) -> None:
        while self._queue and (placed := place(self._slots, self._queue[0].prompt)) is not None:
            request, slot, spare = self._queue.popleft(), placed.slot, placed.spare
            if spare is not None:
                held = len(slot.tokens)
                if spare is placed.source:
                    self._runner.swap(slot.index, spare.index, max(held, placed.cached))
                else:
                    self._runner.copy(slot.index, spare.index, held)
                spare.tokens, spare.used = slot.tokens, slot.used
                self._runner.release(spare.index, held)
            if placed.source not in (slot, spare):
                self._runner.copy(placed.source.index, slot.index, placed.cached)
            self._clock += 1
            slot.request, slot.tokens, slot.used = request, [], self._clock
            request.slot, request.cached, request.filled = slot.index, placed.cached, placed.cached
            self._runner.begin(slot.index, request.sampling, request.prompt, placed.cached)

    def _together(self, filling: list[Slot]) -> list[Slot]:
        """The oldest prompt and those in the slots beside it that are computed with it.

        They begin at the same position and none is much longer: the others are filled up to the
        longest. All have `prefill_chunk` tokens at most.
        """
        group = [min(filling, key=lambda slot: slot.used)]
        waiting = {slot.index: slot for slot in filling} if self._runner.together else {}
        for direction in (1, -1):
            beside = waiting.get(group[0].index + direction)
            while beside is not None and self._fit([*group, beside]):
                group.append(beside)
                beside = waiting.get(beside.index + direction)
        return sorted(group, key=lambda slot: slot.index)

    def _fit(self, group: Sequence[Slot]) -> bool:
        """Whether prompts can be computed together."""
        lengths = [slot.missing for slot in group]
        alike = len({slot.position for slot in group}) == 1 and max(lengths) <= 2 * min(lengths)
        return alike and len(group) * max(lengths) <= self.prefill_chunk

    def _prefill(self, slots: list[Slot]) -> None:
        chunks, ended = [], []
        start = slots[0].position
        for slot in slots:
            request = slot.request
            assert request is not None
            count = min(self.prefill_chunk, slot.missing) if self.static else slot.missing
            chunks.append(request.prompt[start : start + count])
            ended.append(count == slot.missing)
            if ended[-1]:
                self._set_mask(slot)
            request.filled += count
        done = [slot for slot, last in zip(slots, ended, strict=True) if last]
        drawn = self._runner.prefill(slots[0].index, chunks, start, ended, _features(done))
        if drawn is not None:
            self._launched(drawn, done)

    def _decode(self, running: list[Slot]) -> None:
        first, last = running[0].index, running[-1].index
        among = self._slots[first : last + 1]
        length = max(slot.position for slot in among) + 1
        for slot in running:
            self._set_mask(slot)
        drawn = self._runner.decode(first, len(among), length, _features(running))
        self._launched(drawn, running)

    def _set_mask(self, slot: Slot) -> None:
        if slot.request is not None and slot.request.guided:
            self._runner.resume(slot.index, slot.request.take_mask())

    def _launched(self, drawn: Drawn, slots: Sequence[Slot]) -> None:
        requests = [slot.request for slot in slots if slot.request is not None]
        for request in requests:
            request.launched += 1
            if (request.guided or request.launched == request.room) and request.slot is not None:
                self._runner.pause(request.slot)
        self._unread.append((drawn, requests))

    def _read(self, leave: int) -> list[Event]:
        """Take what arrived, all but the newest `leave` steps."""
        events = []
        while len(self._unread) > leave:
            drawn, requests = self._unread.popleft()
            drawn.wait()
            for request in requests:
                if request.finished or request.slot is None:
                    continue  # ended in the step before; this token is past the end
                count = request.sampling.logprobs
                logprob = drawn.logprob(request.slot, count)
                events.append(request.push(drawn.token(request.slot), logprob))
                if request.finished:
                    self._release(request)
        return events

    def reset(self) -> None:
        """End all requests and forget what is in the cache, after a step that raised."""
        with self._lock:
            for request in [*self._queue, *(slot.request for slot in self._slots)]:
                if request is not None:
                    request.cancel()
            self._end_cancelled()
            self._unread.clear()
            for slot in self._slots:
                slot.tokens = []
                self._runner.release(slot.index, 0)

    def _end_cancelled(self) -> list[Event]:
        """Take cancelled requests out of their slots and the queue."""
        ended = [request for request in self._queue if request.cancelled]
        self._queue = deque(request for request in self._queue if not request.cancelled)
        for slot in self._slots:
            if slot.request is not None and slot.request.cancelled:
                ended.append(slot.request)
        events = [request.end() for request in ended]
        for request in ended:
            self._release(request)
        return events

    def _release(self, request: Request) -> None:
        if request.slot is not None:
            slot = self._slots[request.slot]
            slot.release(keep=self.static)
            self._runner.release(slot.index, len(slot.tokens))


def _features(slots: Sequence[Slot]) -> Features:
    requests = [slot.request for slot in slots if slot.request is not None]
    guided = any(request.guided for request in requests)
    return Features.of([request.sampling for request in requests], guided)
