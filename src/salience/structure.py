"""The parts of a decoder that quantization cares about, found by experiment and not by name.

Blocks. A decoder is a list of blocks; it is the largest `nn.ModuleList` of the model.

Sink groups. Linears that receive the very same tensor (q, k, v; gate, up) share an input scale.

Folds. A scale s on the input channels of a sink group changes nothing when the module that makes
those channels is divided by s:  W x = (W s)(x / s). Which module that is, and which of its
channels feeds which input channel, is found by a probe: multiply the channels of a candidate by
known factors and watch the sink's input. If every input channel moved by one factor, constant over
all tokens, the factor says which channel feeds it; norms, rows of a linear, the last rows of a
fused projection and the repeated heads of grouped-query attention all come out of this one rule. A
candidate in front of a softmax, an activation or a mix of channels fails it. What passes is then
proved: with random scales folded in, the output of the block must not change.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from salience.errors import SalienceError

# True folds stay under 2e-6 in fp32, false ones are above 2e-2: the gap is four orders wide.
PROOF_TOLERANCE = 1e-4
_PROBE_LEVELS = 1.01  # ratio of neighbouring probe factors

Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """prev / s and sinks * s together change nothing.

    Args:
        prev: module of the block whose output channels are divided.
        sinks: linears of the block whose input channels are multiplied.
        rule: how prev is divided: "norm" (weight), "1+w norm" (1 + weight) or "rows" (of a linear).
        index: channel of prev that feeds each input channel, int64 [in].
        error: relative change of the block's output in the proof.
    """

    prev: str
    sinks: tuple[str, ...]
    rule: str
    index: Tensor
    error: float

    @property
    def channels(self) -> int:
        """How many scales are free: input channels fed by one channel of prev share one."""
        return int(self.index.unique().numel())


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder's blocks.

    Raises:
        SalienceError: the model has no list of blocks with linears.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not linears(module):
            continue
        size = sum(p.numel() for p in module.parameters())
        if best is None or size > best[0]:
            best = (size, name, module)
    if best is None:
        raise SalienceError(f"{type(model).__name__} has no list of blocks with linear layers")
    return best[1], best[2]


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """All linears below `module`, by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear as [out, in]: a view, so that writing to it writes to the linear."""
    return linear.get_parameter("weight").detach()


def sink_groups(block: nn.Module, run: Run) -> list[tuple[str, ...]]:
    """Linears of `block` that received the same tensor, in the order they were called.

    Raises:
        SalienceError: a linear that was not called, so nothing is known of its input.
    """
    order = _call_order(block, run)
    groups: dict[tuple[object, ...], list[str]] = {}
    found = linears(block)
    for name, x in order:
        if name in found:
            key = (x.data_ptr(), tuple(x.shape), x.stride())
            groups.setdefault(key, []).append(name)
    missing = set(found) - {name for group in groups.values() for name in group}
    if missing:
        raise SalienceError(f"linear {min(missing)} was not reached by the calibration text")
    return [tuple(dict.fromkeys(group)) for group in groups.values()]


def discover_folds(
    block: nn.Module, run: Run, groups: list[tuple[str, ...]], seed: int = 0
) -> list[Fold]:
    """The folds of a block with real fp32 weights, each proved.

    Args:
        block: the decoder block.
        run: runs the block on sample inputs and returns its output [..., hidden].
        groups: the result of `sink_groups`.
        seed: of the probe and proof scales.
    """
    names = [name for name, _ in _call_order(block, run)]
    folds = []
    for sinks in groups:
        earlier = names[: names.index(sinks[0])]
        for prev in reversed(list(dict.fromkeys(earlier))):
            fold = _try_fold(block, run, prev, sinks, seed)
            if fold is not None:
                folds.append(fold)
                break
    return folds


def apply_fold(block: nn.Module, fold: Fold, scales: Tensor) -> None:
    """Divide prev and multiply the sinks by `scales` [in], in place."""
    prev = block.get_submodule(fold.prev)
    divisor = scales.new_ones(_channels(prev))
    divisor[fold.index.to(scales.device)] = scales
    with torch.no_grad():
        _divide(prev, fold.rule, divisor)
        for name in fold.sinks:
            block.get_submodule(name).get_parameter("weight").mul_(scales)


def snapshot(block: nn.Module, names: Iterable[str]) -> list[tuple[nn.Parameter, Tensor]]:
    """Copies of the parameters of these modules, for `restore`."""
    return [
        (parameter, parameter.detach().clone())
        for name in names
        for parameter in block.get_submodule(name).parameters(recurse=False)
    ]


def restore(saved: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Put parameters back as they were at the `snapshot`."""
    with torch.no_grad():
        for parameter, value in saved:
            parameter.copy_(value)


