"""What blocks of one kind allow: which linears share an input, and what can be folded where.

Finding out takes some twenty runs of a block, and blocks of the same class and shapes allow the
same. So it is asked of the first of each kind only, also when a run is continued after it: another
block's weights may fail a proof that is a matter of rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from salience.blocks.block import Structure
from salience.blocks.blockwise import BlockArguments, run_block
from salience.blocks.job import Job
from salience.structure import discover_folds, linears, sink_groups


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A few random tokens before the first block, and how each block is called on them."""

    hidden: Tensor
    arguments: BlockArguments

    def run(self, block: nn.Module, index: int) -> Callable[[], Tensor]:
        """Runs a block on them."""
        return partial(run_block, block, self.hidden, self.arguments.of(index, 0))


class Structures:
    """The structure of each kind of block.

    Args:
        job: whose blocks.
        folds: whether folds are wanted, too.
    """

    def __init__(self, job: Job, folds: bool) -> None:
        self._job = job
        self._folds = folds
        self._kinds = [_kind(block) for block in job.blocks]
        self._found: dict[tuple[object, ...], Structure] = {}

    def is_first(self, index: int) -> bool:
        """Whether a block is the first of its kind."""
        return self._kinds.index(self._kinds[index]) == index

    def of(self, block: nn.Module, index: int, probe: Probe) -> Structure:
        """That of a block, which has its weights."""
        kind = self._kinds[index]
        if kind not in self._found:
            first = self._kinds.index(kind)
            if first == index:
                self._found[kind] = self._discover(block, first, probe)
            else:
                with self._job.loaded(first) as other:
                    self._found[kind] = self._discover(other, first, probe)
        return self._found[kind]

    def _discover(self, block: nn.Module, index: int, probe: Probe) -> Structure:
        run = probe.run(block, index)
        groups = sink_groups(block, run)
        folds = discover_folds(block, run, groups) if self._folds else []
        return Structure(groups, folds)


def plain(block: nn.Module) -> Structure:
    """Each linear for itself: what is known of a block that is never run."""
    return Structure([(name,) for name in linears(block)], [])


def _kind(block: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    return (type(block), *shapes)
