"""Adam (Kingma and Ba, arXiv 1412.6980) on plain tensors, whose steps a CUDA graph can hold.

    mean <- 0.9 mean + 0.1 g          square <- 0.99 square + 0.01 g^2
    direction = correction * mean / sqrt(square)

The memory of the squares is a hundred steps and not the usual thousand: a block learns in two
hundred, a whole model in sixty. Both averages start at 0; `correction`, which is 1 after a while,
makes up for that, and is left to the caller because a graph's numbers do not change.
"""

import torch
from torch import Tensor

_MEAN, _SQUARE, _EPSILON = 0.9, 0.99, 1e-12


def correction(step: int) -> float:
    """What the rate is multiplied by in a step, counted from 1."""
    return float((1 - _SQUARE**step) ** 0.5 / (1 - _MEAN**step))


class Adam:
    """The averages `mean` and `square` of the gradients of one tensor."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def direction(self, gradient: Tensor) -> Tensor:
        """Take a gradient in; which way to go against, of a magnitude near 1, in its memory."""
        self.mean.lerp_(gradient, 1 - _MEAN)
        self.square.lerp_(gradient.square_(), 1 - _SQUARE)
        return gradient.copy_(self.square).sqrt_().add_(_EPSILON).reciprocal_().mul_(self.mean)
