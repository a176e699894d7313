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

import torch
from torch import Tensor, nn

from salience.folds import (
    PROOF_TOLERANCE,
    Fold,
    apply_fold,
    multiply,
    relative_error,
    restore,
    restored,
    snapshot,
    unchanged,
)
from salience.groups import Run, calls_of, sink_groups
from salience.modules import (
    codable,
    find_blocks,
    kept,
    linears,
    weight_of,
)
from salience.probes import Probe, same

__all__ = [
    "PROOF_TOLERANCE",
    "Fold",
    "Run",
    "apply_fold",
    "codable",
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
    probe = Probe(block, run, seed)
    followed = probe.gradients([sinks[0] for sinks in groups])
    folds: list[Fold] = []
    reasons: dict[str, str] = {}
    for sinks in groups:
        if any(sinks[0] in fold.sinks for fold in folds):
            continue
        why = "no norm or linear of the block feeds it"
        for prev, away in followed[sinks[0]]:
            fold = _fold(probe, prev, away, sinks)
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


def _fold(probe: Probe, prev: str, away: Tensor, sinks: tuple[str, ...]) -> Fold | str:
    """The proved fold, or the reason why there is none."""
    if not (away <= _GRADIENT_TOLERANCES[-1]).any():
        return f"what lies between it and {prev} is not linear"
    # Rounding may hide a row, and a gate that is nearly linear may look like one.
    masks = (away <= tolerance for tolerance in _GRADIENT_TOLERANCES)
    found = (probe.index(prev, rows, sinks[0]) for rows in masks if rows.any())
    index = next((index for index in found if index is not None), None)
    if index is None:
        return f"it does not follow the channels of {prev} one by one, in proportion"
    rule = probe.rule(prev)
    if rule is None:
        return f"{prev} is no norm that can be divided"
    fold = _with_consumers(probe, Fold(prev, sinks, rule, index, 0.0))
    if isinstance(fold, str):
        return fold
    with restored(probe.block, fold.modules):
        apply_fold(probe.block, fold, _scales(probe, fold))
        error = relative_error(probe.run(), probe.output)
    if error <= PROOF_TOLERANCE:
        return replace(fold, error=error)
    return f"{prev} feeds something else, too"


def _with_consumers(probe: Probe, fold: Fold) -> Fold | str:
    """The fold with all that reads the divided channels, or the reason why there is none."""
    found = linears(probe.block)
    scales = _scales(probe, fold)
    while True:
        with restored(probe.block, fold.modules):
            apply_fold(probe.block, fold, scales)
            moved = {call.name: call for call in reversed(calls_of(probe.block, probe.run))}
        done = set(fold.modules)
        sinks, others = list(fold.sinks), list(fold.others)
        for name, call in probe.first.items():
            if name in done or name not in moved or not _moved_by(call.x, moved[name].x, scales):
                continue
            if name in found:
                sinks.append(name)
                continue
            parameters = _scaled_parameters(probe, name, scales)
            if parameters is None:
                return f"{fold.prev} feeds {name}, too, whose inputs cannot be scaled"
            others += parameters
            done |= {parameter.rpartition(".")[0] for parameter, _ in parameters}
        if (len(sinks), len(others)) == (len(fold.sinks), len(fold.others)):
            return fold
        # A router that is scaled along sends tokens where it did before: look again.
        fold = replace(fold, sinks=tuple(sinks), others=tuple(others))


def _scaled_parameters(probe: Probe, name: str, scales: Tensor) -> list[tuple[str, int]] | None:
    """The parameters of a module, with their axes, that undo a division of its input."""
    module, call = probe.block.get_submodule(name), probe.first[name]
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
            # Powers of two are undone exactly; a copy of all experts would be as large as they are.
            with torch.no_grad():
                for local, axis in some:
                    multiply(own[local], axis, scales)
                alike = same(call.again(module, divided), call.out)
                for local, axis in some:
                    multiply(own[local], axis, 1 / scales)
            if alike:
                return _for_all_experts(probe, name, list(some))
    # Without one: a module that holds others may have parameters that do not meet its input.
    return [] if next(module.children(), None) is not None else None


def _for_all_experts(
    probe: Probe, name: str, entries: list[tuple[str, int]]
) -> list[tuple[str, int]]:
    """What holds for one of a list of experts holds for those no token was sent to."""
    for items in probe.experts.values():
        for item in items:
            if name == item or name.startswith(f"{item}."):
                rest = name[len(item) :]
                return [(f"{o}{rest}.{local}", axis) for o in items for local, axis in entries]
    return [(f"{name}.{local}", axis) for local, axis in entries]


def _scales(probe: Probe, fold: Fold) -> Tensor:
    powers = probe.powers(int(fold.index.max()) + 1)
    return powers[fold.index].to(probe.output.device)


def _moved_by(x: Tensor, moved: Tensor, scales: Tensor) -> bool:
    """Whether `moved` is x / scales, and not x."""
    if x.shape != moved.shape or x.shape[-1] != len(scales) or not x.is_floating_point():
        return False
    if not x.numel() or relative_error(moved, x) <= PROOF_TOLERANCE:
        return False
    return relative_error(moved * scales, x) <= PROOF_TOLERANCE
