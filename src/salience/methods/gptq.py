"""GPTQ: let the weights that are not rounded yet make up for those that are (arXiv 2210.17323).

The output error of a row is e H e^T, e = q - w. Rounding one weight of it leaves an error that a
shift of the others can lower; the shift that does so best is known in closed form. With the columns
in a fixed order and U the upper Cholesky factor of H^-1 (H^-1 = U^T U), the recursion is

    for column j:   q_j = nearest grid point of w_j
                    w_k -= (w_j - q_j) / U_jj * U_jk     for all k > j

Act-order. Columns of large H_jj come first: their errors can be spread over most others, and what
is rounded last, with nothing left to make up for it, matters least. The grid of each group is found
before any column moves ("static groups"), so the groups stay contiguous in the checkpoint. The
variant with `g_idx` forms the groups in that order too (`in_order`); each then holds columns of
like importance, and the checkpoint must store the group of each column, as GPTQ's own format does.

Damping. A multiple of the mean of its diagonal is added to H's. It keeps the factor finite when
calibration has fewer tokens than columns, and it keeps the shifts from following what is chance in
the text: of 0.001, 0.01, 0.05, 0.15 and 0.4, perplexity was best at 0.05 to 0.15 and worst at the
ends. (SmolLM2, AWQ scales, w4g64: 19.55, 19.49, 19.40 without clipped ranges; w3g64 with them
24.14 at 0.01, 23.80 at 0.05, 23.60 at 0.15, 24.01 at 0.4.) Dead columns, whose input was always 0,
need no rule of their own: with nothing beside the damping in their row of H they are rounded to
nearest.

Descent. The recursion looks at each column once and never back. Afterwards each code in turn is
moved to the best place given all others, which can only lower e H e^T:

    q_j = nearest grid point of   q_j - (e H)_j / H_jj

Two sweeps are worth as much again as a finer choice of damping (w3g64: 23.60 becomes 23.45).

On a GPU most of the time goes into starting the few operations of each column, hence their number
is kept small, and the batch large where blocks are small.
"""

from dataclasses import replace

import torch
from torch import Tensor

from salience.grid import Grid
from salience.methods.base import Problem, nearest
from salience.qtensor import QTensor

DAMPING = 0.1
SWEEPS = 2
_COLUMNS = 128  # columns between two updates of all that follow
_WORSE_DAMPING = (1.0, 10.0, 100.0)  # tried in turn, times DAMPING, where H has no factor


def compensate(problem: Problem, grids: Grid) -> list[QTensor]:
    """Codes by the recursion and then the descent.

    Args:
        problem: the weights, with H.
        grids: of each group, [batch, out, groups].
    """
    if problem.second is None:
        return nearest(problem, grids)
    made = Grid(grids.scales, grids.zeros.float(), grids.levels)
    second = damped(problem.second, DAMPING)
    steps = _recursion(problem.weight, second, made)
    for _ in range(SWEEPS):
        steps = _descent(problem.weight, steps, second, made)
    grouped = steps.mT.unflatten(-1, (made.zeros.shape[-1], -1)) + made.zeros[..., None]
    codes, zeros = grouped.flatten(-2).to(torch.uint8), made.zeros.to(torch.uint8)
    return [
        QTensor(q, scales, zero, problem.scheme)
        for q, scales, zero in zip(codes, made.scales, zeros, strict=True)
    ]


def in_order(problem: Problem) -> tuple[Problem, Tensor]:
    """The problem with its columns from the largest H_jj to the smallest.

    Returns:
        The problem, and the column of the old one at each place of the new, int64 [batch, in].
    """
    if problem.second is None or problem.mean_abs is None:
        columns = torch.arange(problem.weight.shape[-1], device=problem.weight.device)
        return problem, columns.expand(len(problem.weight), -1)
    order = problem.second.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    weight = _rows(problem.weight.mT, order).mT
    second, mean_abs = _permuted(problem.second, order), problem.mean_abs.gather(-1, order)
    return replace(problem, weight=weight, second=second, mean_abs=mean_abs), order


