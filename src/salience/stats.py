"""What a method needs to know of a linear's input x: its second moment and its mean magnitude.

    H = E[x x^T]   [in, in]          a = E[|x|]   [in]

With H, the mean squared error of the output when W becomes W' needs no further forward pass:

    E |(W' - W) x|^2 = tr((W' - W) H (W' - W)^T)

so a search over scales and clips costs one small product a candidate, however long the text was.
The sums are a monoid (`update` adds tokens, `merge` adds another's sums), hence streaming,
resuming and distributing the calibration are the same operation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class SecondMoment:
    """Running sums over tokens: `gram` fp32 [in, in], `abs_sum` fp32 [in], `count` tokens."""

    gram: Tensor
    abs_sum: Tensor
    count: int = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> "SecondMoment":
        gram = torch.zeros(in_features, in_features, device=device)
        return cls(gram, torch.zeros(in_features, device=device))

    def update(self, x: Tensor) -> None:
        """Add inputs [..., in]."""
        x = x.detach().flatten(0, -2).float()
        self.gram.addmm_(x.T, x)
        self.abs_sum += x.abs().sum(0)
        self.count += x.shape[0]

    def merge(self, other: "SecondMoment") -> None:
        """Add another's tokens."""
        self.gram += other.gram
        self.abs_sum += other.abs_sum
        self.count += other.count

    @property
    def second(self) -> Tensor:
        """H [in, in]."""
        return self.gram / max(self.count, 1)

    @property
    def mean_abs(self) -> Tensor:
        """E[|x|], of [in]."""
        return self.abs_sum / max(self.count, 1)


def output_error(difference: Tensor, second: Tensor | None) -> Tensor:
    """E[(d x)^2] for each row d of `difference` [..., out, in]: [..., out].

    Args:
        difference: of two weights.
        second: H of x, [..., in, in]; None for inputs of unit covariance.
    """
    if second is None:
        return difference.square().sum(-1)
    return (difference @ second).mul_(difference).sum(-1).clamp_(min=0)
