"""AWQ: protect the weights that meet large activations (Lin et al., arXiv 2306.00978).

Scale. Multiplying input channel i of a weight by s_i, and dividing what feeds it by s_i, changes
nothing in float. In low bits it matters: a channel that is scaled up is rounded relatively finer,
at the cost of a wider grid for its neighbours. Which channels deserve it shows in the activations,
a_i = E[|x_i|]; how much room there is shows in the weights, w_i = mean over rows of |W| relative
to the largest weight of its group. The search tries

    s = a^alpha / w^beta,   normalized so that max(s) min(s) = 1

over a grid that contains s = 1, from mild to strong, and keeps the one of the smallest output error
(see `stats`), but a stronger scale must lower it by 6 %. The least error alone picks scales twice
as strong, which after clipping have the same error and generalize worse: perplexity 20.16 and 26.6
at 4 and 3 bits, against 19.79 and 25.97 (SmolLM2, WikiText-2). A scale that would leave any one of
its linears worse than plain rounding is not considered. Candidates are compared on at most a
thousand rows of each linear; the one that is chosen is checked on all.

Clip. For each output row and group the range [lo, hi] of the grid is narrowed where that lowers the
output error: an outlier loses, its neighbours gain. With e the row's rounding error and H the
second moment, the row's output error is e H e^T. The peers choose each group's range by its own
block of H, as if the other groups were exact. Here the groups are visited one after the other and
each range is chosen for the whole e H e^T given the errors of all the others:

    cost(e_g) = e_g H_gg e_g^T + 2 e_g (sum over k != g of e_k H_kg)^T

so that the errors of correlated channels cancel (coordinate descent; it starts at plain rounding
and never goes up). The products with H are shared by all candidates of a group, so it costs no
more than the independent search. Perplexity at 4 bits with independent ranges was 21.05, with these
20.06 (before the 6 % rule; float 18.46, plain rounding 23.09).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from salience import grid
from salience.grid import Grid
from salience.methods.base import FoldScale, Problem, full_grids
from salience.scheme import Scheme
from salience.stats import output_error
from salience.structure import Fold

# (alpha, beta) of s = a^alpha / w^beta, from mild to strong. The first is the identity.
EXPONENTS = ((0.0, 0.0), *((i / 10, beta) for i in range(1, 7) for beta in (0.0, i / 10)))
STRONGER_MUST_GAIN = 0.06
SCALE_ROWS = 1024  # of each linear that candidates are tried on
CLIP_RATIOS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
# Weights in work at a time: what bounds the temporaries. Fixed, and not a matter of how much memory
# is free, because a product may differ in its last bit with the number of its rows.
_TILE_WEIGHTS = {"cpu": 2**22, "cuda": 2**27}
TILE_CANDIDATES = {"cpu": 2**20, "cuda": 2**26}  # weights times clip ratios


def search_scales(problems: Sequence[Problem], fold: Fold) -> list[FoldScale | None]:
    """The best scale of a common input, for each block; None where that is 1.

    Args:
        problems: the sinks of the fold, those of one scheme in one problem.
        fold: which input channels must share a scale.
    """
    first = problems[0]
    if first.mean_abs is None:
        return [None] * len(first.names)
    activation = _tie(first.mean_abs, fold.index).clamp(min=1e-8)
    room = _tie(_relative_magnitude(problems), fold.index).clamp(min=1e-4)
    scales = torch.ones_like(activation)
    some = [_sample(problem) for problem in problems]
    counts = [(p.rows, s.rows) for p, s in zip(problems, some, strict=True)]
    weights = torch.tensor([a / b for all_, few in counts for a, b in zip(all_, few, strict=True)])
    weights = weights.to(scales.device)
    plain = _scaled_errors(some, scales) * weights
    best = plain.sum(-1)
    chosen = torch.zeros(len(best), dtype=torch.int64, device=best.device)
    for index, (alpha, beta) in enumerate(EXPONENTS[1:], start=1):
        tried = activation**alpha / room**beta
        tried = tried / (tried.amax(-1, keepdim=True) * tried.amin(-1, keepdim=True)).sqrt()
        errors = _scaled_errors(some, tried) * weights
        total = errors.sum(-1)
        better = (errors <= plain).all(-1) & (total < best * (1 - STRONGER_MUST_GAIN))
        better &= torch.isfinite(tried).all(-1)
        best = torch.where(better, total, best)
        scales = torch.where(better[:, None], tried, scales)
        chosen[better] = index
    # What a part of the rows promised must hold for all of them.
    worse = _scaled_errors(problems, scales) > _scaled_errors(problems, torch.ones_like(scales))
    chosen[worse.any(-1)] = 0
    return [
        FoldScale(fold, scales[i], *EXPONENTS[index]) if index else None
        for i, index in enumerate(chosen.tolist())
    ]


def _sample(problem: Problem) -> Problem:
    """The problem with at most `SCALE_ROWS` rows of each linear, evenly spaced.

    The error is a sum over thousands of rows, of which a part ranks candidates as well.
    """
    parts = []
    for part in problem.weight.split(problem.rows, dim=1):
        count = part.shape[1]
        step = (
            torch.arange(min(SCALE_ROWS, count), device=part.device)
            * count
            // min(SCALE_ROWS, count)
        )
        parts.append(part if count <= SCALE_ROWS else part[:, step])
    rows = tuple(part.shape[1] for part in parts)
    return replace(problem, weight=torch.cat(parts, 1), rows=rows)


def search_grids(problem: Problem) -> Grid:
    """The grid of each group that lowers the output error most: [batch, out, groups]."""
    weight, scheme, second = problem.weight, problem.scheme, problem.second
    if second is None:
        return full_grids(problem)
    size = scheme.group_columns(weight.shape[-1])
    held = len(CLIP_RATIOS) * size * len(weight)
    rows = max(1, TILE_CANDIDATES[weight.device.type] // held)
    parts = [_clip_rows(part, second, scheme) for part in weight.split(rows, dim=1)]
    lo, hi = (torch.cat([part[end] for part in parts], 1) for end in (0, 1))
    return grid.make_grid(lo, hi, scheme)


def _clip_rows(weight: Tensor, second: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The range of each group of some rows, lo and hi [batch, rows, groups]."""
    lo, hi = grid.value_range(weight, scheme)
    error = _round(weight, scheme).sub_(weight)
    product = error @ second  # kept equal to error @ second as the error changes
    ratios = torch.tensor((1.0, *CLIP_RATIOS), device=weight.device)[:, None]
    one = torch.ones_like(ratios)
    # Both ends together, then each alone; a symmetric grid has only the first.
    moves = [(ratios, ratios)] if scheme.sym else [(ratios, ratios), (ratios, one), (one, ratios)]
    for group, columns in enumerate(_columns(weight, scheme)):
        own = second[:, columns, columns]
        part, old = weight[..., columns], error[..., columns]
        others = 2 * (product[..., columns] - old @ own)
        low, high, new = lo[..., group], hi[..., group], old
        for shrink_low, shrink_high in moves:
            # A move of one end restarts from the group's own range at that end.
            lows = (lo[..., group] if shrink_low is ratios else low)[:, None] * shrink_low
            highs = (hi[..., group] if shrink_high is ratios else high)[:, None] * shrink_high
            tried = grid.make_grid(lows[..., None], highs[..., None], scheme)
            errors = grid.snap(part[:, None, :, None], tried)[..., 0, :].sub_(part[:, None])
            cost = _cost(errors, own, others)
            best = cost.argmin(1, keepdim=True)  # [batch, 1, rows]
            least = cost.gather(1, best)
            better = (least < _cost(new[:, None], own, others))[:, 0]
            low = torch.where(better, lows.gather(1, best)[:, 0], low)
            high = torch.where(better, highs.gather(1, best)[:, 0], high)
            new = torch.where(better[..., None], _take(errors, best), new)
        product += (new - old) @ second[:, columns]
        error[..., columns] = new
        lo[..., group], hi[..., group] = low, high
    return lo, hi


