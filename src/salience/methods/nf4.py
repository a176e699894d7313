"""NF4: each weight to the nearest of sixteen values that suit a normal distribution.

What QLoRA made common (Dettmers et al., arXiv 2305.14314). It is plain rounding with a better table
than the uniform one, looks at no text and searches nothing; AWQ at the same size does better.
"""

from salience import grid
from salience.grid import Grid
from salience.methods.base import Method, Problem
from salience.qtensor import QTensor


def nearest_value(problem: Problem, _grids: Grid) -> list[QTensor]:
    """Each weight's nearest value of the table; a codebook has no grid to choose."""
    return [grid.quantize(weight, problem.scheme) for weight in problem.weight]


NF4 = Method("nf4", codes=nearest_value, reads_text=False)
