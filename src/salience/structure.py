"""The parts of a decoder that quantization cares about, found by experiment and not by name.

Sink groups. Linears that receive the very same tensor (q, k, v; gate, up) share an input scale.

Folds. A scale s on the input channels of a sink group changes nothing when the module that makes
those channels is divided by s:  W x = (W s)(x / s). Which module that is, and which of its
channels feeds which input channel, is found in three steps.

1. Gradients. Multiply the channels r of every earlier module by factors g_r and differentiate the
   sink's input x_c(t) at g = 1. A channel that x follows in proportion (rows of v, up; a norm) has

       dx_c(t) / dg_r = x_c(t)  or  0,     the same for all tokens t,

   one that feeds a softmax, an activation or a norm has not. With weights over the tokens that are
   orthogonal to x_c(t)^2 the first kind sums to 0 and the second does not; with weights
   x_c(t) / |x_c|^2 the first kind sums to how many input channels it feeds. Two backward passes a
   sink group tell all rows of all earlier modules apart, in whatever order a fused projection
   keeps them.
2. Index. Those channels are multiplied by known factors; how much each input channel moves names
   the channel that feeds it. Repeated heads (grouped-query attention) come out by themselves.
3. Consumers and proof. Everything else that reads the divided channels (a router, stacked experts,
   a linear that stays float) is multiplied too, or there is no fold. Then, with random scales
   folded in, the output of the block must not change. The scales are powers of two: they round
   nothing, so a router meets the very same numbers and chooses the same experts.
"""

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from salience.folds import (
    PROOF_TOLERANCE,
    Fold,
    apply_fold,
    channels_of,
    divide,
    multiply,
    relative_error,
    restore,
    restored,
    snapshot,
    unchanged,
)
from salience.groups import Run, calls_of, sink_groups
from salience.modules import (
    expert_lists,
    find_blocks,
    is_linear,
    kept,
    linears,
    weight_of,
)

__all__ = [
    "PROOF_TOLERANCE",
    "Fold",
    "Run",
    "apply_fold",
    "discover_folds",
    "find_blocks",
    "kept",
    "linears",
    "relative_error",
    "restore",
    "search_folds",
    "sink_groups",
    "snapshot",
    "unchanged",
    "weight_of",
]

_PROBE_LEVELS = 1.01  # ratio of neighbouring probe factors
_GRADIENT_TOLERANCES = (1e-4, 1e-2)  # of sums that are whole for channels that x follows


def discover_folds(
    block: nn.Module, run: Run, groups: list[tuple[str, ...]], seed: int = 0
) -> list[Fold]:
    """The folds of a block with real fp32 weights, each proved; see `search_folds`."""
    return search_folds(block, run, groups, seed)[0]


def search_folds(
    block: nn.Module, run: Run, groups: list[tuple[str, ...]], seed: int = 0
) -> tuple[list[Fold], dict[str, str]]:
    """The folds of a block with real fp32 weights, each proved.

    Args:
        block: the decoder block.
        run: runs the block on sample inputs and returns its output [..., hidden].
        groups: the result of `sink_groups`.
        seed: of the probe and proof scales.

    Returns:
        The folds, and for each group without one its first linear and the reason.
    """
    search = _Search(block, run, seed)
    followed = search.gradients([sinks[0] for sinks in groups])
    folds: list[Fold] = []
    reasons: dict[str, str] = {}
    for sinks in groups:
        if any(sinks[0] in fold.sinks for fold in folds):
            continue
        why = "no norm or linear of the block feeds it"
        for prev, away in followed[sinks[0]]:
            fold = search.fold(prev, away, sinks)
            if isinstance(fold, Fold):
                folds.append(_whole_groups(fold, groups))
                break
            # The nearest module says most.
            why = fold if why.startswith("no norm") else why
        else:
            reasons[sinks[0]] = why
    return folds, reasons


def _whole_groups(fold: Fold, groups: list[tuple[str, ...]]) -> Fold:
    """Sinks in the order of their groups."""
    order = [name for group in groups for name in group]
    first = [name for name in fold.sinks if name in order]
    return replace(fold, sinks=tuple(sorted(first, key=order.index)))