@contextmanager
def _restored(block: nn.Module, names: Iterable[str]) -> Iterator[None]:
    saved = snapshot(block, names)
    try:
        yield
    finally:
        restore(saved)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference| in the Frobenius norm; infinite when not finite."""
    error = ((value - reference).norm() / reference.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def _try_fold(
    block: nn.Module, run: Run, prev: str, sinks: tuple[str, ...], seed: int
) -> Fold | None:
    module = block.get_submodule(prev)
    width = block.get_submodule(sinks[0]).get_parameter("weight").shape[1]
    for rule, first in _candidates(module, width):
        index = _probe(block, run, prev, rule, first, sinks[0])
        if index is None:
            continue
        fold = Fold(prev, sinks, rule, index, 0.0)
        error = _prove(block, run, fold, seed)
        if error <= PROOF_TOLERANCE:
            return Fold(prev, sinks, rule, index, error)
    return None


def _candidates(module: nn.Module, width: int) -> list[tuple[str, int]]:
    """Rules to try for a module that may feed `width` channels, with the first channel to scale."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return []
    if weight.ndim == 1 and weight.shape[0] == width:
        return [("norm", 0), ("1+w norm", 0)]
    if not isinstance(module, nn.Linear):
        return []
    rows = weight.shape[0]
    if rows <= width:
        return [("rows", 0)]
    # A fused projection: what feeds the sink are its last rows (up of gate_up; v of qkv, whose
    # rows are as many as the sink's, or fewer where heads are shared).
    return [("rows", rows - width), ("rows", rows - (rows - width) // 2)]


def _probe(
    block: nn.Module, run: Run, prev: str, rule: str, first: int, sink: str
) -> Tensor | None:
    """Which channel of prev (from `first` on) feeds each input channel of the sink, or None."""
    module = block.get_submodule(prev)
    total = _channels(module)
    count = total - first
    base = int(count**0.5) + 1
    x = _input_of(block, run, sink)
    digits = []
    # Two probes of about sqrt(count) well-spaced factors name a channel by its two digits.
    for digit in (torch.arange(count) // base, torch.arange(count) % base):
        factors = _PROBE_LEVELS ** (digit + 1).double()
        divisor = torch.ones(total, dtype=torch.float64)
        divisor[first:] = 1 / factors
        with _restored(block, (prev,)), torch.no_grad():
            _divide(module, rule, divisor.float().to(x.device))
            moved = _input_of(block, run, sink)
        energy = x.double().square().sum(0)
        ratio = (moved.double() * x.double()).sum(0) / energy.clamp(min=1e-300)
        if relative_error(x * ratio.float(), moved) > PROOF_TOLERANCE:
            return None
        exponent = ratio.clamp(min=1e-300).log() / torch.tensor(_PROBE_LEVELS).double().log()
        exponent = torch.where(energy > 0, exponent, torch.nan).cpu()
        if ((exponent - exponent.round()).abs() > 0.1).any():
            return None
        digits.append(exponent.round() - 1)
    index = _fill_dead(digits[0] * base + digits[1] + first)
    if index is None or index.min() < first or index.max() >= total:
        return None
    return index.long()


def _fill_dead(index: Tensor) -> Tensor | None:
    """Name the channels that were 0 for every token, when the others are in plain order."""
    dead = index.isnan()
    if not dead.any():
        return index
    if dead.all():
        return None
    offset = (index - torch.arange(len(index)))[~dead]
    return torch.arange(len(index)) + offset[0] if (offset == offset[0]).all() else None


def _prove(block: nn.Module, run: Run, fold: Fold, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    per_channel = torch.exp(torch.rand(int(fold.index.max()) + 1, generator=generator) * 2 - 1)
    before = run()
    scales = per_channel[fold.index].to(before.device)
    with _restored(block, (fold.prev, *fold.sinks)):
        apply_fold(block, fold, scales)
        return relative_error(run(), before)


def _divide(module: nn.Module, rule: str, divisor: Tensor) -> None:
    weight = module.get_parameter("weight")
    if rule == "1+w norm":
        weight.copy_((1 + weight) / divisor - 1)
    else:
        weight.div_(divisor[:, None] if weight.ndim == 2 else divisor)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.div_(divisor)


def _channels(module: nn.Module) -> int:
    return int(module.get_parameter("weight").shape[0])


def _call_order(block: nn.Module, run: Run) -> list[tuple[str, Tensor]]:
    """(name, first input) of each leaf module, in the order of the calls."""
    calls: list[tuple[str, Tensor]] = []
    handles = []
    for name, module in block.named_modules():
        if next(module.children(), None) is not None:
            continue

        def hook(
            _module: nn.Module, args: tuple[object, ...], _out: object, name: str = name
        ) -> None:
            if args and isinstance(args[0], Tensor):
                calls.append((name, args[0]))

        handles.append(module.register_forward_hook(hook))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _input_of(block: nn.Module, run: Run, name: str) -> Tensor:
    """The input [tokens, in] of one linear, fp32."""
    return next(x for n, x in _call_order(block, run) if n == name).detach().flatten(0, -2).float()
