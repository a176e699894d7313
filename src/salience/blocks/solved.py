"""What is kept of a solved block: its tensors as the checkpoint has them, and its report."""

from dataclasses import asdict
from typing import Any

from torch import Tensor

from salience.blocks.block import LoadedBlock, SolvedBlock
from salience.blocks.job import Job
from salience.blocks.journal import Journal
from salience.blocks.search_files import search_tensors
from salience.conversion import stored_module, stored_tensors
from salience.formats import Dense
from salience.machine import peak_rss_bytes
from salience.reports.report import BlockReport
from salience.structure import Fold
from salience.writer import to_dtype


def save_solved(
    job: Job,
    journal: Journal,
    index: int,
    block: LoadedBlock,
    solved: SolvedBlock,
    first: bool,
    seconds: float,
) -> None:
    """Write a block into the journal.

    Args:
        index: its number; that of the blocks for what is in none.
        block: it, folded.
        solved: its codes.
        first: whether it is the first of its kind, whose folds the report lists.
        seconds: it took.
    """
    reports = [coded.report for coded in solved.linears.values()]
    count = max(len(reports), 1)
    learned = solved.learned
    report = BlockReport(
        name=block.name,
        error_rtn=sum(linear.error_rtn for linear in reports) / count,
        error=sum(linear.error for linear in reports) / count,
        folds=len(solved.scales),
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
        peak_vram_bytes=job.peak_vram_bytes(),
        loss_start=None if learned is None else learned.loss_start,
        loss=None if learned is None else learned.loss,
        iterations=0 if learned is None else learned.iterations,
    )
    folds = block.structure.folds if first and job.method.folds else []
    record: dict[str, Any] = {
        "block": asdict(report),
        "linears": [asdict(linear) for linear in reports],
        "folds": [_described(each) for each in folds],
    }
    if job.save_search:
        journal.save_search(index, search_tensors(block.name, job.digest(index), solved))
    journal.save_block(index, _tensors(job, block, solved), record)
    job.on_block(report)


def _tensors(job: Job, block: LoadedBlock, solved: SolvedBlock) -> dict[str, Tensor]:
    """By the names of the checkpoint."""
    tensors: dict[str, Tensor] = {}
    # A dense checkpoint holds the folded weights themselves.
    replaced = {} if isinstance(job.fmt, Dense) else solved.linears
    for local, coded in replaced.items():
        module = stored_module(job.skeleton, job.weights, block.full(local))
        for part, tensor in job.fmt.write(coded.qtensor).items():
            tensors[f"{module}.{part}"] = tensor
    quantized = {f"{local}.weight" for local in replaced}
    for local, parameter in block.module.named_parameters():
        if local not in quantized:
            name = block.full(local)
            value = to_dtype(parameter, name, job.dtype)
            tensors |= stored_tensors(job.skeleton, job.weights, name, value)
    return tensors


def _described(fold: Fold) -> dict[str, Any]:
    """A fold as a report has it."""
    return {
        "prev": fold.prev,
        "sinks": list(fold.sinks),
        "rule": fold.rule,
        "channels": fold.channels,
        "error": fold.error,
    }
