"""Learned rounding: gradients by autograd in fp64, the start bit for bit, and never worse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from salience import grid
from salience.adam import correction
from salience.methods import Tuning
from salience.methods.learner import Examples, Learned, learn, relative_error
from salience.methods.tuned import Rounding
from salience.modules import weight_of
from salience.qtensor import QTensor
from salience.scheme import Scheme

SCHEMES = ("w4g16", "w3g16", "w2g16", "w1g16", "w8g32", "w3g16-sym", "w2g16-sym", "w8channel-sym")


def started(scheme: Scheme, weight: Tensor, seed: int = 0) -> QTensor:
    """A weight on narrowed grids, some codes moved as GPTQ moves them."""
    generator = torch.Generator().manual_seed(seed)
    lo, hi = grid.value_range(weight, scheme)
    qt = grid.encode(weight, grid.make_grid(0.7 * lo, 0.8 * hi, scheme), scheme)
    moves = torch.randint(-1, 2, qt.q.shape, generator=generator)
    moves[torch.rand(qt.q.shape, generator=generator) < 0.7] = 0
    codes = (qt.q.int() + moves).clamp(0, scheme.levels).to(torch.uint8)
    return QTensor(codes, qt.scales, qt.zeros, scheme)


def same(a: QTensor, b: QTensor) -> bool:
    pairs = ((a.q, b.q), (a.scales, b.scales), (a.zeros, b.zeros))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_start_is_exact(name: str) -> None:
    scheme = Scheme.parse(name)
    weights = [torch.randn(8, 32), torch.randn(16, 32)]
    weights[0][0] = 0  # a row with no width
    weights[1][3, 5] = 30  # far beyond its grid
    start = [started(scheme, weight) for weight in weights]
    rounding = Rounding(weights, start)
    values = zip(rounding.parts(rounding.value), start, strict=True)
    assert all(torch.equal(value, qt.dequantize()) for value, qt in values)
    assert all(same(a, b) for a, b in zip(rounding.codes(), start, strict=True))


def moved(name: str) -> Rounding:
    """Offsets and ranges that are not 0, in fp64."""
    torch.manual_seed(1)
    scheme = Scheme.parse(name)
    weight = torch.randn(8, 32)
    rounding = Rounding([weight.double()], [started(scheme, weight)])
    rounding.offset += 0.5 * torch.randn_like(rounding.offset)
    rounding.range += 0.05 * torch.randn_like(rounding.range)
    if scheme.sym:
        rounding.range[0] = rounding.range[1]
    rounding.round()
    rounding.gradient += torch.randn_like(rounding.gradient)
    return rounding


class _Through(torch.autograd.Function):
    """A function whose gradient is that of doing nothing."""

    @staticmethod
    def forward(_ctx: object, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(_ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def surrogate(rounding: Rounding, offset: Tensor, factors: Tensor) -> Tensor:
    """The values as the formulas of `methods.tuned` have them, for autograd."""
    levels = rounding.levels
    low, high = (factors[1], factors[1]) if rounding.sym else factors
    lo, hi = rounding.lo * (1 + low), rounding.hi * (1 + high)
    scale = _Through.apply((hi - lo) / levels, lambda x: x.half().double())
    zero = (-lo / scale).detach().round().clamp(0, levels)
    step = _Through.apply(rounding.base / scale + offset, torch.round)
    inside = torch.where(step < -zero, lo, torch.where(step > levels - zero, hi, step * scale))
    exact = step.detach().clamp(-zero, levels - zero) * scale.detach()
    return inside + (exact - inside).detach()


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients(name: str) -> None:
    rounding = moved(name)
    offset = rounding.offset.clone().requires_grad_()
    factors = rounding.range.clone().requires_grad_()
    value = surrogate(rounding, offset, factors)
    assert (value - rounding.value).abs().max() < 1e-12
    (value * rounding.gradient).sum().backward()
    found = rounding.gradients()
    assert offset.grad is not None and factors.grad is not None
    expected = factors.grad[1].expand_as(factors) if rounding.sym else factors.grad
    assert (found[0] - offset.grad).abs().max() < 1e-12
    assert (found[1] - expected).abs().max() < 1e-10
    assert found[1].abs().max() > 0.1


@pytest.mark.parametrize("name", ["w3g16", "w3g16-sym", "w8channel-sym"])
def test_steps(name: str) -> None:
    """Those of torch's Adam, within the bounds; then values that can be stored."""
    rounding, rates = moved(name), torch.tensor([0.03, 0.02], dtype=torch.float64)
    offset, factors = (value.clone().requires_grad_() for value in rounding.state())
    options = {"betas": (0.9, 0.99), "eps": 1e-12}
    adams = [
        torch.optim.Adam([value], lr=rate.item(), **options)  # type: ignore[arg-type]
        for value, rate in zip((offset, factors), rates, strict=True)
    ]
    for iteration in (1, 2, 3):
        gradients = rounding.gradients()
        for value, gradient, adam in zip((offset, factors), gradients, adams, strict=True):
            value.grad = gradient.clone()
            adam.step()
        offset.data.clamp_(-0.6, 0.6)
        rounding.step(*(rates * correction(iteration)), 0.6)
        assert (rounding.offset - offset).abs().max() < 1e-6
        assert (rounding.range - factors).abs().max() < 1e-6
        assert rounding.offset.abs().max() <= 0.6
    [qt] = rounding.codes()
    assert torch.equal(qt.dequantize(torch.float64), rounding.parts(rounding.value)[0])
    if rounding.sym:
        assert (qt.zeros == 2 ** (rounding.scheme.bits - 1)).all()


