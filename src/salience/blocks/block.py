"""Blocks of one kind, side by side: scales folded in and proved, then every linear coded.

What comes out is never worse than plain rounding: scales are kept only if the block's output on
real activations does not change, and codes only if the output error is no larger than that of
rounding the float weight.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from salience import grid
from salience.errors import SalienceError
from salience.grid import Grid
from salience.machine import fast_matmul
from salience.methods import FoldScale, Method, Problem, full_grids
from salience.methods.learner import Learned
from salience.qtensor import QTensor
from salience.reports.report import LinearReport
from salience.scheme import Scheme
from salience.stats import SecondMoment, output_error
from salience.structure import (
    Fold,
    Run,
    apply_fold,
    restore,
    snapshot,
    unchanged,
    weight_of,
)


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """What is known of all blocks of one kind.

    Args:
        groups: linears that share an input.
        folds: scales that the block allows.
    """

    groups: list[tuple[str, ...]]
    folds: list[Fold]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedBlock:
    """A block with its weights in fp32.

    Args:
        name: its full name.
        module: the block; it is left folded.
        structure: of its kind, the same object for all blocks of it.
        moments: of the input of each group, by the group's first linear; those that are missing
            are of unit covariance.
        run: runs the block on inputs that folds are proved on; None where there are no folds.
    """

    name: str
    module: nn.Module
    structure: Structure
    moments: dict[str, SecondMoment]
    run: Run | None = None

    def full(self, name: str) -> str:
        """The full name of a module of it."""
        return f"{self.name}.{name}" if self.name else name


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A quantized linear: its codes, the grid to find them again from, and what was done."""

    qtensor: QTensor
    grid: Grid
    report: LinearReport


@dataclass(frozen=True, slots=True, eq=False)
class SolvedBlock:
    """A quantized block: its linears by their names in it, and the scales folded in.

    `learned` is how its codes came to differ from the method's, if they did.
    """

    linears: dict[str, Coded]
    scales: list[FoldScale]
    learned: Learned | None = None


# The scheme of a linear by its full name, None if it stays float.
Schemes = Callable[[str], Scheme | None]


def solve(
    blocks: Sequence[LoadedBlock], method: Method, schemes: Schemes, trust: bool = False
) -> list[SolvedBlock]:
    """Quantize blocks; those of one structure and scheme are solved as one batch.

    Args:
        blocks: with their weights.
        method: how to search.
        schemes: how to code.
        trust: keep what the method returns even where plain rounding would be better, for grids
            that were found with moments that are not at hand now.

    Raises:
        SalienceError: a weight that cannot be coded; scales to trust that change the function.
    """
    kinds: dict[object, list[int]] = {}
    for i, block in enumerate(blocks):
        names = [name for group in block.structure.groups for name in group]
        key = (id(block.structure), tuple(schemes(block.full(name)) for name in names))
        kinds.setdefault(key, []).append(i)
    solved: dict[int, SolvedBlock] = {}
    for indices in kinds.values():
        same = [blocks[i] for i in indices]
        solved.update(zip(indices, _solve_kind(same, method, schemes, trust), strict=True))
    return [solved[i] for i in range(len(blocks))]


def _solve_kind(
    blocks: list[LoadedBlock], method: Method, schemes: Schemes, trust: bool
) -> list[SolvedBlock]:
    groups, folds = blocks[0].structure.groups, blocks[0].structure.folds
    plain: dict[str, _Plain] = {}
    found: list[list[FoldScale]] = [[] for _ in blocks]
    nothing: list[list[FoldScale]] = [[] for _ in blocks]
    for group in groups:
        for problem in _problems(blocks, group, schemes, nothing):
            plain |= _plain(problem)
    for fold in folds:
        # More than one group where one source feeds several modules.
        fed = [group for group in groups if set(group) <= set(fold.sinks)]
        problems = [p for group in fed for p in _problems(blocks, group, schemes, nothing)]
        if problems:
            with fast_matmul():
                scales = method.scales(problems, fold)
            for choices, choice in zip(found, scales, strict=True):
                choices += [choice] if choice is not None else []
    kept = [_fold(block, choices, trust) for block, choices in zip(blocks, found, strict=True)]
    scales_of = _by_name(blocks, kept)
    coded: dict[str, Coded] = {}
    for group in groups:
        for problem in _problems(blocks, group, schemes, kept):
            coded |= _code(problem, method, plain, scales_of, trust)
    return [
        SolvedBlock(
            {
                name: coded[block.full(name)]
                for group in groups
                for name in group
                if block.full(name) in coded
            },
            scales,
        )
        for block, scales in zip(blocks, kept, strict=True)
    ]


