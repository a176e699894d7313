"""The device's part of the engine: the slots' last tokens, their positions, and steps over them.

All that a step reads and writes lies in tensors at fixed places: the last token, the position and
an active flag of each slot, the parameters of sampling, and the cache. A step feeds the token that
it draws back as the next input itself. What the host wants to know of it is copied to pinned memory
and read when an event says that it has arrived, by then one step behind.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.placement import input_device
from salience.runtime.cache import padded
from salience.runtime.graphs import Graphs, bucket
from salience.runtime.merge import merge_linears
from salience.runtime.request import TokenLogprob
from salience.runtime.sampling import Features, Sampling, SamplingState, to_device
from salience.runtime.step import DecodeStep, Step, make_step
from salience.runtime.trace import optimize

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens of some rows, on their way to the host."""

    first: int
    tokens: Tensor  # [rows]
    logprobs: (
        tuple[Tensor, Tensor, Tensor] | None
    )  # of the token, of the likeliest, which those are
    arrived: Any  # an event; None when they are there

    def wait(self) -> "Drawn":
        """Until they have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self

    def token(self, slot: int) -> int:
        """The token of a slot."""
        return int(self.tokens[slot - self.first])

    def logprob(self, slot: int, count: int | None) -> TokenLogprob | None:
        """Its log probability, with the `count` likeliest."""
        if count is None or self.logprobs is None:
            return None
        row = slot - self.first
        own, top, which = (part[row] for part in self.logprobs)
        pairs = zip(which[:count].tolist(), top[:count].tolist(), strict=True)
        return TokenLogprob(self.token(slot), float(own), tuple(pairs))


class Runner:
    """Prefills and decodes slots.

    Args:
        model: a Transformers causal language model.
        slots: sequences that it holds.
        max_context: tokens of each.
        graphs: capture steps; None for where that works.
        fast: merge the model's linears, in place, and trace and rewrite the decode steps.

    Raises:
        SalienceError: graphs where they are not possible.
    """

    def __init__(
        self,
        model: Any,
        slots: int,
        max_context: int,
        graphs: bool | None = None,
        fast: bool = True,
    ) -> None:
        if fast:
            merge_linears(model)
        self.device = input_device(model)
        self.slots = slots
        # One place more than the context: where slots write that have nothing to say.
        self.capacity = padded(max_context + 1)
        self.step = make_step(model, slots, padded(1))
        self.static = self.step.static
        self._hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
        self._fast = fast and self.static and not self._hooked
        self._decoders: dict[int, DecodeStep] = {}
        self._ids = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._positions = torch.zeros_like(self._ids)
        self._active = torch.zeros_like(self._ids, dtype=torch.bool)
        self.sampling = SamplingState(slots, self.step.vocabulary, self.device)
        self._graphs = self._make_graphs(graphs)
        if isinstance(self.step, Step) and self._fixed:
            self.step.cache.reserve(self.capacity)  # addresses that stay

    def _make_graphs(self, wanted: bool | None) -> Graphs | None:
        fits = isinstance(self.step, Step) and not self.step.waits
        possible = self.device.type == "cuda" and fits and not self._hooked
        if wanted and not possible:
            raise SalienceError(
                "CUDA graphs need a model with a cache of keys and values, wholly on one GPU; "
                "use graphs=None"
            )
        if not possible or wanted is False:
            return None
        return Graphs(self.device)

    @property
    def _fixed(self) -> bool:
        """Whether a step is made once for a number of rows, and reads all of the cache."""
        return self._graphs is not None or self._fast

    @property
    def graphs(self) -> bool:
        """Whether steps are captured."""
        return self._graphs is not None

    def begin(self, slot: int, sampling: Sampling, prompt: Sequence[int], cached: int) -> None:
        """A new reply in a slot, `cached` tokens of whose prompt are there."""
        self.sampling.set(slot, sampling, prompt)
        self._positions[slot].fill_(cached)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a slot the first tokens of another."""
        if isinstance(self.step, Step):
            self.step.cache.copy(source, target, tokens)

    def swap(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first tokens of two slots."""
        if isinstance(self.step, Step):
            self.step.cache.swap(a, b, tokens)

    def pause(self, slot: int) -> None:
        """No more tokens for a slot."""
        self._active[slot].fill_(False)

    def resume(self, slot: int, bitmask: Tensor) -> None:
        """Go on with a slot that was paused; its next token is one of those in a mask."""
        self.sampling.bitmask[slot].copy_(bitmask, non_blocking=True)
        self._active[slot].fill_(True)

    def release(self, slot: int, tokens: int) -> None:
        """End a slot's reply and keep its first `tokens` tokens."""
        self.pause(slot)
        self._positions[slot].fill_(tokens)
        if not isinstance(self.step, Step):
            self.step.release(slot)

    @property
    def together(self) -> bool:
        """Whether several slots can be prefilled at once."""
        return self.step.together

    def prefill(
        self,
        first: int,
        chunks: Sequence[Sequence[int]],
        start: int,
        ended: Sequence[bool],
        features: Features,
    ) -> Drawn | None:
        """Compute tokens of some prompts, from position `start` on.

        Args:
            first: the slot of the first; the others are in the slots after it.
            chunks: tokens of each prompt.
            start: the position of the first token; those before are in the cache.
            ended: which prompts have their last token here.
            features: of the draw of the next token of these.

        Returns:
            What was drawn; None when all prompts go on.
        """
        lengths = [len(chunk) for chunk in chunks]
        longest = max(lengths)
        if isinstance(self.step, Step):
            self.step.cache.reserve(min(padded(2 * (start + longest)), self.capacity))
        tokens = [token for chunk in chunks for token in [*chunk, *[0] * (longest - len(chunk))]]
        ids = to_device(tokens, self.device).view(len(chunks), longest)
        logits = self.step.prefill(first, ids, start, lengths)
        for row, length in enumerate(lengths):
            self._positions[first + row].fill_(start + length)
            if ended[row]:
                self._active[first + row].fill_(True)
        if not any(ended):
            return None
        rows = slice(first, first + len(chunks))
        self._draw(logits, rows, self._positions[rows], features)
        return self._drawn(rows, features)

    @torch.no_grad()
    def prepare(self, features: Features) -> None:
        """Trace and capture the steps of all numbers of rows now, not when first needed."""
        rows = 0
        while self._fixed and rows < self.slots:
            rows = bucket(rows + 1, self.slots)
            self.decode(0, rows, self.capacity, features)

    def decode(self, first: int, rows: int, length: int, features: Features) -> Drawn:
        """One token for each of the active slots among `rows` slots from `first` on.

        Args:
            first: a slot.
            rows: how many.
            length: above each position that is written.
            features: what the rows' sampling needs.
        """
        length = padded(length)
        if self._fixed:
            first, rows, length = 0, bucket(first + rows, self.slots), self.capacity
        part = slice(first, first + rows)
        if isinstance(self.step, Step):
            self.step.cache.reserve(min(2 * length, self.capacity))
            self.step.cache.at_rows(self._positions[part], first, length)
        else:
            self.step.first = first
        if self._graphs is None:
            self._advance(part, features)
        else:
            self._replay(self._graphs, part, features)
        return self._drawn(part, features)

    def _replay(self, graphs: Graphs, part: slice, features: Features) -> None:
        state = [self._ids, self._positions]
        # Tables are made outside of the graph.
        if features.penalized:
            state += [self.sampling.counts, self.sampling.prompted]
        if features.masked:
            state += [self.sampling.bitmask]
        self._decoder(part)
        try:
            graphs.run((part.stop, features), lambda: self._advance(part, features), state)
        except RuntimeError as error:
            _logger.warning("no CUDA graphs for this model: %s", str(error).splitlines()[0])
            self._graphs = None
            self._advance(part, features)

    def _decoder(self, part: slice) -> DecodeStep:
        """The model call for some rows."""
        if not self._fast or not isinstance(self.step, Step):
            return self.step
        rows = part.stop - part.start
        if rows not in self._decoders:
            ids, positions = self._ids[part, None], self._positions[part]
            if not self.step.cache.layers:
                self._of_few_keys(ids, positions)  # its buffers are made outside of a trace
            self._decoders[rows] = optimize(self.step, ids, positions, reference=self._of_few_keys)
            self._fast = self._decoders[rows] is not self.step
        return self._decoders[rows]

    def _of_few_keys(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The step where attention reads only the first of the keys."""
        assert isinstance(self.step, Step)
        length, self.step.cache.length = self.step.cache.length, padded(1)
        try:
            return self.step(ids, positions)
        finally:
            self.step.cache.length = length

    def _advance(self, part: slice, features: Features) -> None:
        """What is captured: the model, the draw, and what it changes."""
        positions, active = self._positions[part], self._active[part]
        logits = self._decoder(part)(self._ids[part, None], positions)
        self._draw(logits, part, positions + 1, features)
        positions.add_(active).clamp_(max=self.capacity - 1)

    def _draw(self, logits: Tensor, part: slice, positions: Tensor, features: Features) -> None:
        logits = logits.to(self.device)
        tokens = self.sampling.sample(logits, part, positions, self._active[part], features)
        self._ids[part] = torch.where(self._active[part], tokens, self._ids[part])

    def _drawn(self, part: slice, features: Features) -> Drawn:
        """What was drawn for some rows, sent to the host."""
        tokens = self._to_host(self._ids[part])
        logprobs = None
        if features.logprobs is not None:
            state, top = self.sampling, features.logprobs
            logprobs = (
                self._to_host(state.logprob[part]),
                self._to_host(state.top_logprobs[part, :top]),
                self._to_host(state.top_tokens[part, :top]),
            )
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return Drawn(part.start, tokens, logprobs, arrived)

    def _to_host(self, values: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return values.clone()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)
