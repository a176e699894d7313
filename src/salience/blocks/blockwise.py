"""Blocks of a model, run one at a time.

The input of a block is the output of the float block before it (AWQ as published), so nothing found
in one block changes what another one sees; only blocks that learn get what quantized ones put out.
The size of a micro-batch is fixed by the shape of the text and the kind of device, and not by free
memory: a sum of floats in another order is another sum.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from salience.errors import SalienceError

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
BACKWARD_TOKENS = 4096  # that gradients are taken on


class _StopForwardError(Exception):
    """Unwinds the model's forward once the last block was reached."""


# The (args, kwargs) of a block after the hidden states, for a micro-batch.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class BlockArguments:
    """What the model hands its blocks beside hidden states.

    Args:
        first: for each block, in the first micro-batch.
        others: the same for each micro-batch, where they depend on the text, or hold what one
            block leaves there for another; empty when all are the same.
    """

    first: list[Arguments]
    others: list[list[Arguments]] = field(default_factory=list)

    def of(self, block: int, part: int) -> Arguments:
        """The arguments of a block for one micro-batch."""
        return (self.others[part] if self.others else self.first)[block]

    @property
    def stateful(self) -> bool:
        """Whether blocks leave something there for later ones, so that none can be left out."""
        return not all(_is_plain([*args, *named.values()]) for args, named in self.first)


def record_inputs(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Tensor,
    batch: int,
    device: torch.device,
    keep: Callable[[int, Tensor], None],
) -> BlockArguments:
    """Run what comes before the first block, and record how each block is called.

    Every block is replaced by a stub that notes its arguments and passes the hidden states on, so
    masks and position embeddings are the model's own, whatever they are and for each block.

    Args:
        model: a skeleton whose modules before the blocks hold their weights.
        tokens: [samples, seqlen]; samples must be a multiple of `batch`.
        batch: sequences in a micro-batch.
        keep: called with the number of each micro-batch and its hidden states.

    Raises:
        SalienceError: a model that hands more than hidden states from block to block.
    """
    # Blocks return hidden states, or a tuple with more in it, of which a stub knows nothing.
    for items in (1, 2, 3):
        with suppress(_UnpackedError):
            return _record(model, blocks, tokens, batch, device, keep, items)
    raise _refusal(model, "takes more from its blocks than hidden states")


def _record(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Tensor,
    batch: int,
    device: torch.device,
    keep: Callable[[int, Tensor], None],
    items: int,
) -> BlockArguments:
    recorder = _Recorder(blocks)
    handles = [block.register_forward_pre_hook(recorder, with_kwargs=True) for block in blocks]
    calls: list[list[Arguments]] = []
    try:
        for block in blocks:
            block.forward = partial(_pass_through, items)
        for number, part in enumerate(tokens.split(batch)):
            recorder.start()
            with suppress(_StopForwardError), _unpacking():
                model(input_ids=part.to(device), use_cache=False)
            if len(recorder.calls) < len(blocks):
                raise _refusal(model, f"runs {len(recorder.calls)} of its {len(blocks)} blocks")
            if recorder.hidden.shape[:2] != part.shape:
                raise _refusal(model, "hands its blocks more than one row of hidden states")
            keep(number, recorder.hidden)
            calls.append(
                [
                    (_once(args, new), {key: _once(kwargs.get(key), v) for key, v in named.items()})
                    for (args, kwargs), (new, named) in zip(
                        calls[0] if calls else recorder.calls, recorder.calls, strict=True
                    )
                ]
            )
    finally:
        for block, handle in zip(blocks, handles, strict=True):
            handle.remove()
            vars(block).pop("forward", None)  # the class's own forward shows again
    alike = all(_alike(a, b) for other in calls[1:] for a, b in zip(calls[0], other, strict=True))
    return BlockArguments(calls[0], [] if alike else calls)


def _is_plain(value: Any) -> bool:
    """Whether a value cannot be filled: a tensor, a number, a text, and what holds only such."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if type(value) is dict and value:
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, Tensor | str | int | float | torch.dtype)


def _alike(a: Arguments, b: Arguments) -> bool:
    named = a[1].keys() == b[1].keys() and all(_same(a[1][key], b[1][key]) for key in a[1])
    return named and _same(a[0], b[0])


def _once(first: Any, new: Any) -> Any:
    """`new`, with the tensors of `first` where they are equal, so that each is held once.

    Whatever else can be filled stays the very object: blocks may share it.
    """
    if isinstance(new, Tensor) and _same(first, new):
        return first
    if isinstance(new, list | tuple) and type(first) is type(new) and len(first) == len(new):
        return type(new)(map(_once, first, new)) if type(new) in (list, tuple) else new
    return new


def _refusal(model: nn.Module, what: str) -> SalienceError:
    return SalienceError(f"{type(model).__name__} {what}; this architecture is not supported")


class _UnpackedError(Exception):
    """The model takes a block's result apart into another number of items."""


@contextmanager
def _unpacking() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "values to unpack" not in str(error):
            raise
        raise _UnpackedError from None


class _Stub(Tensor):
    """A stub's hidden states.

    Without this, a batch of two would be unpacked as two results, and the first sequence taken for
    the first of them.
    """

    def __iter__(self) -> Any:
        raise _UnpackedError

    def __getitem__(self, index: Any) -> Any:
        return self if type(index) is int and index == 0 else super().__getitem__(index)


