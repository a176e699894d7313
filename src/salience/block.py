"""One block: scales folded in and proved, then every linear coded.

What comes out is never worse than plain rounding: scales are kept only if the block's output on
real activations does not change, and codes only if the output error is no larger than that of
rounding the float weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from salience import grid
from salience.errors import SalienceError
from salience.methods import FoldScale, Method
from salience.qtensor import QTensor
from salience.report import LinearReport
from salience.scheme import Scheme
from salience.stats import SecondMoment, output_error
from salience.structure import (
    Fold,
    Run,
    apply_fold,
    linears,
    restore,
    snapshot,
    unchanged,
    weight_of,
)


@dataclass(frozen=True, slots=True)
class _Plain:
    """Of one linear: the energy of its output, and the error of rounding it to nearest."""

    energy: float
    error: float


def quantize_block(
    block: nn.Module,
    prefix: str,
    method: Method,
    scheme: Scheme,
    folds: Sequence[Fold],
    moments: dict[str, SecondMoment],
    run: Run,
) -> dict[str, tuple[QTensor, LinearReport]]:
    """Code the linears of a block with fp32 weights; the block itself is left folded.

    Args:
        block: the decoder block.
        prefix: its name in the model.
        method: how to search.
        scheme: how to code.
        folds: the folds it allows.
        moments: of the input of each linear.
        run: runs the block on real inputs.

    Returns:
        For each linear by its name in the block, the codes and what was done.

    Raises:
        SalienceError: a weight that cannot be coded.
    """
    plain = {name: _plain(block, name, prefix, moments[name], scheme) for name in linears(block)}
    weights = {name: weight_of(linear) for name, linear in linears(block).items()}
    chosen = fold_scales(block, method.prepare(weights, folds, moments, scheme), run)
    return {
        name: _code(block, name, prefix, method, scheme, moments[name], chosen, plain[name])
        for name in linears(block)
    }


def unit_moments(block: nn.Module, device: torch.device) -> dict[str, SecondMoment]:
    """Moments of inputs of unit covariance, for a method that looks at no text."""
    return {
        name: SecondMoment(
            torch.eye(weight_of(linear).shape[1], device=device),
            torch.ones(weight_of(linear).shape[1], device=device),
            1,
        )
        for name, linear in linears(block).items()
    }


def fold_scales(block: nn.Module, found: list[FoldScale], run: Run) -> list[FoldScale]:
    """Fold scales into a block, keeping those under which its output does not change."""
    if not found:
        return []
    reference = run()
    saved = snapshot(block, _touched(found))
    for choice in found:
        apply_fold(block, choice.fold, choice.scales)
    if unchanged(block, run(), reference):
        return found
    # One of them is to blame: try each alone.
    restore(saved)
    kept = []
    for choice in found:
        saved = snapshot(block, _touched([choice]))
        apply_fold(block, choice.fold, choice.scales)
        if unchanged(block, run(), reference):
            kept.append(choice)
        else:
            restore(saved)
    return kept


def _touched(choices: list[FoldScale]) -> list[str]:
    return sorted({name for c in choices for name in c.fold.modules})


def _plain(
    block: nn.Module, name: str, prefix: str, moment: SecondMoment, scheme: Scheme
) -> _Plain:
    weight, second = weight_of(block.get_submodule(name)), moment.second
    try:
        difference = grid.quantize(weight, scheme).dequantize() - weight
    except SalienceError as error:
        raise SalienceError(f"{prefix}.{name}: {error}") from None
    return _Plain(
        output_error(weight, second).sum().item(), output_error(difference, second).sum().item()
    )


def _code(
    block: nn.Module,
    name: str,
    prefix: str,
    method: Method,
    scheme: Scheme,
    moment: SecondMoment,
    chosen: list[FoldScale],
    plain: _Plain,
) -> tuple[QTensor, LinearReport]:
    weight = weight_of(block.get_submodule(name))
    own = next((choice for choice in chosen if name in choice.fold.sinks), None)
    if own is not None:
        moment = moment.scaled(own.scales)
    rows = _row_divisor(weight, name, chosen)
    rounded = grid.quantize(weight, scheme)
    qt = method.quantize(weight, moment, scheme)
    error = _error(qt, weight, moment, rows)
    kept_rtn = not error <= plain.error
    if kept_rtn:
        qt, error = rounded, _error(rounded, weight, moment, rows)
    energy = max(plain.energy, 1e-30)
    return qt, LinearReport(
        name=f"{prefix}.{name}",
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        scheme=str(scheme),
        alpha=own.alpha if own else 0.0,
        beta=own.beta if own else 0.0,
        clip=(qt.scales.float() / rounded.scales.float()).mean().item(),
        error_rtn=plain.error / energy,
        error=error / energy,
        kept_rtn=kept_rtn,
    )


def _row_divisor(weight: Tensor, name: str, chosen: list[FoldScale]) -> Tensor:
    """What each row of a weight was divided by, as the source of another linear's scale: [out]."""
    divisor = torch.ones(weight.shape[0], device=weight.device)
    for choice in chosen:
        if choice.fold.prev == name:
            divisor[choice.fold.index.to(divisor.device)] = choice.scales
    return divisor


def _error(qt: QTensor, weight: Tensor, moment: SecondMoment, rows: Tensor) -> float:
    """Output error of the rows as they were before they were divided."""
    errors = output_error(qt.dequantize() - weight, moment.second)
    return (errors * rows.square()).sum().item()
