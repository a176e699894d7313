"""What a quantization method is: three functions, any of which another method may share.

    scales   which input channels to multiply (and their source to divide): same function, easier
             weights
    grids    scale and zero of each group
    codes    which point of the grid each weight becomes

Rounding to nearest searches nothing; AWQ searches scales and grids; GPTQ searches codes; the
effort "balanced" is the scales and grids of the one with the codes of the other.

All three work on a batch of problems of one shape. On a GPU most of their time is the start of
small kernels, so the blocks of a small model are solved side by side; of a large model, and on a
CPU, the batch is one block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from salience import grid
from salience.grid import Grid
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.structure import Fold


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Linears that share one input and one scheme, in each of `batch` blocks.

    Args:
        names: full names of the linears, for each block.
        weight: their rows one below the other, fp32 [batch, out, in].
        rows: how many rows each linear has.
        scheme: how they are coded.
        second: H of the input, fp32 [batch, in, in]; None for unit covariance (no text was read).
        mean_abs: E[|x|] of the input, fp32 [batch, in]; None likewise.
    """

    names: tuple[tuple[str, ...], ...]
    weight: Tensor
    rows: tuple[int, ...]
    scheme: Scheme
    second: Tensor | None = None
    mean_abs: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class FoldScale:
    """A scale found for a fold: `scales` fp32 [in], made of exponents alpha and beta."""

    fold: Fold
    scales: Tensor
    alpha: float
    beta: float


def no_scales(problems: Sequence[Problem], fold: Fold) -> list[FoldScale | None]:
    """Leave the weights as they are."""
    return [None] * len(problems[0].names)


def full_grids(problem: Problem) -> Grid:
    """Grids from the smallest to the largest weight of each group: [batch, out, groups]."""
    return grid.make_grid(*grid.value_range(problem.weight, problem.scheme), problem.scheme)


def nearest(problem: Problem, grids: Grid) -> list[QTensor]:
    """Round each weight to the nearest point of its group's grid."""
    return [
        grid.encode(weight, grids._replace(scales=scales, zeros=zeros), problem.scheme)
        for weight, scales, zeros in zip(problem.weight, grids.scales, grids.zeros, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a block learns.

    Args:
        iterations: steps of the gradient, at most.
        batch_tokens: of a micro-batch, as many whole sequences as that makes.
        rounding_rate: Adam's, of the offsets, in steps of the grid; it falls to 0 linearly.
        range_rate: likewise of the factors of lo and hi.
        bound: of the offsets' magnitude.
        held_out: share of the micro-batches that is never trained on; one at least.
        check_every: iterations between two measurements on those.
        patience: measurements in a row without a better one that end it. The loss may rise at first
            and falls most when the rate is nearly 0, so a few say nothing.
        seed: of the order of the micro-batches.
    """

    iterations: int = 200
    batch_tokens: int = 4096
    rounding_rate: float = 0.003
    range_rate: float = 5e-4
    bound: float = 1.0
    held_out: float = 1 / 16
    check_every: int = 20
    patience: int = 10
    seed: int = 0

    def split(self, count: int) -> tuple[range, range]:
        """The micro-batches to train on, and those held out, of `count`; at least one each."""
        held = min(count - 1, max(1, round(self.held_out * count)))
        return range(count - held), range(count - held, count)


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """How scales and norms are tuned after the codes; see `salience.learning.end_to_end`.

    Args:
        passes: over the calibration text.
        tokens: of a step, at most.
        steps: of a pass, at least: a short text is cut into smaller steps.
        rate: the first step of a scale, as far as it moves the largest code, in steps of the grid;
            it falls to 0 along a cosine.
        float_rate: the same of what is stored float, norms and biases, relative to each.
        held_out: one of so many steps of the text is never trained on.
        seed: of the order of the steps.
    """

    passes: int = 6
    tokens: int = 4096
    steps: int = 16
    rate: float = 0.03
    float_rate: float = 1e-3
    held_out: int = 16
    seed: int = 0

    def step_samples(self, samples: int, seqlen: int) -> int:
        """Sequences of a step: the most that divide the samples, within the limits above."""
        most = min(self.tokens // seqlen, samples // self.steps)
        return max(n for n in range(1, max(1, most) + 1) if samples % n == 0)


@dataclass(frozen=True, slots=True)
class Method:
    """A method by its parts.

    Args:
        name: on the command line.
        scales: of the inputs of `problems`, all sinks of one fold; for each block the scale, or
            None for none.
        grids: of each group, [batch, out, groups].
        codes: one QTensor a block, of all rows.
        reads_text: whether it needs calibration text. Problems of a method that does not are
            single linears of unit input covariance.
        reads_moments_to_code: whether `codes` needs the text even when scales and grids are known.
        trusted: whether its result stays even where plain rounding would be better, because its
            grids were chosen with moments that are not at hand.
        act_order: whether it forms groups in activation order, which the checkpoint must store.
        learns: how the codes of a block are then moved by gradient (`methods.tuned`), if they are.
        end_to_end: how the whole model is tuned after its blocks; None for not at all.
    """

    name: str
    scales: Callable[[Sequence[Problem], Fold], list[FoldScale | None]] = no_scales
    grids: Callable[[Problem], Grid] = full_grids
    codes: Callable[[Problem, Grid], list[QTensor]] = nearest
    reads_text: bool = True
    reads_moments_to_code: bool = False
    trusted: bool = False
    act_order: bool = False
    learns: Tuning | None = None
    end_to_end: EndToEnd | None = None

    @property
    def folds(self) -> bool:
        """Whether it looks for scales."""
        return self.scales is not no_scales
