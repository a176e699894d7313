"""What moves the codes of `methods.tuned`: micro-batches, the gradient, a loss held out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from salience.adam import correction
from salience.capture import captured
from salience.methods.base import Tuning
from salience.methods.tuned import Rounding
from salience.modules import is_transposed, weight_of
from salience.qtensor import QTensor

_FAINTEST = 1e-6  # of the mean square of a target: tokens below count as if they had that much


@dataclass(frozen=True, slots=True)
class Examples:
    """Micro-batches of what a block is to learn.

    Args:
        count: how many.
        inputs: of the quantized block, [batch, seqlen, ..., hidden], by number.
        targets: what the float block made of its own inputs, likewise.
        run: the output of the block, with the weights it has now, for the number and its inputs.
        alike: whether `run` does the same for every number.
    """

    count: int
    inputs: Callable[[int], Tensor]
    targets: Callable[[int], Tensor]
    run: Callable[[int, Tensor], Tensor]
    alike: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """The weights of a block's linears by their names in it, and what the learning came to.

    `loss_start` and `loss` are of the micro-batches held out; `iterations` is where `loss` was
    reached, 0 where the start stayed.
    """

    weights: dict[str, QTensor]
    loss_start: float
    loss: float
    iterations: int


def learn(
    block: nn.Module,
    start: Mapping[str, QTensor],
    examples: Examples,
    tuning: Tuning,
    on_check: Callable[[int, float], None] = lambda _iteration, _ratio: None,
) -> Learned:
    """Better codes for the linears of a block.

    Args:
        block: with its float weights, scales folded in; it is left as it was.
        start: of linears by their names in it, of uniform schemes in column order.
        examples: at least two micro-batches.
        tuning: how.
        on_check: called with the iterations done and the loss held out, relative to the start's.
    """
    floats = {name: block.get_submodule(name).get_parameter("weight") for name in start}
    try:
        return _learn(_Learner(block, start, examples, tuning), start, tuning, on_check)
    finally:
        for name, weight in floats.items():
            block.get_submodule(name).weight = weight


def _learn(
    learner: "_Learner",
    start: Mapping[str, QTensor],
    tuning: Tuning,
    on_check: Callable[[int, float], None],
) -> Learned:
    first = best = learner.held_out()
    at, since, kept = 0, 0, learner.copy()
    for iteration, part in enumerate(learner.order(), start=1):
        rate = correction(iteration) * (1 - (iteration - 1) / tuning.iterations)
        learner.iterate(part, rate)
        if iteration % tuning.check_every and iteration != tuning.iterations:
            continue
        loss = learner.held_out()
        on_check(iteration, loss / max(first, 1e-30))
        since += 1
        if loss < best:
            best, at, since, kept = loss, iteration, 0, learner.copy()
        if since >= tuning.patience:
            break
    learner.restore(kept)
    return Learned(learner.codes() if at else dict(start), first, best, at)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each token relative to its target's square, mean of all: a number.

    Args:
        output: [..., hidden].
        target: likewise.
    """
    power = target.square().mean(-1)
    floor = _FAINTEST * power.mean()
    return ((output - target).square().mean(-1) / power.clamp(min=floor)).mean()


class _Learner:
    """A block whose linears take their weights from `Rounding`s, and what moves them."""

    def __init__(
        self,
        block: nn.Module,
        start: Mapping[str, QTensor],
        examples: Examples,
        tuning: Tuning,
    ) -> None:
        self._examples, self._tuning = examples, tuning
        kinds: dict[object, list[str]] = {}
        for name, qt in start.items():
            width = qt.scheme.group_columns(qt.in_features)
            kinds.setdefault((qt.scheme, width), []).append(name)
        self._names = list(kinds.values())
        self._kinds: list[Rounding] = []
        for names in self._names:
            linears = [block.get_submodule(name) for name in names]
            kind = Rounding([weight_of(each) for each in linears], [start[n] for n in names])
            self._kinds.append(kind)
            values, gradients = kind.parts(kind.value), kind.parts(kind.gradient)
            for linear, value, gradient in zip(linears, values, gradients, strict=True):
                turned = is_transposed(linear)
                weight = nn.Parameter(value.T if turned else value)
                weight.grad = gradient.T if turned else gradient
                linear.weight = weight
        self.state = [tensor for kind in self._kinds for tensor in kind.state()]
        self._trained, self._held = tuning.split(examples.count)
        device = self.state[0].device
        self._rates = torch.zeros(2, device=device)
        self._part = 0
        self._x, self._y = examples.inputs(0).clone(), examples.targets(0).clone()
        self._step: Callable[[], None] = self._iterate
        if examples.alike:
            changed = [tensor for kind in self._kinds for tensor in kind.buffers()]
            self._step = captured(self._iterate, changed)

    def order(self) -> list[int]:
        """The micro-batch of each iteration: all that are trained on, in a new order each time."""
        generator = torch.Generator().manual_seed(self._tuning.seed)
        order: list[int] = []
        while len(order) < self._tuning.iterations:
            order += torch.randperm(len(self._trained), generator=generator).tolist()
        return order[: self._tuning.iterations]

    def iterate(self, part: int, rate: float) -> None:
        """One step on a micro-batch, with the rates times `rate`."""
        self._part = part
        self._x.copy_(self._examples.inputs(part))
        self._y.copy_(self._examples.targets(part))
        self._rates[0] = rate * self._tuning.rounding_rate
        self._rates[1] = rate * self._tuning.range_rate
        self._step()

    def _iterate(self) -> None:
        for kind in self._kinds:
            kind.gradient.zero_()
        with torch.enable_grad():
            self._loss(self._part, self._x, self._y).backward()
        for kind in self._kinds:
            kind.step(self._rates[0], self._rates[1], self._tuning.bound)

    def _loss(self, part: int, x: Tensor, y: Tensor) -> Tensor:
        return relative_error(self._examples.run(part, x), y)

    def held_out(self) -> float:
        """The loss on the micro-batches that are not trained on."""
        with torch.no_grad():
            losses = [
                self._loss(part, self._examples.inputs(part), self._examples.targets(part))
                for part in self._held
            ]
            return float(torch.stack(losses).mean())

    def copy(self) -> list[Tensor]:
        """What is learned, as it is now."""
        return [tensor.clone() for tensor in self.state]

    def restore(self, kept: list[Tensor]) -> None:
        """Go back to a `copy`."""
        for tensor, value in zip(self.state, kept, strict=True):
            tensor.copy_(value)
        for kind in self._kinds:
            kind.round()

    def codes(self) -> dict[str, QTensor]:
        """The weights as a checkpoint holds them, by the linears' names."""
        found = zip(self._names, self._kinds, strict=True)
        return {
            name: qt for names, kind in found for name, qt in zip(names, kind.codes(), strict=True)
        }