class _Mlp(nn.Module):
    """A tiny block of two kinds of linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64, bias=False)
        self.down = Conv1D(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


CPU = torch.device("cpu")


def lesson(
    seed: int = 0, parts: int = 6, device: torch.device = CPU, alike: bool = True
) -> tuple[_Mlp, dict[str, QTensor], Examples]:
    """A block, plain codes of two schemes, and what it is to return."""
    torch.manual_seed(seed)
    block = _Mlp().requires_grad_(False)
    inputs = torch.randn(parts, 2, 24, 32) @ torch.randn(32, 32)
    targets = torch.stack([block(x) for x in inputs])
    start = {
        "up": started(Scheme.parse("w3g16"), weight_of(block.up), seed).to(device),
        "down": started(Scheme.parse("w2channel"), weight_of(block.down), seed).to(device),
    }
    block, inputs, targets = block.to(device), inputs.to(device), targets.to(device)
    get, run = inputs.__getitem__, lambda _, x: block(x)
    return block, start, Examples(parts, get, targets.__getitem__, run, alike)


QUICK = Tuning(iterations=30, rounding_rate=0.02, range_rate=0.01, check_every=5)


def loss_of(block: nn.Module, weights: dict[str, QTensor], examples: Examples) -> float:
    """The loss held out, with these weights in the block."""
    floats = {name: weight_of(block.get_submodule(name)).clone() for name in weights}
    for name, qt in weights.items():
        weight_of(block.get_submodule(name)).copy_(qt.dequantize())
    last = examples.count - 1
    output, target = examples.run(last, examples.inputs(last)), examples.targets(last)
    errors = (output - target).double().square().sum(-1) / target.double().square().sum(-1)
    loss = errors.mean()
    for name, value in floats.items():
        weight_of(block.get_submodule(name)).copy_(value)
    return loss.item()


def test_it_learns() -> None:
    block, start, examples = lesson()
    before = [parameter.clone() for parameter in block.parameters()]
    checks: list[tuple[int, float]] = []
    learned = learn(block, start, examples, QUICK, lambda *each: checks.append(each))
    assert learned.loss < 0.8 * learned.loss_start and learned.iterations > 0
    assert learned.loss_start == pytest.approx(loss_of(block, start, examples), rel=1e-6)
    assert learned.loss == pytest.approx(loss_of(block, learned.weights, examples), rel=1e-6)
    assert [iteration for iteration, _ in checks] == list(range(5, 31, 5))
    least = min(ratio for _, ratio in checks)
    assert least == pytest.approx(learned.loss / learned.loss_start)
    # The block is left as it was, and every weight is of its scheme.
    assert all(map(torch.equal, before, block.parameters()))
    assert not any(p.requires_grad for p in block.parameters())
    for name, qt in learned.weights.items():
        assert qt.scheme == start[name].scheme and qt.q.shape == start[name].q.shape
        assert qt.q.max() <= qt.scheme.levels and qt.scales.dtype == torch.float16
    assert not same(learned.weights["up"], start["up"])


def test_tokens_count_alike() -> None:
    """However long they are, but for one that is as good as nothing."""
    target = torch.randn(2, 5, 8)
    target[0, 0] *= 1e3
    target[1, 1] = 0
    output = 1.1 * target
    assert relative_error(output, target).item() == pytest.approx(0.01 * 9 / 10)
    output[1, 1] += 1e-3
    assert relative_error(output, target) < 0.01


def test_it_is_deterministic() -> None:
    def again(seed: int) -> Learned:
        block, start, examples = lesson()
        return learn(block, start, examples, Tuning(iterations=8, check_every=8, seed=seed))

    first, second, other = again(0), again(0), again(1)
    assert all(same(first.weights[name], second.weights[name]) for name in first.weights)
    assert first.loss == second.loss != other.loss


def test_as_a_graph_or_one_by_one(device: torch.device) -> None:
    """On a GPU one replays what was captured, the other starts each kernel; the start is the same
    after the capture, which tries the step out.
    """
    found = []
    for alike in (True, False):
        block, start, examples = lesson(device=device, alike=alike)
        found.append(learn(block, start, examples, QUICK))
    assert found[0].loss_start == found[1].loss_start
    assert found[0].loss == pytest.approx(found[1].loss, rel=0.05)
    assert found[0].loss < 0.9 * found[0].loss_start


def test_a_step_that_waits_for_the_device(device: torch.device) -> None:
    """It cannot be captured, and is run as it is."""
    block, start, examples = lesson(device=device)

    def run(_part: int, x: Tensor) -> Tensor:
        return block(x) * (1.0 if x.sum().item() < 1e30 else 0.0)

    waits = Examples(examples.count, examples.inputs, examples.targets, run)
    plain = learn(block, start, Examples(examples.count, examples.inputs, examples.targets,
                                         examples.run, alike=False), QUICK)  # fmt: skip
    assert learn(block, start, waits, QUICK).loss == pytest.approx(plain.loss, rel=0.05)


def test_what_does_not_improve_keeps_its_start() -> None:
    """Steps so large that each is a leap elsewhere."""
    block, start, examples = lesson()
    for name, qt in start.items():
        start[name] = grid.quantize(weight_of(block.get_submodule(name)), qt.scheme)
    wild = Tuning(iterations=6, rounding_rate=10.0, range_rate=1.0, check_every=2, patience=2)
    learned = learn(block, start, examples, wild)
    assert learned.iterations == 0 and learned.loss == learned.loss_start
    assert all(learned.weights[name] is start[name] for name in start)


def test_it_stops_when_nothing_improves() -> None:
    block, start, examples = lesson()
    checks: list[int] = []
    wild = Tuning(iterations=100, rounding_rate=10.0, range_rate=1.0, check_every=2, patience=3)
    learn(block, start, examples, wild, lambda iteration, _: checks.append(iteration))
    assert checks == [2, 4, 6]


def test_losses_that_are_no_numbers_keep_the_start() -> None:
    block, start, examples = lesson()
    nan = Examples(
        examples.count, examples.inputs, lambda _: torch.full((2, 24, 32), torch.nan), examples.run
    )
    learned = learn(block, start, nan, QUICK)
    assert learned.iterations == 0 and all(learned.weights[n] is start[n] for n in start)


@pytest.mark.parametrize("count", [2, 3, 16, 40])
def test_what_is_held_out(count: int) -> None:
    trained, held = Tuning().split(count)
    assert [*trained, *held] == list(range(count)) and len(trained) and len(held)
    assert len(held) == max(1, round(count / 16))