def _problems(
    blocks: list[LoadedBlock],
    group: tuple[str, ...],
    schemes: Schemes,
    kept: list[list[FoldScale]],
) -> list[Problem]:
    """The linears of a group in all blocks, a problem for each scheme; moments of scaled inputs."""
    of_scheme: dict[Scheme, list[str]] = {}
    for name in group:
        scheme = schemes(blocks[0].full(name))
        if scheme is not None:
            of_scheme.setdefault(scheme, []).append(name)
    if not of_scheme:
        return []
    second = mean_abs = None
    if group[0] in blocks[0].moments:
        moments = [block.moments[group[0]] for block in blocks]
        second, mean_abs = _stack(m.second for m in moments), _stack(m.mean_abs for m in moments)
        for i, choices in enumerate(kept):
            own = next((c for c in choices if group[0] in c.fold.sinks), None)
            if own is not None:
                second[i] /= own.scales[:, None]
                second[i] /= own.scales
                mean_abs[i] /= own.scales
    problems = []
    for scheme, names in of_scheme.items():
        weights = [[weight_of(b.module.get_submodule(name)) for name in names] for b in blocks]
        problems.append(
            Problem(
                tuple(tuple(block.full(name) for name in names) for block in blocks),
                _stack(torch.cat(rows) for rows in weights),
                tuple(len(weight) for weight in weights[0]),
                scheme,
                second,
                mean_abs,
            )
        )
    return problems


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    """torch.stack that does not copy a single fresh tensor."""
    items = list(tensors)
    return items[0][None] if len(items) == 1 else torch.stack(items)


def _fold(block: LoadedBlock, choices: list[FoldScale], trust: bool) -> list[FoldScale]:
    if not choices:
        return []
    if block.run is None:
        raise SalienceError(f"scales for {block.name}, whose folds cannot be proved")
    kept = fold_scales(block.module, choices, block.run)
    if trust and len(kept) < len(choices):
        raise SalienceError(f"scales for {block.name} change what it computes")
    return kept


def unfolded(block: LoadedBlock) -> list[tuple[nn.Parameter, Tensor]]:
    """Copies of what folding scales into a block would change, for `restore`."""
    names = {name for fold in block.structure.folds for name in fold.modules}
    return snapshot(block.module, sorted(names))


def fold_scales(block: nn.Module, found: list[FoldScale], run: Run) -> list[FoldScale]:
    """Fold scales into a block, keeping those under which its output does not change."""
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


@dataclass(frozen=True, slots=True)
class _Plain:
    """Of one linear: the energy of its output, and the error of rounding it to nearest."""

    energy: float
    error: float


def _plain(problem: Problem) -> dict[str, _Plain]:
    energy = output_error(problem.weight, problem.second)
    error = output_error(_rounded(problem).sub_(problem.weight), problem.second)
    sums = torch.stack([_by_linear(problem, energy), _by_linear(problem, error)], -1).tolist()
    return {
        name: _Plain(*values)
        for names, block in zip(problem.names, sums, strict=True)
        for name, values in zip(names, block, strict=True)
    }


def _rounded(problem: Problem) -> Tensor:
    """Plain rounding, as values [batch, out, in]."""
    weight, scheme = problem.weight, problem.scheme
    made = full_grids(problem)
    if not torch.isfinite(made.scales).all():
        wide = (~torch.isfinite(made.scales)).any(-1).float()
        rows = _by_linear(problem, wide).tolist()
        name = next(
            n
            for i, names in enumerate(problem.names)
            for n, bad in zip(names, rows[i], strict=True)
            if bad
        )
        kind = "fp16" if scheme.codebook is None else "fp32"
        raise SalienceError(f"{name}: a group's range is too wide for an {kind} scale")
    if scheme.double_quant:  # its scales are rounded, too
        return _stack(grid.quantize(each, scheme).dequantize() for each in weight)
    return grid.snap(grid.grouped(weight, scheme), made).flatten(-2)


def _by_linear(problem: Problem, rows: Tensor) -> Tensor:
    """Sums over the rows of each linear: [batch, out] to [batch, n]."""
    return torch.stack([part.sum(-1) for part in rows.split(problem.rows, -1)], -1)


def _by_name(
    blocks: list[LoadedBlock], kept: list[list[FoldScale]]
) -> dict[str, tuple[FoldScale | None, FoldScale | None]]:
    """For each linear, the scale of its input and that of its output."""
    return {
        block.full(name): _around(name, choices)
        for block, choices in zip(blocks, kept, strict=True)
        for group in block.structure.groups
        for name in group
    }


def _around(name: str, choices: list[FoldScale]) -> tuple[FoldScale | None, FoldScale | None]:
    into = next((c for c in choices if name in c.fold.sinks), None)
    return into, next((c for c in choices if name == c.fold.prev), None)


