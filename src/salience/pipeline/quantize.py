"""quantize(): one model in, one low-bit checkpoint out, a block at a time.

    for each block:
        run the float block on the calibration tokens    -> second moments, next block's inputs
        find scales, fold them, prove each fold          -> same function, easier weights
        code each linear, compare with plain rounding    -> QTensor
        write                                            -> disk
    for effort "best": tune scales and norms against the float model's logits

Only one block's weights are in memory at a time, in fp32 (on a GPU a few, where blocks are so small
that starting kernels would take longer than running them). Each finished block is in the journal
beside the output, so that after a kill the same command goes on from there.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salience.blocks.job import Job, Progress, identity
from salience.blocks.journal import Journal, check_output, held_bytes, is_published
from salience.blocks.search_files import open_search, search_metadata
from salience.calibration import Calibration
from salience.errors import SalienceError
from salience.learning.end_to_end import tune
from salience.loading import read_tensor
from salience.machine import peak_rss_bytes
from salience.pipeline.assemble import assemble, collect
from salience.pipeline.engine import run_blocks
from salience.pipeline.prepare import Prepared, prepare
from salience.pipeline.target import choose
from salience.planning.bytes import checkpoint_bytes, job_bits, mean_bits
from salience.planning.plan import Budget, choose_budget
from salience.reports.report import BlockReport, Report, read_report, versions
from salience.scheme import Scheme
from salience.serving import Finding, findings, summary
from salience.source import Source, open_source
from salience.writer import check_disk, check_file


def quantize(
    model: str,
    out: str | Path,
    *,
    method: str | None = None,
    effort: str | None = None,
    act_order: bool = False,
    scheme: Scheme | str | None = None,
    rules: Sequence[tuple[str, Scheme | str]] = (),
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    format: str | None = None,
    dtype: str = "float16",
    calibration: Calibration | None = None,
    device: str = "auto",
    max_memory: int | None = None,
    save_search: str | Path | None = None,
    from_search: str | Path | None = None,
    tensor_parallel: int | None = None,
    pad_intermediate: int | None = None,
    target_bits: float | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    on_block: Callable[[BlockReport], None] | None = None,
    on_phase: Callable[[str], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Report:
    """Quantize a model into a new checkpoint folder.

    A run that was interrupted is continued by the same call, from the folder OUT.partial.

    Args:
        model: a folder, a `.gguf` file, a Hub name, or `smollm2-135m`.
        out: the folder to make; it appears when it is whole.
        method: "awq" (None), "gptq", "rtn" or "nf4".
        effort: "fast" (None); "balanced": AWQ's scales and grids with GPTQ's codes; or "best":
            these codes and ranges then learned block by block, and at last scales and norms tuned
            against the float model's logits.
        act_order: "gptq" forms its groups of columns of like importance; the checkpoint then says
            which column is in which, so the format must have a place for it.
        scheme: of the linears in the blocks, a Scheme or its name; None is w4g128.
        rules: (pattern, scheme) of linears that get another scheme; they reach `lm_head` and the
            input embeddings too.
        skip: patterns of linears that stay float.
        only: patterns, one of which a linear must match to be quantized.
        format: "awq" (AutoAWQ's gemm layout), "compressed-tensors", "gptq", "bitsandbytes" for nf4
            and fp4, "bitsandbytes-int8", or "dense": float weights with the scales folded in, not
            rounded; None is the first, or "bitsandbytes" for nf4.
        dtype: of what is stored float, "float16" or "bfloat16". The scales of codes are fp16 either
            way: the codes were searched for them, and bf16 would round them by up to 0.4%.
        calibration: which text; None is 128 sequences of 512 tokens of Python's documentation.
        device: where blocks run, "auto" for the GPU if there is one.
        max_memory: bytes the work may take on its device; None for what is free.
        save_search: also write the scales and grids found to this file.
        from_search: take scales and grids from such a file instead of searching; what is None
            above is then what the search was made with.
        tensor_parallel: GPUs that will serve it; what neither vLLM nor SGLang would serve on that
            many is refused. None is one, and refuses nothing.
        pad_intermediate: widen the inner width of the MLPs to a multiple of this, by zeros that
            change nothing.
        target_bits: choose the bits of each linear of the blocks by what they do to the model's
            predictions, so that the linears take at most this many stored bits a weight on the
            average; group size and symmetry are the scheme's. Needs a format that holds several
            widths; see `salience.pipeline.target`.
        trust_remote_code: let the model's own Python code run.
        progress: called with (phase, done, total).
        on_block: called with the report of each block when it is done.
        on_phase: called with the name of a phase when it begins, and with "" when it ends.
        on_warning: called, before the work, with each line on what vLLM or SGLang would mind, and
            after it where a model cannot be tuned as a whole.

    Returns:
        The report, which is also in the folder.

    Raises:
        SalienceError: bad input; nothing is written.
        DoesNotFitError: too little memory.
        StorageError: a disk that is full or not writable; what is done is kept.
    """
    work = _prepare(
        model,
        Path(out),
        method=method,
        effort=effort,
        act_order=act_order,
        scheme=scheme,
        rules=rules,
        skip=skip,
        only=only,
        format=format,
        dtype=dtype,
        calibration=calibration,
        device=device,
        max_memory=max_memory,
        save_search=save_search,
        from_search=from_search,
        tensor_parallel=tensor_parallel,
        pad_intermediate=pad_intermediate,
        target_bits=target_bits,
        trust_remote_code=trust_remote_code,
    )
    work.job.progress = progress or work.job.progress
    work.job.on_block = on_block or work.job.on_block
    work.job.on_phase = on_phase or work.job.on_phase
    return _run([work], on_warning)[0]


@dataclass(frozen=True, slots=True)
class Variant:
    """One of several checkpoints of a model; the options of `quantize` of these names."""

    out: str | Path
    method: str | None = None
    effort: str | None = None
    scheme: Scheme | str | None = None
    format: str | None = None


def quantize_all(
    model: str,
    variants: Sequence[Variant],
    *,
    calibration: Calibration | None = None,
    device: str = "auto",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Report]:
    """Quantize a model in several ways, running it over the calibration text once.

    Each checkpoint is, byte for byte, what `quantize` makes of the same options, and an interrupted
    run is continued by either. Of the reports' phases, the first one's hold what was shared.

    Args:
        model: as of `quantize`, and so are the other options.
        variants: what to make.
        progress: called with (phase, done, total), for one variant after the other where they
            share nothing.

    Returns:
        Their reports, in order.

    Raises:
        SalienceError: bad input; nothing is written of what comes after it.
        DoesNotFitError: too little memory.
        StorageError: a disk that is full or not writable; what is done is kept.
    """
    for each in variants:
        check_output(Path(each.out))  # before anything is fetched or read
    source = open_source(model, trust_remote_code)
    works = [
        _prepare(
            source,
            Path(each.out),
            method=each.method,
            effort=each.effort,
            scheme=each.scheme,
            format=each.format,
            calibration=calibration,
            device=device,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
        )
        for each in variants
    ]
    for work in works:
        work.job.progress = progress or work.job.progress
    # Blocks that learn go one by one, each behind those before it as they became.
    methods = [work.job.method for work in works]
    shared = [method.reads_text and method.learns is None for method in methods]
    together = [work for work, shares in zip(works, shared, strict=True) if shares]
    for group in (together, *([work] for work in works if work not in together)):
        if group:
            _run(group, None)
    return [read_report(work.target) for work in works]


@dataclass(slots=True, eq=False)
class _Work:
    """A job, where its result goes, and what will be said of it."""

    prepared: Prepared
    target: Path
    report: Report
    budget: Budget
    tokens: Tensor | None
    identity: dict[str, Any]
    save_search: Path | None
    start: float
    serving: list[Finding]

    @property
    def job(self) -> Job:
        return self.prepared.job


def _prepare(
    model: str | Source,
    target: Path,
    *,
    method: str | None = None,
    effort: str | None = None,
    act_order: bool = False,
    scheme: Scheme | str | None = None,
    rules: Sequence[tuple[str, Scheme | str]] = (),
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    format: str | None = None,
    dtype: str = "float16",
    calibration: Calibration | None = None,
    device: str = "auto",
    max_memory: int | None = None,
    save_search: str | Path | None = None,
    from_search: str | Path | None = None,
    tensor_parallel: int | None = None,
    pad_intermediate: int | None = None,
    target_bits: float | None = None,
    trust_remote_code: bool = False,
) -> _Work:
    """All that is refused before the work, and the work; options as of `quantize`."""
    start = time.perf_counter()
    check_output(target)  # before anything is fetched or read
    search = open_search(Path(from_search)) if from_search is not None else None
    made = search.info if search is not None else {}
    method = str(made.get("method", "awq")) if method is None else method
    effort = str(made.get("effort", "fast")) if effort is None else effort
    if act_order and (from_search is not None or save_search is not None):
        raise SalienceError(
            "--act-order finds grids of groups that a search file has no place for; leave "
            "--save-search and --from-search away"
        )
    prepared = prepare(
        model,
        method=method,
        effort=effort,
        act_order=act_order,
        scheme=scheme,
        rules=rules,
        skip=skip,
        only=only,
        format=format,
        dtype=dtype,
        device=device,
        tensor_parallel=tensor_parallel,
        pad_intermediate=pad_intermediate,
        target_bits=target_bits,
        trust_remote_code=trust_remote_code,
        search=search,
    )
    job, recipe = prepared.job, prepared.recipe
    job.save_search = save_search is not None
    source, skeleton, schemes = job.source, job.skeleton, job.schemes
    if save_search is not None:
        for each in schemes.values():
            if each.codebook is not None:
                raise SalienceError(
                    f"--save-search has nothing to save of --scheme {each}: no search"
                )
        if not is_published(target):
            check_file(Path(save_search), target)
    text = (calibration or Calibration()) if job.method.reads_text else None
    if job.method.learns is not None and text is not None and text.samples < 2:
        raise SalienceError(
            "--effort best keeps some sequences to judge by what it learned from the others; give "
            "--samples 2 or more"
        )
    backward = job.target_bits is not None
    budget = choose_budget(
        source, skeleton, schemes, text, job.method, job.device, max_memory, backward
    )
    if not is_published(target):
        size = checkpoint_bytes(skeleton, schemes, job.fmt, job_bits(job))
        need = 2 * size + budget.temporary_bytes
        check_disk(target, need - held_bytes(target))
    tokens = text.tokens(source.tokenizer) if text else None
    report = Report(
        model=model if isinstance(model, str) else model.name,
        out=str(target),
        method=method,
        effort=effort,
        scheme=str(recipe.scheme) if search is None else made.get("scheme", str(recipe.scheme)),
        format=job.fmt.name,
        calibration=text.describe() if text else None,
        device=str(job.device),
        versions=versions(),
        options=recipe.describe() | ({"act_order": True} if act_order else {}),
        bits_per_weight=job_bits(job),
        kept_modules=job.kept,
        serving=[asdict(each) for each in prepared.serving],
    )
    if prepared.padding is not None:
        report.options["intermediate_size"] = list(prepared.padding)
    options: dict[str, Any] = {"--method": method, "--effort": effort, "--format": job.fmt.name}
    options |= {"--act-order": act_order}
    options |= {"--dtype": dtype}
    options |= {"--from-search": str(from_search), "--save-search": str(save_search)}
    options |= {"--trust-remote-code": trust_remote_code, "--pad-intermediate": pad_intermediate}
    options |= {"--tensor-parallel": tensor_parallel, "--target-bits": target_bits}
    if text is not None:
        options |= {"--calibration": text.text, "--samples": text.samples}
        options |= {"--seqlen": text.seqlen, "--seed": text.seed}
    return _Work(
        prepared,
        target,
        report,
        budget,
        tokens,
        identity(job, recipe, options, tokens),
        None if save_search is None else Path(save_search),
        start,
        prepared.serving,
    )


def _run(works: Sequence[_Work], on_warning: Callable[[str], None] | None) -> list[Report]:
    """Do jobs of one model and one text."""
    with ExitStack() as stack, torch.no_grad():
        journals = [stack.enter_context(Journal(work.target, work.identity)) for work in works]
        open_ = [pair for pair in zip(works, journals, strict=True) if not pair[1].finished]
        for work, journal in open_:
            _choose(work, journal)
            for line in summary(work.serving):
                (on_warning or (lambda _line: None))(line)
            _fill_buffers(work.job)
        if open_:
            tasks = [(work.job, journal) for work, journal in open_]
            on_disk = any(work.budget.on_disk for work, _ in open_)
            is_close = any(work.budget.is_close for work, _ in open_)
            run_blocks(tasks, works[0].tokens, on_disk, is_close)
        for work, journal in open_:
            warning = tune(work.job, journal, work.tokens, work.budget.on_disk)
            if warning is not None:
                (on_warning or (lambda _line: None))(warning)
            _write(work, journal)
        for work, journal in zip(works, journals, strict=True):
            journal.publish(work.save_search)
    return [read_report(work.target) for work in works]


def _choose(work: _Work, journal: Journal) -> None:
    """Settle the bits of each linear, where they are to be chosen."""
    job, report = work.job, work.report
    if job.target_bits is None or work.tokens is None:
        return
    found = choose(job, journal, work.tokens, work.budget.on_disk)
    job.schemes = {**job.schemes, **found.schemes}
    work.serving = findings(job.served)
    report.allocation = found.describe()
    report.bits_per_weight = mean_bits(job.skeleton, job.schemes, job.fmt)
    report.serving = [asdict(each) for each in work.serving]


def _write(work: _Work, journal: Journal) -> None:
    job, report = work.job, work.report
    with job.phase("write"):
        collect(job, journal, report)
        if job.save_search:
            metadata = search_metadata(_search_info(job, report))
            journal.join_searches(metadata, len(report.blocks))
        report.phase_seconds = job.seconds
        report.seconds = time.perf_counter() - work.start
        report.peak_rss_bytes = peak_rss_bytes()
        report.peak_vram_bytes = job.peak_vram_bytes()
        assemble(job, journal, report)


def _fill_buffers(job: Job) -> None:
    """Read the buffers that are stored; they are small, so all stay in memory."""
    stored = job.weights.names()
    for name, buffer in job.skeleton.named_buffers():
        if name in stored:
            buffer.copy_(read_tensor(job.weights, name, buffer))


def _search_info(job: Job, report: Report) -> dict[str, Any]:
    return {
        "model": report.model,
        "method": report.method,
        "effort": report.effort,
        "scheme": report.scheme,
        "schemes": {name: str(scheme) for name, scheme in job.schemes.items()},
        "calibration": report.calibration,
        "versions": report.versions,
    }