class _Unknown:
    """What a stub returns beside hidden states."""


def _pass_through(items: int, hidden_states: Tensor, *_args: object, **_kwargs: object) -> Any:
    return _returned(items, hidden_states)


def _returned(items: int, hidden: Tensor) -> Any:
    """What a block returns to a model that takes that many items of it."""
    if items == 1:
        return hidden.as_subclass(_Stub)
    return (hidden, *(_Unknown() for _ in range(items - 1)))


def _is_known(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_known, value))
    if isinstance(value, dict):
        return all(map(_is_known, value.values()))
    return not isinstance(value, _Unknown)


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, _Stub) else value


class _Recorder:
    """A forward pre-hook that notes the arguments of each block and stops at the last."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._blocks = blocks
        self.calls: list[Arguments] = []
        self.hidden = torch.empty(0)

    def start(self) -> None:
        self.calls = []

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if block is not self._blocks[len(self.calls)]:
            raise _refusal(block, "is not called in the order of the list of blocks")
        args = tuple(map(_plain, args))
        kwargs = {key: _plain(value) for key, value in kwargs.items()}
        if not _is_known((args, kwargs)):
            raise _refusal(block, "is handed more than hidden states by the block before it")
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if not self.calls:
            self.hidden = hidden.detach()
        self.calls.append((args[1:], kwargs))
        if len(self.calls) == len(self._blocks):
            raise _StopForwardError
        # Some models take the first item of what a block returns, which a stub's tensor is not made
        # for: hand on what the first block got, whatever became of it since.
        return (self.hidden, *args[1:]), kwargs


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if type(a) is type(b) is dict and a:
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    # Anything else that is not plain (an empty dict, a cache) is filled as the blocks run.
    return a == b if isinstance(a, str | int | float | bool | None) else a is b


def run_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """The output hidden states of one block for one micro-batch [batch, seqlen, hidden]."""
    args, kwargs = arguments
    out = block(hidden, *args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


def run_tail(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Tensor,
    hidden: Tensor,
    update: Callable[[str, Tensor], None],
) -> None:
    """Run what comes after the last block, handing the input of each linear there to `update`.

    Args:
        model: with the weights of what is in no block; the head needs none.
        blocks: its blocks.
        tokens: [batch, seqlen], of any value.
        hidden: [batch, seqlen, hidden], the output of the last block.
        update: called with the name and the input of each linear outside the blocks.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    seen: list[tuple[str, Tensor]] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append((name, _plain(args[0])))
        if module is head:
            raise _StopForwardError

    handles = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside
    ]
    try:
        # What a model takes from its blocks differs; see `record_inputs`.
        for items in (1, 2, 3):
            seen.clear()
            for block in blocks:
                block.forward = partial(_return, _returned(items, hidden))
            with suppress(_StopForwardError, _UnpackedError), _unpacking():
                model(input_ids=tokens, use_cache=False)
            if seen and all(x.shape[:-1] == hidden.shape[:-1] for _, x in seen):
                break
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks:
            vars(block).pop("forward", None)
    for name, x in seen:
        update(name, x)


def logits_of(
    model: nn.Module, blocks: nn.ModuleList, hidden: Tensor, parameters: Mapping[str, Tensor]
) -> Tensor:
    """The logits that a model makes of what leaves its last block; gradients flow back.

    Args:
        model: with the weights of what is in no block.
        blocks: its blocks, which are not run.
        hidden: [batch, seqlen, ..., hidden].
        parameters: used in place of the model's own, by name.

    Returns:
        Of the dtype of `hidden`, [batch, seqlen, vocabulary].

    Raises:
        SalienceError: a model whose logits are not made of the last block's output alone.
    """
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    named = {"input_ids": tokens, "use_cache": False}
    try:
        # What a model takes from its blocks differs; see `record_inputs`.
        for items in (1, 2, 3):
            for block in blocks:
                block.forward = partial(_return, _returned(items, hidden))
            with suppress(_UnpackedError), _unpacking():
                out = functional_call(model, dict(parameters), (), named, tie_weights=False)
                logits = _plain(out.logits)
                if logits.shape[:2] == hidden.shape[:2]:
                    return logits.to(hidden.dtype)
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
    raise _refusal(model, "makes its logits of more than the last hidden states")


def _return(output: Any, *_args: object, **_kwargs: object) -> Any:
    return output


def micro_batch(
    samples: int, seqlen: int, device: torch.device, learning: int | None = None
) -> int:
    """The most sequences at once that divide the samples and stay within a budget of tokens.

    Args:
        samples: sequences.
        seqlen: tokens in each.
        device: where they run.
        learning: another budget, for blocks that learn; they want two micro-batches at least.
    """
    limit = max(1, (learning or MICRO_BATCH_TOKENS[device.type]) // seqlen)
    most = samples if learning is None else samples // 2
    return max(n for n in range(1, min(limit, most) + 1) if samples % n == 0)


def observe(
    block: nn.Module,
    names: list[str],
    run: Callable[[], Tensor],
    update: Callable[[str, Tensor], None],
) -> Tensor:
    """Run a block once, handing the input [..., in] of each named linear to `update`."""
    handles = []
    for name in names:

        def hook(_module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            update(name, args[0])

        handles.append(block.get_submodule(name).register_forward_pre_hook(hook))
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()
