"""Blocks that learn from what they will really get: what quantized blocks before them put out.

Beside the hidden states of the float model, which say what each block is to return, there are those
of the quantized one. They move past a block when it is done, by the weights that its file in the
journal holds, so that a run that goes on after a kill meets the very same numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from salience.blocks.block import LoadedBlock, SolvedBlock, with_learned
from salience.blocks.blockwise import BlockArguments, run_block
from salience.blocks.hidden import HiddenStates
from salience.blocks.job import Job
from salience.blocks.journal import Journal
from salience.errors import SalienceError
from salience.learning.finished import Finished
from salience.loading import set_tensor, unload
from salience.machine import fast_matmul
from salience.methods import Tuning
from salience.methods.learner import Examples, learn
from salience.structure import weight_of
from salience.writer import to_dtype


class Pupil:
    """The quantized model as far as it is done, and the learning of its next block.

    Args:
        job: of a method that learns.
        journal: which holds the blocks that are done.
        tuning: how.
        hidden: of the float model.
        coded: of the quantized one; the same micro-batches.
        arguments: of the blocks.

    Raises:
        SalienceError: blocks that cannot be run alone.
    """

    def __init__(
        self,
        job: Job,
        journal: Journal,
        tuning: Tuning,
        hidden: HiddenStates,
        coded: HiddenStates,
        arguments: BlockArguments,
    ) -> None:
        if arguments.stateful:
            raise SalienceError(
                f"{job.source.name} hands more than hidden states from block to block, and a block "
                "that learns is run again and again by itself; use --effort balanced"
            )
        self._job, self._journal, self._tuning = job, journal, tuning
        self._hidden, self._coded, self._arguments = hidden, coded, arguments

    @property
    def index(self) -> int:
        """The block that the quantized model's hidden states enter."""
        return self._coded.index

    def learn(self, index: int, block: LoadedBlock, solved: SolvedBlock) -> SolvedBlock:
        """Block `index` with codes that were learned from those of `solved`.

        The float model's hidden states have moved past it, the quantized one's have not.
        """
        job, tuning, count = self._job, self._tuning, len(self._job.blocks)

        def check(iteration: int, ratio: float) -> None:
            done = f"{iteration} of {tuning.iterations} iterations"
            job.progress(f"block, {done}, loss {ratio:.3f} of its start", index, count)

        examples = Examples(
            self._hidden.parts,
            self._coded.get,
            self._hidden.get,
            partial(self._run, block.module, index),
            not self._arguments.others,
        )
        return self._learn(block, solved, examples, tuning, check)

    def rehearse(self, index: int, block: LoadedBlock, solved: SolvedBlock) -> None:
        """One step of a block on the first micro-batch, whatever it enters."""
        run = partial(self._run, block.module, index)
        examples = Examples(2, lambda _: self._hidden.get(0), lambda _: self._hidden.get(0), run)
        once = replace(self._tuning, iterations=1)
        self._learn(block, solved, examples, once, lambda _iteration, _ratio: None)

    def _learn(
        self,
        block: LoadedBlock,
        solved: SolvedBlock,
        examples: Examples,
        tuning: Tuning,
        on_check: Callable[[int, float], None],
    ) -> SolvedBlock:
        for name, parameter in block.module.named_parameters():
            if name.removesuffix(".weight") not in solved.linears:
                # As it will be stored, which `to_dtype` may have to say no to.
                parameter.copy_(to_dtype(parameter, block.full(name), self._job.dtype).float())
        start = {name: coded.qtensor for name, coded in solved.linears.items()}
        if not start:
            return solved
        with fast_matmul():
            learned = learn(block.module, start, examples, tuning, on_check)
        if self._job.device.type == "cuda":
            torch.cuda.empty_cache()  # what a graph was captured in is of no use to the next
        return with_learned(block, solved, learned)

    def advance(self) -> None:
        """Move the quantized model's hidden states past its next block, which is done."""
        coded, index = self._coded, self._coded.index
        with decoded(self._job, self._journal, index) as block, fast_matmul():
            for part in range(coded.parts):
                coded.put(part, self._run(block, index, part, coded.get(part)))
        coded.advance()
        coded.forget(coded.index)

    def _run(self, block: nn.Module, index: int, part: int, x: Tensor) -> Tensor:
        return run_block(block, x, self._arguments.of(index, part))


@contextmanager
def decoded(job: Job, journal: Journal, index: int) -> Iterator[nn.Module]:
    """A block with the weights that the journal has of it, as they will be read.

    Raises:
        StorageError: a damaged file.
    """
    block, finished = job.blocks[index], Finished(job, journal.checkpoint([index])).block(index)
    for name, value in finished.floats.items():
        set_tensor(block, name, value.float())
    for name, qt in finished.linears.items():
        linear = block.get_submodule(name)
        like = linear.get_parameter("weight")
        set_tensor(block, f"{name}.weight", torch.empty(like.shape, device=job.device))
        weight_of(linear).copy_(qt.dequantize())
    try:
        yield block
    finally:
        unload(block, [name for name, _ in block.named_parameters()])
