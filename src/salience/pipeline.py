"""quantize(): one model in, one low-bit checkpoint out, a block at a time.

    for each block:
        run the float block on the calibration tokens    -> second moments, next block's inputs
        find scales, fold them, prove each fold          -> same function, easier weights
        code each linear, compare with plain rounding    -> QTensor
        write                                            -> disk

Only one block's weights are in memory at a time, in fp32 (on a GPU a few, where blocks are so small
that starting kernels would take longer than running them). Each finished block is in the journal
beside the output, so that after a kill the same command goes on from there.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salience.block import LoadedBlock, SolvedBlock, Structure, solve
from salience.calibration import (
    Arguments,
    Calibration,
    micro_batch,
    observe,
    record_inputs,
    run_block,
)
from salience.checkpoint import read_json
from salience.errors import DoesNotFitError, SalienceError
from salience.formats import get_format
from salience.hidden import HiddenStates
from salience.job import Job, Progress, job_identity
from salience.journal import Journal
from salience.loading import read_tensor, resolve_device, set_tensor
from salience.machine import fast_matmul, peak_rss_bytes
from salience.methods import get_method
from salience.plan import Budget, check_schemes, check_source, checkpoint_bytes, choose_budget
from salience.recipe import Recipe
from salience.report import REPORT_NAME, BlockReport, LinearReport, Report, versions
from salience.scheme import Scheme
from salience.search import SearchFile, SearchWriter
from salience.source import open_source
from salience.stats import SecondMoment
from salience.structure import discover_folds, find_blocks, linears, sink_groups
from salience.writer import ShardWriter, check_disk, disk_errors

_PROBE_SHAPE = (2, 16)  # sequences and tokens of the runs that discover folds


def quantize(
    model: str,
    out: str | Path,
    *,
    method: str = "awq",
    effort: str = "fast",
    scheme: Scheme | str = "w4g128",
    rules: Sequence[tuple[str, Scheme | str]] = (),
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    format: str = "awq",
    calibration: Calibration | None = None,
    device: str = "auto",
    max_memory: int | None = None,
    save_search: str | Path | None = None,
    from_search: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize a model into a new checkpoint folder.

    A run that was interrupted is continued by the same call, from the folder OUT.partial.

    Args:
        model: a folder, a `.gguf` file, a Hub name, or `smollm2-135m`.
        out: the folder to make; it appears when it is whole.
        method: "awq", "gptq" or "rtn".
        effort: "fast", or "balanced" for AWQ's scales and grids with GPTQ's codes.
        scheme: of the linears in the blocks, a Scheme or its name such as "w4g128".
        rules: (pattern, scheme) of linears that get another scheme; they reach `lm_head` too.
        skip: patterns of linears that stay float.
        only: patterns, one of which a linear must match to be quantized.
        format: "awq" (AutoAWQ's gemm layout) or "compressed-tensors".
        calibration: which text; None is 128 sequences of 512 tokens of Python's documentation.
        device: where blocks run, "auto" for the GPU if there is one.
        max_memory: bytes the work may take on its device; None for what is free.
        save_search: also write the scales and grids found to this file.
        from_search: take scales and grids from such a file instead of searching.
        trust_remote_code: let the model's own Python code run.
        progress: called with (phase, done, total).

    Returns:
        The report, which is also in the folder.

    Raises:
        SalienceError: bad input; nothing is written.
        DoesNotFitError: too little memory.
        StorageError: a disk that is full or not writable; what is done is kept.
    """
    start = time.perf_counter()
    target = Path(out)
    place = resolve_device(device)
    source = open_source(model, trust_remote_code)
    skeleton = source.skeleton()
    prefix, blocks = find_blocks(skeleton)
    parsed = tuple((pattern, _scheme(each)) for pattern, each in rules)
    recipe = Recipe(_scheme(scheme), parsed, tuple(skip), tuple(only))
    searched = SearchFile.open(Path(from_search)) if from_search is not None else None
    job = Job(
        source=source,
        skeleton=skeleton,
        weights=source.weights(skeleton),
        prefix=prefix,
        blocks=blocks,
        method=get_method(method, effort),
        schemes=recipe.resolve(list(linears(skeleton)), prefix),
        fmt=get_format(format),
        device=place,
        progress=progress or (lambda _phase, _done, _total: None),
        search=SearchWriter() if save_search is not None else None,
    )
    check_source(source, skeleton, job.weights)
    check_schemes(skeleton, job.schemes, job.fmt)
    if searched is not None:
        job.method = searched.method(job.method, recipe.scheme)
    text = (calibration or Calibration()) if job.reads_text else None
    budget = choose_budget(skeleton, job.schemes, text, job.method, place, max_memory)
    check_disk(target, 2 * checkpoint_bytes(skeleton, job.schemes) + budget.disk_bytes)
    tokens = text.tokens(source.tokenizer) if text else None
    report = Report(
        model=model,
        out=str(target),
        method=method,
        effort=effort,
        scheme=str(recipe.scheme),
        format=format,
        calibration=text.describe() if text else None,
        device=str(place),
        versions=versions(),
        options=recipe.describe(),
        kept_modules=job.kept,
    )
    identity = job_identity(job, recipe, effort, method, format, text, tokens, from_search)
    with Journal(target, identity) as journal, torch.no_grad():
        if not journal.finished:
            _fill_buffers(job)
            if budget.is_close:
                _rehearse(job, text, budget)
            _run(job, tokens, budget, journal, report)
            _assemble(job, journal, report, start)
        journal.publish()
        result = Report.from_dict(read_json(target / REPORT_NAME))
        if save_search is not None and job.search is not None:
            job.search.save(Path(save_search), result)
    return result
