"""What is asked of the engine and what it answers."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from salience.runtime.sampling import Sampling
from salience.runtime.text import Detokenizer, StopStrings

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log probability of a token of the reply, and the likeliest ones in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """What a step added to a reply; the last one says why it ended."""

    request: "Request" = field(repr=False)
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A whole reply. Times are from when it was asked for; the rate is that after the first token.

    `cached_tokens` of the prompt's were in the cache. `text` is empty without a tokenizer.
    """

    tokens: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    first_token_seconds: float
    seconds: float
    tokens_per_second: float
    logprobs: list[TokenLogprob] | None = None


class Request:
    """A prompt on its way: waiting, then in a slot, then finished. Made by `Engine.submit`."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        tokenizer: Any,
        ends: frozenset[int],
        room: int,
        guided: bool = False,
    ) -> None:
        self.prompt = list(prompt)
        self.sampling = sampling
        self.ends = ends
        self.room = room  # tokens that the reply may have
        self.guided = guided  # each token waits for a mask
        self._mask: Tensor | None = None
        self.tokens: list[int] = []
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.slot: int | None = None
        self.cached = 0  # tokens of the prompt that were in the cache
        self.filled = 0  # tokens of the prompt that are in it now
        self.launched = 0  # tokens of the reply that the device was told to make
        self.events: deque[Event] = deque()
        self._cancelled = threading.Event()
        self._detokenizer = (
            None
            if tokenizer is None
            else Detokenizer(tokenizer, self.prompt, sampling.skip_special_tokens)
        )
        self._stops = StopStrings(sampling.stop)
        self._times = [time.perf_counter()]

    def cancel(self) -> None:
        """End it at the next step, from any thread."""
        self._cancelled.set()

    def allow(self, bitmask: Tensor) -> None:
        """The tokens that the next draw of a guided request may take, from any thread.

        Args:
            bitmask: int32 [vocabulary / 32]; bit i of word w allows token 32 w + i.
        """
        self._mask = bitmask

    @property
    def ready(self) -> bool:
        """Whether its next token may be drawn."""
        return not self.guided or self._mask is not None

    def take_mask(self) -> Tensor:
        """The mask, which holds for one token."""
        mask, self._mask = self._mask, None
        if mask is None:
            raise RuntimeError("a guided request was run without a mask")
        return mask

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def push(self, token: int, logprob: TokenLogprob | None) -> Event:
        """Take a token that was drawn, with its log probability if that was asked for."""
        self.tokens.append(token)
        self._times.append(time.perf_counter())
        if logprob is not None:
            self.logprobs.append(logprob)
        text, met = "", False
        if self._detokenizer is not None and token not in self.ends:
            text, met = self._stops.push(self._detokenizer.push(token))
        if met or token in self.ends:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.room:
            self.finish_reason = "length"
        if self.finished and not met:
            text += self._rest()
        return self._event(text, (token,), () if logprob is None else (logprob,))

    def end(self) -> Event:
        """Take note that it was cancelled."""
        self._times.append(time.perf_counter())
        self.finish_reason = "cancelled"
        return self._event(self._rest(), (), ())

    def _rest(self) -> str:
        if self._detokenizer is None:
            return ""
        text, met = self._stops.push(self._detokenizer.flush())
        if met:
            self.finish_reason = "stop"
            return text
        return text + self._stops.flush()

    def _event(
        self, text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]
    ) -> Event:
        self.text += text
        event = Event(self, text, tokens, logprobs, self.finish_reason)
        self.events.append(event)
        return event

    def result(self) -> Result:
        """The reply so far."""
        start, *times = self._times
        first, last = (times[0], times[-1]) if times else (start, start)
        count = len(self.tokens)
        return Result(
            tokens=list(self.tokens),
            text=self.text,
            finish_reason=self.finish_reason or "cancelled",
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            first_token_seconds=first - start,
            seconds=last - start,
            tokens_per_second=(count - 1) / max(last - first, 1e-9) if count > 1 else 0.0,
            logprobs=None if self.sampling.logprobs is None else list(self.logprobs),
        )
