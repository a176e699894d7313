"""A fold: a scale that one module divides by and others multiply with, applied and proved.

    W x = (W s)(x / s)

so a norm or the rows of a linear may be divided by s when all that reads them is multiplied. Which
modules these are is found in `structure`; here is what it means to fold a scale in, to take it
back, and to check that nothing changed.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from salience.modules import bias_of, has_experts, is_linear, weight_of

# True folds stay under 2e-6 in fp32, false ones are above 2e-2: the gap is four orders wide.
PROOF_TOLERANCE = 1e-4
_TIES = 0.01  # share of tokens for which a router may meet a tie


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """prev / s and sinks * s together change nothing.

    Args:
        prev: module of the block whose output channels are divided.
        sinks: linears of the block whose input channels are multiplied.
        rule: how prev is divided: "norm" (weight), "1+w norm" (1 + weight) or "rows" (of a linear).
        index: channel of prev that feeds each input channel, int64 [in].
        error: relative change of the block's output in the proof.
        others: what else reads those channels and is multiplied with the sinks though it stays
            float: names of parameters, each with the axis of its input channels.
    """

    prev: str
    sinks: tuple[str, ...]
    rule: str
    index: Tensor
    error: float
    others: tuple[tuple[str, int], ...] = ()

    @property
    def channels(self) -> int:
        """How many scales are free: input channels fed by one channel of prev share one."""
        return int(self.index.unique().numel())

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules whose parameters it changes."""
        owners = (name.rpartition(".")[0] for name, _ in self.others)
        return tuple(dict.fromkeys((self.prev, *self.sinks, *owners)))


def apply_fold(block: nn.Module, fold: Fold, scales: Tensor) -> None:
    """Divide prev and multiply the sinks and others by `scales` [in], in place."""
    prev = block.get_submodule(fold.prev)
    divisor = scales.new_ones(channels_of(prev))
    divisor[fold.index.to(scales.device)] = scales
    with torch.no_grad():
        divide(prev, fold.rule, divisor)
        for name in fold.sinks:
            weight_of(block.get_submodule(name)).mul_(scales)
        for name, axis in fold.others:
            multiply(block.get_parameter(name), axis, scales)


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
def restored(block: nn.Module, names: Iterable[str]) -> Iterator[None]:
    saved = snapshot(block, names)
    try:
        yield
    finally:
        restore(saved)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference| in the Frobenius norm; infinite when not finite."""
    error = ((value - reference).norm() / reference.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def unchanged(block: nn.Module, value: Tensor, reference: Tensor) -> bool:
    """Whether outputs [..., hidden] of a block are the same, to the tolerance of the proof.

    Where there is a router, a token in a hundred may differ: one that meets a tie between two
    experts, which rounding decides. A wrong fold changes nearly all tokens.
    """
    if relative_error(value, reference) <= PROOF_TOLERANCE:
        return True
    if not has_experts(block) or not torch.isfinite(value).all():
        return False
    away = (value - reference).flatten(0, -2).norm(dim=-1)
    length = reference.flatten(0, -2).norm(dim=-1).clamp(min=1e-30)
    changed = (away / length > PROOF_TOLERANCE).sum().item()
    return changed <= _TIES * len(away)


def divide(module: nn.Module, rule: str, divisor: Tensor) -> None:
    if rule == "rows":
        weight_of(module).div_(divisor[:, None])
    else:
        weight = module.get_parameter("weight")
        weight.copy_((1 + weight) / divisor - 1 if rule == "1+w norm" else weight / divisor)
    bias = bias_of(module)
    if bias is not None:
        bias.div_(divisor)


def multiply(parameter: Tensor, axis: int, scales: Tensor) -> None:
    shape = [1] * parameter.ndim
    shape[axis] = -1
    parameter.mul_(scales.to(parameter.dtype).view(shape))


def channels_of(module: nn.Module) -> int:
    """Output channels of a linear or of a module with a weight for each channel; 0 of others."""
    if is_linear(module):
        return int(weight_of(module).shape[0])
    weight = module._parameters.get("weight")
    return len(weight) if weight is not None and weight.ndim == 1 else 0