class _Search:
    """The experiments on one block."""

    def __init__(self, block: nn.Module, run: Run, seed: int) -> None:
        self.block = block
        self.run = run
        self.generator = torch.Generator().manual_seed(seed)
        self.calls = calls_of(block, run)
        self.first = {call.name: call for call in reversed(self.calls)}
        self.output = run()
        self.experts = expert_lists(block)

    def gradients(self, sinks: list[str]) -> dict[str, list[tuple[str, Tensor]]]:
        """For each sink the modules that feed it, nearest first.

        With each, for its channels, how far the sink is from following them in proportion.
        """
        order = list(dict.fromkeys(call.name for call in reversed(self.calls)))
        factors = {
            name: torch.ones(count, device=self.output.device, requires_grad=True)
            for name in order
            if (count := channels_of(self.block.get_submodule(name)))
        }
        with torch.enable_grad():
            inputs = self._inputs(sinks, factors)
            return {sink: self._followed(inputs[sink], factors) for sink in sinks}

    def _followed(self, x: Tensor, factors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        if not x.requires_grad:
            return []
        values = x.detach().double()
        square = values.square()
        energy = square.sum(0).clamp(min=1e-300)
        noise = torch.randn(values.shape, generator=self.generator).to(values)
        noise -= (square * noise).sum(0) / energy
        result: list[tuple[str, Tensor]] = []
        counts, rests = (
            torch.autograd.grad(
                x,
                list(factors.values()),
                (values * weights / energy).to(x.dtype),
                retain_graph=True,
                allow_unused=True,
            )
            for weights in (torch.ones_like(values), noise)
        )
        for name, count, rest in zip(factors, counts, rests, strict=True):
            if count is None or rest is None or not (count.abs() + rest.abs()).max() > 0:
                continue
            away = torch.maximum((count - count.round()).abs(), rest.abs())
            result.append((name, torch.where(count.round() >= 1, away, torch.inf)))
        return result

    def fold(self, prev: str, away: Tensor, sinks: tuple[str, ...]) -> Fold | str:
        """The proved fold, or the reason why there is none."""
        if not (away <= _GRADIENT_TOLERANCES[-1]).any():
            return f"what lies between it and {prev} is not linear"
        # Rounding may hide a row, and a gate that is nearly linear may look like one.
        masks = (away <= tolerance for tolerance in _GRADIENT_TOLERANCES)
        found = (self._index(prev, rows, sinks[0]) for rows in masks if rows.any())
        index = next((index for index in found if index is not None), None)
        if index is None:
            return f"it does not follow the channels of {prev} one by one, in proportion"
        rule = self._rule(prev)
        if rule is None:
            return f"{prev} is no norm that can be divided"
        fold = self._with_consumers(Fold(prev, sinks, rule, index, 0.0))
        if isinstance(fold, str):
            return fold
        with restored(self.block, fold.modules):
            apply_fold(self.block, fold, self._scales(fold))
            error = relative_error(self.run(), self.output)
        if error <= PROOF_TOLERANCE:
            return replace(fold, error=error)
        return f"{prev} feeds something else, too"

    def _index(self, prev: str, rows: Tensor, sink: str) -> Tensor | None:
        """Which channel of prev, of those in the mask `rows`, feeds each input channel."""
        channels = rows.nonzero().flatten().cpu()
        place = torch.arange(len(channels))
        base = int(len(channels) ** 0.5) + 1
        # All at once says how many feed an input channel; then two digits name the one that does.
        probes = [
            self._exponents(prev, channels, digit, len(rows), sink)
            for digit in (torch.zeros_like(place), place // base, place % base)
        ]
        if any(probe is None for probe in probes):
            return None
        count, high, low = (probe for probe in probes if probe is not None)
        if (count > 1).any() and not (count == 1).any() and len(channels) > len(count):
            # Gate and up of a ReLU gate: the input follows either; take the later rows.
            later = torch.zeros_like(rows)
            later[channels[-len(count) :].to(rows.device)] = True
            return self._index(prev, later, sink)
        index = torch.full((len(count),), torch.nan, dtype=torch.float64)
        named = ((high - 1) * base + low - 1)[count == 1].long()
        if ((named < 0) | (named >= len(channels))).any():
            return None
        index[count == 1] = channels[named].double()
        filled = _fill_unknown(index)
        if filled is None or filled.min() < 0 or filled.max() >= len(rows):
            return None
        return filled.long()

    def _exponents(
        self, prev: str, channels: Tensor, digit: Tensor, total: int, sink: str
    ) -> Tensor | None:
        """By how many levels each input channel moves when channels move by `digit` + 1.

        NaN for input channels that are 0 for every token, None if any moves in another way.
        """
        factors = torch.ones(total, dtype=torch.float64)
        factors[channels] = _PROBE_LEVELS ** (digit + 1).double()
        x = self.first[sink].x.detach().flatten(0, -2).double()
        moved = self._inputs([sink], {prev: factors.to(x.device)})[sink].double()
        if moved.shape != x.shape:
            return None
        energy = x.square().sum(0)
        ratio = (moved * x).sum(0) / energy.clamp(min=1e-300)
        if relative_error(x * ratio, moved) > PROOF_TOLERANCE:
            return None
        exponent = ratio.clamp(min=1e-300).log() / torch.tensor(_PROBE_LEVELS).double().log()
        exponent = torch.where(energy > 0, exponent, torch.nan).cpu()
        return None if ((exponent - exponent.round()).abs() > 0.1).any() else exponent.round()

    def _rule(self, prev: str) -> str | None:
        """How the output of prev is divided, tried on its own call."""
        module, call = self.block.get_submodule(prev), self.first[prev]
        if is_linear(module):
            return "rows"
        divisor = self._powers(channels_of(module)).to(call.out.device)
        for rule in ("norm", "1+w norm"):
            with restored(self.block, (prev,)), torch.no_grad():
                divide(module, rule, divisor.to(call.out.dtype))
                if _same(call.again(module, call.x), call.out / divisor):
                    return rule
        return None

    def _with_consumers(self, fold: Fold) -> Fold | str:
        """The fold with all that reads the divided channels, or the reason why there is none."""
        found = linears(self.block)
        scales = self._scales(fold)
        while True:
            with restored(self.block, fold.modules):
                apply_fold(self.block, fold, scales)
                moved = {call.name: call for call in reversed(calls_of(self.block, self.run))}
            known = {*fold.sinks, *(name for name, _ in fold.others)}
            news = []
            for name, call in self.first.items():
                if name == fold.prev or name in known or name not in moved:
                    continue
                if _moved_by(call.x, moved[name].x, scales):
                    news.append(name)
            sinks, others = list(fold.sinks), list(fold.others)
            for name in news:
                if name in found:
                    sinks.append(name)
                    continue
                parameters = self._scaled_parameters(name, scales)
                if parameters is None:
                    return f"{fold.prev} feeds {name}, too, whose inputs cannot be scaled"
                others += [entry for entry in parameters if entry not in others]
            if (len(sinks), len(others)) == (len(fold.sinks), len(fold.others)):
                return fold
            fold = replace(fold, sinks=tuple(sinks), others=tuple(others))

    def _scaled_parameters(self, name: str, scales: Tensor) -> list[tuple[str, int]] | None:
        """The parameters of a module, with their axes, that undo a division of its input."""
        module, call = self.block.get_submodule(name), self.first[name]
        own = dict(module.named_parameters(recurse=False))
        entries = [
            (local, axis)
            for local, parameter in own.items()
            for axis in range(parameter.ndim)
            if parameter.shape[axis] == len(scales)
        ]
        if not entries:
            return []  # it hands its input on to modules that are looked at themselves
        divided = (call.x / scales).to(call.x.dtype)
        for count in range(1, 4):
            for some in itertools.combinations(entries, count):
                with restored(self.block, (name,)), torch.no_grad():
                    for local, axis in some:
                        multiply(own[local], axis, scales)
                    if _same(call.again(module, divided), call.out):
                        return self._for_all_experts(name, list(some))
        # Without one: a module that holds others may have parameters that do not meet its input.
        return [] if next(module.children(), None) is not None else None

    def _for_all_experts(self, name: str, entries: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """What holds for one of a list of experts holds for those no token was sent to."""
        for items in self.experts.values():
            for item in items:
                if name == item or name.startswith(f"{item}."):
                    rest = name[len(item) :]
                    return [(f"{o}{rest}.{local}", axis) for o in items for local, axis in entries]
        return [(f"{name}.{local}", axis) for local, axis in entries]

    def _scales(self, fold: Fold) -> Tensor:
        powers = self._powers(int(fold.index.max()) + 1)
        return powers[fold.index].to(self.output.device)

    def _powers(self, count: int) -> Tensor:
        return 2.0 ** torch.randint(-2, 3, (count,), generator=self.generator)

    def _inputs(self, names: list[str], factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs [tokens, in] of linears when the outputs of modules are multiplied by factors."""
        seen: dict[str, Tensor] = {}
        handles = []
        for name, factor in factors.items():

            def multiply(
                _module: nn.Module, _args: object, out: object, factor: Tensor = factor
            ) -> object:
                if not isinstance(out, Tensor) or out.shape[-1] != len(factor):
                    return out
                return out * factor.to(out.dtype)

            handles.append(self.block.get_submodule(name).register_forward_hook(multiply))
        for name in names:

            def note(
                _module: nn.Module, args: tuple[Any, ...], kwargs: Any, name: str = name
            ) -> None:
                seen.setdefault(name, (args[0] if args else kwargs[next(iter(kwargs))]))

            handles.append(
                self.block.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
            )
        try:
            self.run()
        finally:
            for handle in handles:
                handle.remove()
        return {name: seen[name].flatten(0, -2) for name in names}


def _fill_unknown(index: Tensor) -> Tensor | None:
    """Name the channels that are not known, when the others are in plain order.

    Not known are inputs that were 0 for every token, and those that follow two channels: a gate
    that is linear for all tokens as well as what it gates.
    """
    unknown = index.isnan()
    if not unknown.any():
        return index
    if unknown.all():
        return None
    offset = (index - torch.arange(len(index)))[~unknown]
    return torch.arange(len(index)) + offset[0] if (offset == offset[0]).all() else None


def _moved_by(x: Tensor, moved: Tensor, scales: Tensor) -> bool:
    """Whether `moved` is x / scales, and not x."""
    if x.shape != moved.shape or x.shape[-1] != len(scales) or not x.is_floating_point():
        return False
    if not x.numel() or relative_error(moved, x) <= PROOF_TOLERANCE:
        return False
    return relative_error(moved * scales, x) <= PROOF_TOLERANCE


def _same(a: Any, b: Any) -> bool:
    """Whether two results of a module are equal but for rounding."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or not a.is_floating_point():
            return a.shape == b.shape and torch.equal(a, b)
        return relative_error(a, b) <= PROOF_TOLERANCE
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b)
