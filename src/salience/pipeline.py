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

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from salience.assemble import assemble, collect
from salience.calibration import Calibration
from salience.containers import check_container
from salience.engine import run_blocks
from salience.errors import SalienceError
from salience.formats import Dense, get_format
from salience.job import Job, Progress, identity
from salience.journal import Journal, check_output, held_bytes, is_published
from salience.loading import read_tensor, resolve_device
from salience.machine import peak_rss_bytes
from salience.methods import check_method, default_format, default_scheme, get_method
from salience.padding import pad
from salience.plan import (
    check_act_order,
    check_schemes,
    check_source,
    checkpoint_bytes,
    choose_budget,
    mean_bits,
)
from salience.recipe import Recipe
from salience.report import BlockReport, Report, read_report, versions
from salience.scheme import Scheme
from salience.search_files import open_search, search_metadata
from salience.serving import Finding, findings, rejection, summary
from salience.source import open_source
from salience.structure import codable, find_blocks, kept
from salience.writer import check_disk, check_file, float_dtype


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
        effort: "fast" (None), or "balanced": AWQ's scales and grids with GPTQ's codes.
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
        trust_remote_code: let the model's own Python code run.
        progress: called with (phase, done, total).
        on_block: called with the report of each block when it is done.
        on_phase: called with the name of a phase when it begins, and with "" when it ends.
        on_warning: called, before the work, with each line on what vLLM or SGLang would mind.

    Returns:
        The report, which is also in the folder.

    Raises:
        SalienceError: bad input; nothing is written.
        DoesNotFitError: too little memory.
        StorageError: a disk that is full or not writable; what is done is kept.
    """
    start = time.perf_counter()
    target = Path(out)
    check_output(target)  # before anything is fetched or read
    search = open_search(Path(from_search)) if from_search is not None else None
    made = search.info if search is not None else {}
    method = str(made.get("method", "awq")) if method is None else method
    effort = str(made.get("effort", "fast")) if effort is None else effort
    chosen = get_method(method, effort, act_order)
    if act_order and (from_search is not None or save_search is not None):
        raise SalienceError(
            "--act-order finds grids of groups that a search file has no place for; leave "
            "--save-search and --from-search away"
        )
    format = default_format(method) if format is None else format
    stored = float_dtype(dtype)
    place = resolve_device(device)
    source = open_source(model, trust_remote_code)
    padding = None
    if pad_intermediate is not None:
        source, padding = pad(source, pad_intermediate, place)
    skeleton = source.skeleton()
    prefix, blocks = find_blocks(skeleton)
    rest = tuple((pattern, _scheme(each)) for pattern, each in rules)
    wanted = _scheme(default_scheme(method) if scheme is None else scheme)
    recipe = Recipe(wanted, rest, tuple(skip), tuple(only))
    schemes: Mapping[str, Scheme] = recipe.resolve(list(codable(skeleton)), prefix, kept(skeleton))
    if search is not None:
        search.check_names(codable(skeleton), [f"{prefix}.{i}" for i in range(len(blocks))])
        # The search knows; what is said beside it can only agree.
        given = None if scheme is None and not (rules or skip or only) else schemes
        schemes = search.schemes_for(schemes, given)
        chosen = search.method(chosen)
    job = Job(
        source=source,
        skeleton=skeleton,
        weights=source.weights(skeleton),
        prefix=prefix,
        blocks=blocks,
        method=chosen,
        schemes=schemes,
        fmt=get_format(format),
        device=place,
        dtype=stored,
        search=search,
        save_search=save_search is not None,
        progress=progress or (lambda _phase, _done, _total: None),
        on_block=on_block or (lambda _report: None),
        on_phase=on_phase or (lambda _name: None),
    )
    check_source(source, skeleton, job.weights)
    check_container(job.fmt, source)
    for each in schemes.values():
        check_method(get_method(method, effort), each)
        if save_search is not None and each.codebook is not None:
            raise SalienceError(f"--save-search has nothing to save of --scheme {each}: no search")
    check_schemes(skeleton, schemes, job.fmt)
    check_act_order(chosen, job.fmt)
    if isinstance(job.fmt, Dense) and not chosen.folds:
        raise SalienceError(
            f"--format dense holds weights with scales folded in and --method {method} finds none; "
            "use --method awq, or the model as it is"
        )
    if save_search is not None and not is_published(target):
        check_file(Path(save_search), target)
    minded = _findings(job, tensor_parallel)
    text = (calibration or Calibration()) if chosen.reads_text else None
    budget = choose_budget(source, skeleton, schemes, text, chosen, place, max_memory)
    if not is_published(target):
        need = 2 * checkpoint_bytes(skeleton, schemes, job.fmt) + budget.temporary_bytes
        check_disk(target, need - held_bytes(target))
    tokens = text.tokens(source.tokenizer) if text else None
    report = Report(
        model=model,
        out=str(target),
        method=method,
        effort=effort,
        scheme=str(recipe.scheme) if search is None else made.get("scheme", str(recipe.scheme)),
        format=format,
        calibration=text.describe() if text else None,
        device=str(place),
        versions=versions(),
        options=recipe.describe() | ({"act_order": True} if act_order else {}),
        bits_per_weight=mean_bits(skeleton, schemes, job.fmt),
        kept_modules=job.kept,
        serving=[asdict(each) for each in minded],
    )
    if padding is not None:
        report.options["intermediate_size"] = list(padding)
    options: dict[str, Any] = {"--method": method, "--effort": effort, "--format": format}
    options |= {"--act-order": act_order}
    options |= {"--dtype": dtype}
    options |= {"--from-search": str(from_search), "--save-search": str(save_search)}
    options |= {"--trust-remote-code": trust_remote_code, "--pad-intermediate": pad_intermediate}
    options |= {"--tensor-parallel": tensor_parallel}
    if text is not None:
        options |= {"--calibration": text.text, "--samples": text.samples}
        options |= {"--seqlen": text.seqlen, "--seed": text.seed}
    with Journal(target, identity(job, recipe, options, tokens)) as journal, torch.no_grad():
        if not journal.finished:
            for line in summary(minded):
                (on_warning or (lambda _line: None))(line)
            _fill_buffers(job)
            run_blocks(job, tokens, journal, budget.on_disk, budget.is_close)
            with job.phase("write"):
                collect(job, journal, report)
                if save_search is not None:
                    metadata = search_metadata(_search_info(job, report))
                    journal.join_searches(metadata, len(report.blocks))
                report.phase_seconds = job.seconds
                report.seconds = time.perf_counter() - start
                report.peak_rss_bytes = peak_rss_bytes()
                report.peak_vram_bytes = job.peak_vram_bytes()
                assemble(job, journal, report)
        journal.publish(None if save_search is None else Path(save_search))
    return read_report(target)


def _findings(job: Job, tensor_parallel: int | None) -> list[Finding]:
    """What vLLM and SGLang would mind.

    Raises:
        SalienceError: neither would serve it on the GPUs asked for.
    """
    if tensor_parallel is not None and tensor_parallel < 1:
        raise SalienceError(f"--tensor-parallel is {tensor_parallel}; use 1 or more")
    found = findings(job.served, tensor_parallel or 1)
    refusal = rejection(found) if tensor_parallel is not None else None
    if refusal is not None:
        raise SalienceError(f"{refusal} (without --tensor-parallel it is a warning)")
    return found


def _scheme(scheme: Scheme | str) -> Scheme:
    return Scheme.parse(scheme) if isinstance(scheme, str) else scheme


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
