"""Choosing the next token, for all rows of a batch at once and without asking the host.

Each row has its own parameters, in tensors. The order is the usual one: penalties, mask,
temperature, top-k, top-p, min-p, then a draw. The draw is Gumbel's: with g = -log(-log u) for u
uniform, argmax(logits / temperature + g) is a sample of softmax(logits / temperature). The noise
is a hash of (seed, position, token), so that a row's tokens depend on its seed and on nothing else
in the batch, and there is no state of a generator to keep. Temperature 0 takes the argmax.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from salience.errors import SalienceError

MAX_LOGPROBS = 20
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a reply is drawn and where it ends.

    Args:
        max_new_tokens: ends after this many.
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have this probability.
        min_p: only tokens at least this times as likely as the likeliest.
        repetition_penalty: divides the logits (multiplies negative ones) of tokens that were in
            the prompt or the reply.
        presence_penalty: taken off the logits of tokens that were in the reply.
        frequency_penalty: the same, as often as they were there.
        seed: of the draw; the same seed and prompt give the same reply in any batch.
        stop: texts that end the reply and are no part of it.
        stop_token_ids: tokens that end it, beside the model's own.
        ignore_eos: go on after the model's own.
        skip_special_tokens: leave them out of the text. Some models mark tool calls by them.
        logprobs: the log probabilities of the tokens, and of as many likeliest ones beside;
            None for none at all.

    Raises:
        SalienceError: a value out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None

    def __post_init__(self) -> None:
        wanted = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (0 <= self.top_k < 2**31, "0 or more, below 2^31"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a number"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "texts, none empty"),
            "logprobs": (
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"between 0 and {MAX_LOGPROBS}",
            ),
        }
        for name, (fits, range_) in wanted.items():
            if not fits:
                raise SalienceError(f"{name} is {getattr(self, name)!r}, must be {range_}")


class Features(NamedTuple):
    """What the rows of a batch need, beside the argmax. A captured graph has it built in."""

    sampled: bool = False
    filtered: bool = False
    penalized: bool = False
    masked: bool = False
    logprobs: int | None = None

    @classmethod
    def of(cls, parts: Sequence[Sampling], masked: bool = False) -> "Features":
        """What any of them needs."""
        drawn = [part for part in parts if part.temperature > 0]
        counts = [part.logprobs for part in parts if part.logprobs is not None]
        return cls(
            sampled=bool(drawn),
            filtered=any(part.top_k or part.top_p < 1 or part.min_p for part in drawn),
            penalized=any(_penalizes(part) for part in parts),
            masked=masked,
            logprobs=max(counts, default=None),
        )


def _penalizes(part: Sampling) -> bool:
    plain = part.repetition_penalty == 1 and part.presence_penalty == 0
    return not (plain and part.frequency_penalty == 0)


class SamplingState:
    """The parameters of all slots on the device, and what was sampled last.

    The tables of [slots, vocabulary] are made when first needed.
    """

    _NUMBERS = (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    )

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self.device = device
        self.numbers = torch.zeros(len(self._NUMBERS), slots, device=device)
        self.top_k = torch.zeros(slots, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(2, slots, dtype=torch.int64, device=device)
        self.logprob = torch.zeros(slots, device=device)
        self.top_logprobs = torch.zeros(slots, MAX_LOGPROBS, device=device)
        self.top_tokens = torch.zeros(slots, MAX_LOGPROBS, dtype=torch.int64, device=device)
        self._slots = slots
        self._prompted: Tensor | None = None
        self._counts: Tensor | None = None
        self._bitmask: Tensor | None = None

    @property
    def prompted(self) -> Tensor:
        """[slots, vocabulary] bool: the tokens of the prompts."""
        if self._prompted is None:
            self._prompted = self._table(self.vocabulary, torch.bool)
        return self._prompted

    @property
    def counts(self) -> Tensor:
        """[slots, vocabulary] int32: how often a token is in the reply."""
        if self._counts is None:
            self._counts = self._table(self.vocabulary, torch.int32)
        return self._counts

    @property
    def bitmask(self) -> Tensor:
        """[slots, vocabulary / 32] int32: bit i of word w allows token 32 w + i."""
        if self._bitmask is None:
            self._bitmask = self._table(-(-self.vocabulary // 32), torch.int32).fill_(-1)
        return self._bitmask

    def _table(self, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self._slots, columns, dtype=dtype, device=self.device)

    def set(self, slot: int, sampling: Sampling, prompt: Sequence[int]) -> None:
        """Begin a reply in a slot."""
        for row, name in enumerate(self._NUMBERS):
            self.numbers[row, slot].fill_(getattr(sampling, name))
        self.top_k[slot].fill_(sampling.top_k)
        for half in range(2):
            self.seeds[half, slot].fill_(sampling.seed >> 32 * half & _WORD)
        if _penalizes(sampling):
            tokens = to_device(prompt, self.device)
            self.prompted[slot].fill_(False)
            self.prompted[slot].index_fill_(0, tokens, True)
            self.counts[slot].zero_()
        if self._bitmask is not None:
            self._bitmask[slot].fill_(-1)

    def sample(
        self, logits: Tensor, rows: slice, positions: Tensor, active: Tensor, features: Features
    ) -> Tensor:
        """The next tokens, int64 [rows].

        Args:
            logits: [rows, vocabulary], any float dtype.
            rows: the slots they belong to.
            positions: int64 [rows], of the tokens that are drawn.
            active: bool [rows]; the others' counts stay.
            features: what is done at all.
        """
        raw = logits
        if features.penalized or features.sampled:
            logits = logits.float()
        temperature, top_p, min_p, repetition, presence, frequency = self.numbers[:, rows, None]
        if features.penalized:
            counts = self.counts[rows]
            seen = self.prompted[rows] | (counts > 0)
            scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits = torch.where(seen, scaled, logits)
            logits = logits - presence * (counts > 0) - frequency * counts
        if features.masked:
            logits = torch.where(self._allowed(rows), logits, -math.inf)
        if features.sampled:
            drawn = logits / torch.where(temperature > 0, temperature, 1.0)
            if features.filtered:
                drawn = _filtered(drawn, self.top_k[rows, None], top_p, min_p)
            drawn = drawn + _gumbel(self.seeds[:, rows], positions, self.vocabulary)
            logits = torch.where(temperature > 0, drawn, logits)
        tokens = logits.argmax(-1)
        if features.penalized:
            self.counts[rows].scatter_add_(1, tokens[:, None], active[:, None].int())
        if features.logprobs is not None:
            logprobs = raw.float().log_softmax(-1)
            self.logprob[rows] = logprobs.gather(1, tokens[:, None])[:, 0]
            if features.logprobs:
                top = logprobs.topk(min(features.logprobs, self.vocabulary))
                self.top_logprobs[rows, : top.values.shape[1]] = top.values
                self.top_tokens[rows, : top.values.shape[1]] = top.indices
        return tokens

    def _allowed(self, rows: slice) -> Tensor:
        shifts = torch.arange(32, device=self.device, dtype=torch.int32)
        bits = self.bitmask[rows, :, None] >> shifts & 1
        return bits.flatten(1)[:, : self.vocabulary].bool()


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Integers as int64 on a device, without waiting for it."""
    tensor = torch.tensor(values, dtype=torch.int64)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _filtered(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits with -inf for what is outside the three; at least the likeliest stays."""
    ordered, order = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    outside = (top_k > 0) & (rank >= top_k)
    # Each filter sees what the one before left.
    left = torch.where(outside, 0.0, probabilities)
    before = left.cumsum(-1) - left
    outside |= (top_p < 1) & (before >= top_p * left.sum(-1, keepdim=True))
    outside |= probabilities < min_p * probabilities[:, :1]
    outside &= rank > 0
    return torch.where(torch.zeros_like(outside).scatter(-1, order, outside), -math.inf, logits)


def _hash(x: Tensor) -> Tensor:
    """A mixing of 32 bits, in int64; its factors are below 2^31, so that nothing overflows."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & _WORD
    return x ^ (x >> 15)


def _gumbel(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Noise [rows, vocabulary] by seeds [2, rows] and positions [rows]."""
    low, high = seeds
    a = _hash((_hash(low) + positions) & _WORD)
    b = _hash((_hash((high + 0x5851F42D) & _WORD) ^ a) & _WORD)
    tokens = torch.arange(vocabulary, device=seeds.device)
    bits = _hash((_hash((tokens + a[:, None]) & _WORD) ^ b[:, None]) & _WORD)
    # What decides is the smallest of -log(1 - u), so small u must be exact: 32 bits, not 24.
    u = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))
