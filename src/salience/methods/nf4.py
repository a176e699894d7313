"""NF4: each weight to the nearest of sixteen values that suit a normal distribution.

What QLoRA made common. It is plain rounding with a better table than the uniform one, looks at no
text and searches nothing; AWQ at the same size does better.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from salience import grid
from salience.methods.base import FoldScale
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.stats import SecondMoment
from salience.structure import Fold


@dataclass(frozen=True, slots=True)
class Nf4:
    """Round to nearest on a codebook. It looks at no text, so it ignores the moments."""

    name: str = "nf4"

    def prepare(
        self,
        weights: dict[str, Tensor],
        folds: Sequence[Fold],
        moments: dict[str, SecondMoment],
        scheme: Scheme,
    ) -> list[FoldScale]:
        return []

    def quantize(self, weight: Tensor, moment: SecondMoment, scheme: Scheme) -> QTensor:
        return grid.quantize(weight, scheme)