def compensate_in_order(problem: Problem, grids: Grid) -> list[QTensor]:
    """`compensate` for those grids; the codes in the weight's own order, with `g_idx`."""
    ordered, order = in_order(problem)
    size = problem.scheme.group_columns(problem.weight.shape[-1])
    found = []
    for qt, place in zip(compensate(ordered, grids), order.argsort(-1), strict=True):
        g_idx = (place // size).int()
        found.append(QTensor(qt.q[:, place], qt.scales, qt.zeros, qt.scheme, g_idx))
    return found


def damped(second: Tensor, factor: float) -> Tensor:
    """H [batch, in, in] plus `factor` times the mean of its diagonal on the diagonal."""
    result = second.clone()
    diagonal = result.diagonal(dim1=-2, dim2=-1)
    # An input that is 0 for all tokens leaves nothing to scale the damping by.
    diagonal += factor * diagonal.mean(-1, keepdim=True).clamp(min=1e-10)
    return result


def _size(weight: Tensor, made: Grid) -> int:
    return weight.shape[-1] // made.zeros.shape[-1]


def _factor(second: Tensor) -> Tensor:
    """U [batch, in, in] with H^-1 = U^T U; more damping for those H that have no such factor."""
    lower, failed = torch.linalg.cholesky_ex(second)
    for factor in _WORSE_DAMPING:
        if not failed.any():
            break
        second = torch.where(failed[:, None, None] != 0, damped(second, factor), second)
        lower, failed = torch.linalg.cholesky_ex(second)
    inverse = torch.cholesky_inverse(lower)
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if failed.any():  # beyond fp32: as if the columns knew nothing of each other
        eye = torch.eye(len(upper[0]), device=upper.device)
        upper = torch.where(failed[:, None, None] != 0, eye, upper)
    return upper


# Both walks go over columns, so they work on transposes, [batch, in, out], of which a column is one
# piece of memory.


def _recursion(weight: Tensor, second: Tensor, made: Grid) -> Tensor:
    """Signed steps (code - zero), fp32 [batch, in, out], of a weight [batch, out, in]."""
    columns = weight.shape[-1]
    order = second.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    upper = _factor(_permuted(second, order))
    # With each row of U divided by its diagonal, a column's error needs no division.
    upper /= upper.diagonal(dim1=-2, dim2=-1)[..., None].clone()
    group = order // _size(weight, made)
    left = _rows(weight.mT, order)
    steps = torch.empty_like(left)
    all_scales, all_zeros = made.scales.mT, made.zeros.mT
    for start in range(0, columns, _COLUMNS):
        end = min(start + _COLUMNS, columns)
        near = upper[:, start:end, start:end, None]
        scales = _rows(all_scales, group[:, start:end]).float()
        zeros = _rows(all_zeros, group[:, start:end])
        least, most = -zeros, made.levels - zeros
        block, chosen = left[:, start:end], steps[:, start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            step, error = chosen[:, j], errors[:, j]
            torch.div(block[:, j], scales[:, j], out=step)
            torch.clamp(step.round_(), least[:, j], most[:, j], out=step)
            torch.addcmul(block[:, j], step, scales[:, j], value=-1, out=error)
            block[:, j + 1 :].addcmul_(near[:, j, j + 1 :], error[:, None], value=-1)
        left[:, end:].baddbmm_(upper[:, start:end, end:].mT, errors, alpha=-1)
    return _rows(steps, order.argsort(-1))


def _descent(weight: Tensor, steps: Tensor, second: Tensor, made: Grid) -> Tensor:
    """One sweep over the columns of `steps` [batch, in, out]; the steps that result."""
    columns, size = weight.shape[-1], _size(weight, made)
    scales, zeros = made.scales.mT.float().contiguous(), made.zeros.mT.contiguous()
    least, most = -zeros, made.levels - zeros
    values = (steps.unflatten(1, (-1, size)) * scales[:, :, None]).flatten(1, 2)
    product = second @ values.sub_(weight.mT)
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    moved = torch.empty_like(steps)
    for start in range(0, columns, _COLUMNS):
        end = min(start + _COLUMNS, columns)
        near = second[:, start:end, start:end, None]
        group = torch.arange(start, end, device=steps.device) // size
        curvature = scales[:, group] * diagonal[:, start:end, None]
        own = product[:, start:end].clone()
        moves = torch.empty_like(own)
        for j, of in enumerate(group.tolist()):
            old, new, move = steps[:, start + j], moved[:, start + j], moves[:, j]
            torch.addcdiv(old, own[:, j], curvature[:, j], value=-1, out=new)
            torch.clamp(new.round_(), least[:, of], most[:, of], out=new)
            torch.sub(new, old, out=move).mul_(scales[:, of])
            own[:, j + 1 :].addcmul_(near[:, j, j + 1 :], move[:, None])
        product[:, end:].baddbmm_(second[:, end:, start:end], moves)
    return moved


def _rows(matrix: Tensor, index: Tensor) -> Tensor:
    """matrix[b, index[b, i]] of [batch, n, m] for an index [batch, k]: [batch, k, m]."""
    return matrix.gather(1, index[..., None].expand(-1, -1, matrix.shape[-1]))


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of each matrix [batch, n, n] in a new order [batch, n]."""
    rows = matrix.gather(1, order[..., None].expand_as(matrix))
    return rows.gather(2, order[:, None].expand_as(matrix))
