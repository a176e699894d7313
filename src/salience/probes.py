"""Experiments on one block: which module feeds an input, by which channels, and divided how.

The three questions of `structure` that are asked of one module and one sink at a time. The block is
run with hooks; its weights are not touched, or put back.
"""

from typing import Any

import torch
from torch import Tensor, nn

from salience.folds import PROOF_TOLERANCE, channels_of, divide, relative_error, restored
from salience.groups import Run, calls_of
from salience.modules import expert_lists, is_linear

_PROBE_LEVELS = 1.01  # ratio of neighbouring probe factors


class Probe:
    """A block and what was seen when it ran.

    Args:
        block: with real fp32 weights.
        run: runs it on sample inputs and returns its output.
        seed: of the factors and scales.
    """

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

    def index(self, prev: str, rows: Tensor, sink: str) -> Tensor | None:
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
            return self.index(prev, later, sink)
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

    def rule(self, prev: str) -> str | None:
        """How the output of prev is divided, tried on its own call."""
        module, call = self.block.get_submodule(prev), self.first[prev]
        if is_linear(module):
            return "rows"
        divisor = self.powers(channels_of(module)).to(call.out.device)
        for rule in ("norm", "1+w norm"):
            with restored(self.block, (prev,)), torch.no_grad():
                divide(module, rule, divisor.to(call.out.dtype))
                if same(call.again(module, call.x), call.out / divisor):
                    return rule
        return None

    def powers(self, count: int) -> Tensor:
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


def same(a: Any, b: Any) -> bool:
    """Whether two results of a module are equal but for rounding."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or not a.is_floating_point():
            return a.shape == b.shape and torch.equal(a, b)
        return relative_error(a, b) <= PROOF_TOLERANCE
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b)