def _code(
    problem: Problem,
    method: Method,
    plain: dict[str, _Plain],
    scales: dict[str, tuple[FoldScale | None, FoldScale | None]],
    trust: bool,
) -> dict[str, Coded]:
    with fast_matmul():  # the codes, and the comparison with plain rounding, are exact
        grids = method.grids(problem)
    qtensors = method.codes(problem, grids)
    divisors = _row_divisors(problem, scales)
    errors = _errors(problem, qtensors, divisors).tolist()
    full = full_grids(problem).scales.float().clamp(min=1e-30)
    narrowing = grids.scales.float().clamp(min=1e-30) / full
    clips = _by_linear(problem, narrowing.mean(-1)).tolist()
    coded = {}
    for i, names in enumerate(problem.names):
        start = 0
        losing = {
            name for name, e in zip(names, errors[i], strict=True) if not e <= plain[name].error
        }
        if losing and qtensors[i].g_idx is not None:
            losing = set(names)  # runtimes fuse linears of one input, and give them one g_idx
        for j, (name, count) in enumerate(zip(names, problem.rows, strict=True)):
            rows = slice(start, start + count)
            start += count
            qt = _take_rows(qtensors[i], rows)
            own = grids._replace(scales=grids.scales[i, rows], zeros=grids.zeros[i, rows])
            error, clip = errors[i][j], clips[i][j] / count
            worse = name in losing and not trust
            if worse:
                weight = problem.weight[i, rows]
                qt, clip = grid.quantize(weight, problem.scheme), 1.0
                second = None if problem.second is None else problem.second[i]
                rounding = output_error(qt.dequantize() - weight, second)
                error = (rounding * divisors[i, rows].square()).sum().item()
            energy = max(plain[name].energy, 1e-30)
            into = scales[name][0]
            report = LinearReport(
                name=name,
                in_features=problem.weight.shape[-1],
                out_features=count,
                scheme=str(problem.scheme),
                alpha=into.alpha if into else 0.0,
                beta=into.beta if into else 0.0,
                clip=clip,
                error_rtn=plain[name].error / energy,
                error=error / energy,
                kept_rtn=worse,
            )
            # Codes that need moments are compared with plain rounding whenever they are made.
            if worse and not method.reads_moments_to_code:
                own = own._replace(scales=qt.scales, zeros=qt.zeros)
            coded[name] = Coded(qt, own, report)
    return coded


def _row_divisors(
    problem: Problem, scales: dict[str, tuple[FoldScale | None, FoldScale | None]]
) -> Tensor:
    """What each row was divided by, as the source of another linear's scale: [batch, out]."""
    divisors = torch.ones_like(problem.weight[..., 0])
    for i, names in enumerate(problem.names):
        start = 0
        for name, count in zip(names, problem.rows, strict=True):
            out = scales[name][1]
            if out is not None:
                divisors[i, start + out.fold.index.to(divisors.device)] = out.scales
            start += count
    return divisors


def _errors(problem: Problem, qtensors: list[QTensor], divisors: Tensor) -> Tensor:
    """Output error of each linear, its rows as they were before they were divided: [batch, n]."""
    difference = _stack(qt.dequantize() for qt in qtensors).sub_(problem.weight)
    return _by_linear(problem, output_error(difference, problem.second).mul_(divisors.square()))


def _take_rows(qt: QTensor, rows: slice) -> QTensor:
    if rows == slice(0, qt.out_features):
        return qt
    return QTensor(qt.q[rows], qt.scales[rows], qt.zeros[rows], qt.scheme, qt.g_idx)


def with_learned(block: LoadedBlock, solved: SolvedBlock, learned: Learned) -> SolvedBlock:
    """A solved block with other codes for its linears, their errors measured anew.

    Args:
        block: with its float weights, folded.
        solved: what was learned from.
        learned: of the same linears.
    """
    linears = {}
    for name, coded in solved.linears.items():
        qt = learned.weights[name]
        if qt is coded.qtensor:
            linears[name] = coded
            continue
        second = _second(block, name)
        before = row_errors(block, solved, name, second).sum().item()
        after = row_errors(block, solved, name, second, qt).sum().item()
        own = coded.report
        error = own.error * after / before if before else own.error
        linears[name] = replace(coded, qtensor=qt, report=replace(own, error=error, kept_rtn=False))
    return SolvedBlock(linears, solved.scales, learned)


def row_errors(
    block: LoadedBlock,
    solved: SolvedBlock,
    name: str,
    second: Tensor | None,
    qtensor: QTensor | None = None,
) -> Tensor:
    """The output error of each row of a linear, [out], as it was before scales were folded in.

    Args:
        block: with its float weights, folded.
        solved: of it.
        name: of a linear, in the block.
        second: H of its input [in, in], also as it was; None for unit covariance.
        qtensor: other codes for it than those it was solved with.
    """
    into, out = _around(name, solved.scales)
    weight = weight_of(block.module.get_submodule(name))
    if second is not None and into is not None:
        second = second / into.scales[:, None] / into.scales
    coded = solved.linears[name].qtensor if qtensor is None else qtensor
    difference = coded.dequantize() - weight
    errors = output_error(difference, second)
    if out is not None:
        errors[out.fold.index.to(errors.device)] *= out.scales.square()
    return errors


def _second(block: LoadedBlock, name: str) -> Tensor | None:
    """H of what a linear gets before scales are folded in."""
    group = next(group for group in block.structure.groups if name in group)
    return block.moments[group[0]].second if group[0] in block.moments else None
