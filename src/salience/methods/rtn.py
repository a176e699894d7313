"""RTN: round each weight to the nearest value of its group's grid. What all others must beat."""

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
class Rtn:
    """Round to nearest. It looks at no text, so its moments are empty."""

    name: str = "rtn"

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
