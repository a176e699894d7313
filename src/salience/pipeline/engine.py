"""The blocks of a model, one after the other: statistics, search, codes, into the journal.

What moves from block to block are the hidden states of the calibration text. The block that made
them has its weights read when its turn comes and dropped after it, so memory does not grow with the
number of blocks. On a GPU small blocks are taken a few at a time (`salience.blocks.window`): there
the time goes into starting kernels.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from salience.blocks.block import LoadedBlock, Structure, solve, unfolded
from salience.blocks.blockwise import (
    Arguments,
    BlockArguments,
    micro_batch,
    observe,
    record_inputs,
    run_block,
    run_tail,
)
from salience.blocks.hidden import HiddenStates
from salience.blocks.job import Job
from salience.blocks.journal import Journal
from salience.blocks.kinds import Probe, Structures, plain
from salience.blocks.outside import Outside, embeddings_loaded
from salience.blocks.solved import save_solved
from salience.blocks.window import solved_bytes, window
from salience.errors import DoesNotFitError, SalienceError
from salience.learning.pupil import Pupil
from salience.machine import fast_matmul, release_memory
from salience.modules import coded_blocks
from salience.stats import SecondMoment
from salience.structure import restore, weight_of

PROBE_SHAPE = (2, 16)  # sequences and tokens of the runs that discover folds


def run_blocks(
    tasks: Sequence[tuple[Job, Journal]], tokens: Tensor | None, on_disk: bool, rehearse: bool
) -> None:
    """Quantize every block that the journals do not have yet.

    Args:
        tasks: what to do, and where the results go. Several are of one model on one device, and
            share what is read and observed; the first one's clock has the time of that.
        tokens: calibration token ids [samples, seqlen], None when no text is read.
        on_disk: keep the hidden states on the disk, in the first journal.
        rehearse: try the largest block first.

    Raises:
        SalienceError: what is not finite, or cannot be coded.
        DoesNotFitError: out of memory.
    """
    try:
        _Engine(tasks, tokens, on_disk).run(rehearse)
    except torch.OutOfMemoryError as error:
        device = tasks[0][0].device
        raise DoesNotFitError(
            f"{device} is out of memory ({str(error).split('. ')[0]}); give a --max-memory "
            "that is really free, a shorter --seqlen, or --device cpu"
        ) from None


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """A block, what is known of its inputs, and some of them.

    Args:
        block: with its weights and moments.
        inputs: the hidden states that enter it, of the first micro-batches.
        arguments: what it is called with beside each of them.
        hidden: the hidden states, which have moved past it.
    """

    block: LoadedBlock
    inputs: list[Tensor]
    arguments: list[Arguments]
    hidden: HiddenStates


def gather(
    job: Job, journal: Journal, tokens: Tensor, on_disk: bool, parts: int
) -> Iterator[Gathered]:
    """Each block in turn with its statistics; nothing is coded or kept.

    Args:
        tokens: calibration token ids [samples, seqlen].
        on_disk: keep the hidden states on the disk, in the journal.
        parts: how many micro-batches of inputs to hand out.
    """
    engine = _Engine([(job, journal)], tokens, on_disk, whole=True)
    with job.phase("statistics"):
        engine._record(0)
    hidden = engine._hidden
    if hidden is None:
        return
    for index in range(len(job.blocks)):
        some = range(min(parts, hidden.parts))
        inputs = [hidden.get(part).clone() for part in some]
        arguments = [engine._arguments.of(index, part) for part in some]
        with job.loaded(index) as block:
            yield Gathered(engine._gather(block, index), inputs, arguments, hidden)


class _Engine:
    """The state of one pass over the blocks."""

    def __init__(
        self,
        tasks: Sequence[tuple[Job, Journal]],
        tokens: Tensor | None,
        on_disk: bool,
        whole: bool = False,
    ) -> None:
        self._tasks = tasks
        self._job, self._journal = tasks[0]
        self._folds = any(job.method.folds for job, _ in tasks)
        self._tokens = tokens
        self._on_disk = on_disk
        # Behind the last block that has something to code, nobody asks what the text becomes.
        whole |= any(job.outside or job.method.learns is not None for job, _ in tasks)
        coded = coded_blocks(self._job.prefix, (name for job, _ in tasks for name in job.schemes))
        self._text_ends = len(self._job.blocks) + 1 if whole else coded[-1] + 1
        self._structures = Structures(self._job, self._folds)
        self._hidden: HiddenStates | None = None
        self._pupil: Pupil | None = None
        self._arguments = BlockArguments([])
        self._probe: Probe | None = None

    def run(self, rehearse: bool) -> None:
        job, count = self._job, len(self._job.blocks)
        size = window(job.blocks, job.device, job.method.learns is not None)
        done = min(journal.done() for _, journal in self._tasks)
        first = done // size * size if done < count else count
        needs_tail = any(job.outside and journal.done() <= count for job, journal in self._tasks)
        if (first < count or needs_tail) and (self._tokens is not None or self._folds):
            with job.phase("statistics"):
                self._record(first)
        # Blocks that leave something for later ones cannot run out of their order.
        stateful = self._probe is not None and self._probe.arguments.stateful
        if rehearse and first == 0 and not stateful:
            self._rehearse()
        for start in range(first, count, size):
            self._solve(range(start, min(start + size, count)))
        for each, journal in self._tasks:
            self._solve_outside(each, journal)
        job.progress("block", count, count)

    def _record(self, first: int) -> None:
        """Run what comes before the blocks, and the blocks that are done."""
        job = self._job
        with embeddings_loaded(job):
            generator = torch.Generator().manual_seed(0)
            vocabulary = job.skeleton.get_input_embeddings().weight.shape[0]
            random = torch.randint(vocabulary, PROBE_SHAPE, generator=generator)
            parts: list[Tensor] = []
            arguments = record_inputs(
                job.skeleton,
                job.blocks,
                random,
                len(random),
                job.device,
                lambda _, part: parts.append(part),
            )
            self._probe = Probe(parts[0], arguments)
            if self._tokens is None or first >= self._text_ends:
                return
            samples, seqlen = self._tokens.shape
            tuning = job.method.learns
            batch = micro_batch(
                samples, seqlen, job.device, None if tuning is None else tuning.batch_tokens
            )
            shape = (samples, seqlen, *parts[0].shape[2:])
            hidden = HiddenStates(self._journal, shape, batch, job.device, self._on_disk)
            states = [hidden]
            if tuning is not None:
                on_disk = self._on_disk
                coded = HiddenStates(self._journal, shape, batch, job.device, on_disk, "coded")
                states.append(coded)
            # Blocks that leave something for later ones must all run again.
            new = [each for each in states if arguments.stateful or not each.resume(first)]

            def keep(part: int, x: Tensor) -> None:
                for each in new:
                    each.first(part, x)

            self._arguments = record_inputs(
                job.skeleton, job.blocks, self._tokens, batch, job.device, keep
            )
            self._hidden = hidden
            if tuning is not None:
                self._pupil = Pupil(job, self._journal, tuning, hidden, coded, self._arguments)
        for index in range(hidden.index, min(first, self._text_ends)):
            job.progress("replay", index, first)
            with job.loaded(index) as block:
                self._forward(block, index, {})
            hidden.forget(index + 1)
        if self._pupil is not None and first < len(job.blocks):
            for index in range(self._pupil.index, first):
                job.progress("replay", index, first)
                self._pupil.advance()

    def _solve(self, indices: range) -> None:
        job, began = self._job, time.perf_counter()
        loaded = []
        with ExitStack() as stack:
            for index in indices:
                job.progress("block", index, len(job.blocks))
                with job.phase("read"):
                    block = stack.enter_context(job.loaded(index))
                loaded.append(self._gather(block, index))
                release_memory()
            shared = (time.perf_counter() - began) / len(indices)
            # A solved block is left folded; the next job wants it as it was.
            saved = [unfolded(block) for block in loaded] if len(self._tasks) > 1 else []
            for each, journal in self._tasks:
                self._solve_loaded(each, journal, indices, loaded, shared)
                for weights in saved:
                    restore(weights)
        with job.phase("write"):
            self._journal.forget_hidden(indices.stop)
            release_memory()

    def _solve_loaded(
        self, job: Job, journal: Journal, indices: range, loaded: list[LoadedBlock], shared: float
    ) -> None:
        """The blocks of one job."""
        done = journal.done()
        if done >= indices.stop:
            return
        began = time.perf_counter()
        with job.phase("search"):
            solved = solve(loaded, job.method, job.schemes.get, job.method.trusted)
        if self._pupil is not None:
            with job.phase("learn"):
                solved = [
                    self._pupil.learn(index, block, result)
                    for index, block, result in zip(indices, loaded, solved, strict=True)
                ]
        with job.phase("write"):
            seconds = shared + (time.perf_counter() - began) / len(indices)
            for index, block, result in zip(indices, loaded, solved, strict=True):
                if index >= done:
                    first = self._structures.is_first(index)
                    save_solved(job, journal, index, block, result, first, seconds)
        if self._pupil is not None:
            with job.phase("learn"):
                self._pupil.advance()

    def _gather(self, block: nn.Module, index: int) -> LoadedBlock:
        """A block's structure and moments; the hidden states move past it."""
        job, name = self._job, self._job.block_name(index)
        for each, _ in self._tasks:
            if each.search is not None:
                each.search.check_weights(name, each.digest(index))
        if self._probe is None:
            return LoadedBlock(name, block, plain(block), {})
        with job.phase("structure"):
            structure = self._structures.of(block, index, self._probe)
        for each, _ in self._tasks:
            if each.search is not None:
                each.search.check_folds(name, structure.folds)
        probe = self._probe
        if self._hidden is None or index >= self._text_ends:
            return LoadedBlock(name, block, structure, {}, probe.run(block, index))
        # The hidden states are about to become this block's outputs.
        first = self._hidden.get(0).clone() if structure.folds else probe.hidden
        moments = self._moments(block, structure)
        with job.phase("statistics"):
            self._forward(block, index, moments)
            for local, moment in moments.items():
                if not torch.isfinite(moment.gram).all():
                    raise SalienceError(
                        f"inputs of {name}.{local} are not finite on the calibration text; "
                        "the model overflows"
                    )
        run = partial(run_block, block, first, self._arguments.of(index, 0))
        return LoadedBlock(name, block, structure, moments, run)

    def _moments(self, block: nn.Module, structure: Structure) -> dict[str, SecondMoment]:
        """An empty moment for each group, by its first linear."""
        return {
            names[0]: SecondMoment.empty(
                weight_of(block.get_submodule(names[0])).shape[1], self._job.device
            )
            for names in structure.groups
        }

    def _forward(self, block: nn.Module, index: int, moments: dict[str, SecondMoment]) -> None:
        """Move the hidden states past a block, adding to the moments of its linears' inputs."""
        hidden = self._hidden
        if hidden is None:
            return
        with fast_matmul():
            seen = range(hidden.parts)
            if (tuning := self._job.method.learns) is not None:
                seen, _ = tuning.split(hidden.parts)  # a start that knows the rest looks too good
            for part in range(hidden.parts):
                run = partial(run_block, block, hidden.get(part), self._arguments.of(index, part))
                names = list(moments) if part in seen else []
                hidden.put(part, observe(block, names, run, _adder(moments)))
        hidden.advance()

    def _rehearse(self) -> None:
        """Do the largest block on one micro-batch, to fail now rather than hours later."""
        job = self._job
        sizes = [solved_bytes(block) for block in job.blocks]
        index = sizes.index(max(sizes))
        job.progress("rehearsal", 0, 1)
        name, probe = job.block_name(index), self._probe
        with job.phase("rehearsal"), job.loaded(index) as block:
            if probe is None:
                rehearsed = LoadedBlock(name, block, plain(block), {})
            else:
                structure, moments = self._structures.of(block, index, probe), {}
                run = probe.run(block, index)
                if self._hidden is not None:
                    moments = self._moments(block, structure)
                    part = self._hidden.get(0).clone()
                    run = partial(run_block, block, part, self._arguments.of(index, 0))
                    with fast_matmul():
                        observe(block, list(moments), run, _adder(moments))
                rehearsed = LoadedBlock(name, block, structure, moments, run)
            weights = unfolded(rehearsed) if len(self._tasks) > 1 else []
            for each, _ in self._tasks:
                [solved] = solve([rehearsed], each.method, each.schemes.get, each.method.trusted)
                if self._pupil is not None:
                    self._pupil.rehearse(index, rehearsed, solved)
                restore(weights)

    def _solve_outside(self, job: Job, journal: Journal) -> None:
        """What is in no block, the head and the embeddings: as one more block.

        Embeddings look up one row a token, so all their inputs are alike: unit covariance.
        """
        count = len(job.blocks)
        if not job.outside or journal.done() > count:
            return
        began = time.perf_counter()
        moments: dict[str, SecondMoment] = {}
        hidden = self._hidden
        if hidden is not None and self._tokens is not None:
            moments = {
                name: SecondMoment.empty(job.weight_shape(name)[1], job.device)
                for name in job.outside
                if not isinstance(job.skeleton.get_submodule(name), nn.Embedding)
            }
            tokens = self._tokens[: len(hidden.get(0))].to(job.device)
            with job.phase("statistics"), embeddings_loaded(job), fast_matmul():
                for part in range(hidden.parts):
                    run_tail(job.skeleton, job.blocks, tokens, hidden.get(part), _adder(moments))
        if job.search is not None:
            job.search.check_weights("", job.digest(count))
        holder = Outside(job)
        structure = Structure([(name,) for name in job.outside], [])
        block = LoadedBlock("", holder, structure, moments)
        with job.phase("search"):
            [solved] = solve([block], job.method, job.schemes.get, job.method.trusted)
        save_solved(job, journal, count, block, solved, False, time.perf_counter() - began)


def _adder(moments: dict[str, SecondMoment]) -> Callable[[str, Tensor], None]:
    def add(name: str, x: Tensor) -> None:
        if name in moments:
            moments[name].update(x)

    return add