def _cost(errors: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """What errors [batch, tries, rows, size] add to e H e^T, but for a constant: [..., rows]."""
    product = (errors.flatten(1, 2) @ own).view_as(errors)
    return product.add_(others[:, None]).mul_(errors).sum(-1)


def _take(candidates: Tensor, index: Tensor) -> Tensor:
    """candidates[b, index[b, 0, r], r] of [batch, tries, rows, size]: [batch, rows, size]."""
    size = candidates.shape[-1]
    return candidates.gather(1, index[..., None].expand(-1, -1, -1, size))[:, 0]


def _columns(weight: Tensor, scheme: Scheme) -> list[slice]:
    size = scheme.group_columns(weight.shape[-1])
    return [slice(start, start + size) for start in range(0, weight.shape[-1], size)]


def _tiles(problem: Problem) -> Iterator[Tensor]:
    batch, _, columns = problem.weight.shape
    rows = max(1, _TILE_WEIGHTS[problem.weight.device.type] // (batch * columns))
    yield from problem.weight.split(rows, dim=1)


def _scaled_errors(problems: Sequence[Problem], scales: Tensor) -> Tensor:
    """Output error of plain rounding under scales [batch, in], for each linear: [batch, n]."""
    scales = scales[:, None]
    found = []
    for problem in problems:
        errors = []
        for part in _tiles(problem):
            rounded = _round(part * scales, problem.scheme).div_(scales)
            errors.append(output_error(rounded.sub_(part), problem.second))
        found += [each.sum(-1) for each in torch.cat(errors, -1).split(problem.rows, -1)]
    return torch.stack(found, -1)


def _round(weight: Tensor, scheme: Scheme) -> Tensor:
    steps = grid.make_grid(*grid.value_range(weight, scheme), scheme)
    return grid.snap(grid.grouped(weight, scheme), steps).flatten(-2)


def _relative_magnitude(problems: Sequence[Problem]) -> Tensor:
    """Mean over rows of |w| / largest |w| of its group: [batch, in]."""
    total = torch.zeros_like(problems[0].weight[:, 0])
    for problem in problems:
        for part in _tiles(problem):
            magnitude = grid.grouped(part.abs(), problem.scheme)
            largest = magnitude.amax(-1, keepdim=True).clamp(min=1e-12)
            total += magnitude.div_(largest).flatten(-2).sum(1)
    return total / sum(problem.weight.shape[1] for problem in problems)


def _tie(values: Tensor, index: Tensor) -> Tensor:
    """The mean of the values [batch, in] of each channel of the fold's source, for all it feeds."""
    index = index.to(values.device)
    total = values.new_zeros(len(values), int(index.max()) + 1)
    count = values.new_zeros(total.shape[-1])
    total.index_add_(1, index, values)
    count.index_add_(0, index, torch.ones_like(values[0]))
    return (total / count.clamp(min=1))[:, index]
