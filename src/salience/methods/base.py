"""What a quantization method is: two verbs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.stats import SecondMoment
from salience.structure import Fold


@dataclass(frozen=True, slots=True, eq=False)
class FoldScale:
    """A scale found for a fold: `scales` fp32 [in], made of exponents alpha and beta."""

    fold: Fold
    scales: Tensor
    alpha: float
    beta: float


class Method(Protocol):
    """First the same function with easier weights, then the codes."""

    @property
    def name(self) -> str: ...

    def prepare(
        self,
        weights: dict[str, Tensor],
        folds: Sequence[Fold],
        moments: dict[str, SecondMoment],
        scheme: Scheme,
    ) -> list[FoldScale]:
        """The scales to fold into a block.

        Args:
            weights: fp32 [out, in] of each linear of the block, by name.
            folds: the folds the block allows.
            moments: of the input of each linear.
            scheme: how the weights will be coded.
        """
        ...

    def quantize(self, weight: Tensor, moment: SecondMoment, scheme: Scheme) -> QTensor:
        """Code one folded weight, fp32 [out, in], with the moment of its folded input."""
        ...
