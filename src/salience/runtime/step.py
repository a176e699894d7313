"""The model calls of generation: a chunk of one prompt, and one token for each of several slots.

`Step` runs the Transformers module over a `SlotCache`. Its call

    step(ids [rows, 1], positions [rows]) -> logits [rows, vocabulary]

has no host synchronization and no control flow that depends on data, so it can be captured in a
CUDA graph, or traced to an ATen graph that is rewritten. `Sequential` does the same with one cache
of the model's own kind per slot, for models whose state is not keys and values (Mamba, linear
attention) or that cannot read a `SlotCache`. `make_step` finds out which, by comparing logits.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from salience.placement import input_device
from salience.runtime.cache import SlotCache, padded
from salience.runtime.sampling import to_device

_logger = logging.getLogger(__name__)

# What models call the state that they return to be given again.
_STATES = ("past_key_values", "cache_params", "state")
# What a module that was not made for another's cache may raise on meeting one.
_MISFITS = (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, LookupError)

# With a mask or without, prompts together or one by one: the first that fits is taken.
_WAYS = ((False, True), (False, False), (True, True), (True, False))

DecodeStep = Callable[[Tensor, Tensor], Tensor]


class Step:
    """A model over the slots of a cache.

    Args:
        model: a Transformers causal language model.
        cache: where its keys and values are.
        vocabulary: number of logits.
        with_mask: also hand it a mask of ones, which a few ask for.
        together: whether several slots can be prefilled at once.
    """

    static = True

    def __init__(
        self,
        model: Any,
        cache: SlotCache,
        vocabulary: int,
        with_mask: bool = False,
        together: bool = True,
    ) -> None:
        self.model = model
        self.cache = cache
        self.vocabulary = vocabulary
        self.with_mask = with_mask
        self.together = together
        self.waits = False  # whether the model waits for values of its step
        self.options = _options(model)

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of ids [rows, 1] at positions [rows].

        The rows are the slots from `cache.first` on, and attention reads `cache.length` tokens.
        """
        self.cache.positions = positions
        return self._forward(ids, positions[:, None])[:, -1]

    def prefill(
        self, slot: int, ids: Tensor, start: int, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Logits [rows, vocabulary] after the tokens ids [rows, tokens], which begin at `start`.

        Args:
            slot: of the first row; the others are the slots after it.
            ids: the rows, filled up with any tokens at the end. What these write to the cache lies
                behind the row's own, where the next tokens are written before they are read.
            start: the position of the first column.
            lengths: how many tokens each row has; all for None.
        """
        rows, tokens = ids.shape
        lengths = lengths or [tokens] * rows
        ends = sorted(set(lengths))
        self.cache.at_chunk(slot, start, tokens)
        positions = torch.arange(start, start + tokens, device=ids.device).expand(rows, -1)
        if ends == [tokens]:
            return self._forward(ids, positions)[:, -1]
        columns = to_device([end - 1 for end in ends], ids.device)
        logits = self._forward(ids, positions, columns)
        kept = "logits_to_keep" in self.options
        last = [ends.index(n) if kept else n - 1 for n in lengths]
        return torch.stack([logits[row, column] for row, column in enumerate(last)])

    def _forward(self, ids: Tensor, positions: Tensor, keep: Tensor | int = 1) -> Tensor:
        options = dict(self.options)
        if "logits_to_keep" in options:
            options["logits_to_keep"] = keep
        if "position_ids" in options:
            options["position_ids"] = positions
        if self.with_mask:
            options["attention_mask"] = ids.new_ones(ids.shape[0], self.cache.length)
        out = self.model(input_ids=ids, past_key_values=self.cache, **options)
        return out.logits


class Sequential:
    """A model with one cache of its own kind for each slot; rows are computed one by one.

    Prompts must come whole and from the start: not every kind of state can be taken up again with
    several tokens at once, and none can be cut.
    """

    static = False
    together = False

    def __init__(self, model: Any, vocabulary: int, **options: Any) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.first = 0
        self.options = {**_options(model), **options}
        self.states: dict[int, dict[str, Any]] = {}

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of ids [rows, 1]; zeros for slots without a prompt."""
        rows = [
            self._forward(self.first + row, ids[row : row + 1], positions[row : row + 1, None])
            if self.first + row in self.states
            else torch.zeros(1, self.vocabulary, device=ids.device)
            for row in range(ids.shape[0])
        ]
        return torch.cat([row.to(rows[0].device) for row in rows])

    def prefill(
        self, slot: int, ids: Tensor, start: int, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Logits [1, vocabulary] after the whole prompt ids [1, tokens]."""
        del start, lengths
        self.states[slot] = {}
        return self._forward(slot, ids, torch.arange(ids.shape[1], device=ids.device)[None])

    def release(self, slot: int) -> None:
        """Forget a slot."""
        self.states.pop(slot, None)

    def _forward(self, slot: int, ids: Tensor, positions: Tensor) -> Tensor:
        options, state = dict(self.options), self.states[slot]
        if "input_ids" in state:  # of a model that keeps nothing: all tokens again
            ids = state["input_ids"] = torch.cat([state["input_ids"], ids], dim=1)
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        if "position_ids" in options:
            options["position_ids"] = positions
        out = self.model(**{"input_ids": ids, **options, **state})
        if "input_ids" not in state:
            found = {name: out[name] for name in _STATES if out.get(name) is not None}
            self.states[slot] = found or {"input_ids": ids}
        return out.logits[:, -1].float()


def _options(model: Any) -> dict[str, Any]:
    """What the model's forward takes beside the tokens and its state."""
    known = inspect.signature(model.forward).parameters
    wanted = {"position_ids": None, "logits_to_keep": 1, "return_dict": True, "use_cache": True}
    return {name: value for name, value in wanted.items() if name in known}


@torch.no_grad()
def make_step(model: Any, slots: int, capacity: int, tokens: int = 12) -> Step | Sequential:
    """A `Step` if the model reads a `SlotCache` as it does its own cache, else `Sequential`.

    Two prompts of different lengths are prefilled in two chunks, together if the model can, and go
    on together for two tokens; the logits must be those of the model without a cache of ours.

    Args:
        model: a Transformers causal language model.
        slots: of the cache.
        capacity: tokens of each slot, to begin with.
        tokens: of the longer prompt.
    """
    device = input_device(model)
    ids = (torch.arange(tokens + 2) * 7919 + 17) % model.config.get_text_config().vocab_size
    ids = ids[None].to(device)
    options = {name: value for name, value in _options(model).items() if name == "use_cache"}
    reason: str | None
    try:
        plain = model(input_ids=ids, **options)
        reason = _unreadable(model, plain)
    except _MISFITS as error:  # its own cache is broken: without one, all tokens are computed again
        options = dict.fromkeys(options, False)
        plain = model(input_ids=ids, **options)
        reason = f"{type(error).__name__}: {error}"
    expected = plain.logits[0]
    vocabulary = expected.shape[-1]
    fits: list[Step] = []
    for with_mask, together in _WAYS if reason is None else ():
        if fits and fits[-1].with_mask == with_mask:
            continue
        trial = Step(model, SlotCache(2, padded(tokens + 3)), vocabulary, with_mask, together)
        try:
            found = _probe(trial, ids)
        except _MISFITS as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        difference = _difference(found, expected[[-3, -5, -2, -4, -1, -3]])
        if difference > _tolerance(model):
            reason = f"logits differ by {difference:.2g}"
            continue
        fits.append(trial)
        if not trial.waits:
            break  # a few wait for the device to warn of a missing mask
    if fits:
        fits[-1].cache = SlotCache(slots, capacity)
        return fits[-1]
    _logger.warning(
        "%s runs with its own cache, one sequence at a time and without CUDA graphs (%s)",
        type(model).__name__,
        reason,
    )
    return Sequential(model, vocabulary, **options)


def _probe(step: Step, ids: Tensor) -> Tensor:
    """Logits [6, vocabulary] after ids[:-2] and ids[:-4], and after one and two tokens more."""
    n = ids.shape[1] - 2
    half = n // 2 + 1
    if step.together:
        both = ids.expand(2, -1)
        step.prefill(0, both[:, :half], 0)
        found = [step.prefill(0, both[:, half:n], half, (n - half, n - half - 2))]
    else:
        step.prefill(0, ids[:, :half], 0)
        found = [step.prefill(0, ids[:, half:n], half), step.prefill(1, ids[:, : n - 2], 0)]
    with _HostReads() as reads:
        for i in range(2):
            positions = torch.tensor([n + i, n - 2 + i], device=ids.device)
            step.cache.at_rows(positions)
            found.append(step(ids[0, positions][:, None], positions))
    step.waits = reads.any
    return torch.cat(found)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The median of the rows' relative errors: a rounding may send a token to another expert."""
    found, expected = found.float(), expected.float().to(found.device)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).median())


class _HostReads(TorchDispatchMode):
    """Notes whether values of tensors are asked for."""

    any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any |= func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
        )
        return func(*args, **(kwargs or {}))


def _unreadable(model: Any, output: Any) -> str | None:
    """Why the state of a model is not one of keys and values only."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return "parts of it are offloaded"
    cache = output.get("past_key_values")
    if type(cache) is not DynamicCache:
        return f"its state is a {type(cache).__name__}"
    other = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    names = sorted(kind.__name__ for kind in other if kind.__name__ != "DummyLayer")
    return f"its state has {', '.join(names)}" if names else None


def _tolerance(model: Any) -> float:
    """How far logits may be off when tokens come in other numbers at once."""
    tensors = [*model.parameters(), *model.buffers()]
    exact = all(t.dtype == torch.float32 for t in tensors if t.is_floating_point())
    packed = any(t.dtype in (torch.uint8, torch.int32) and t.ndim > 1 for t in tensors)
    return 1e-3 if exact and not packed else 5e-2
