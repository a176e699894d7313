"""Before anything runs: what a quantization will take, from the config and the headers alone.

Memory is counted tensor by tensor for the largest block, since only one is held. Time is the
operations of each phase over what this machine was just seen to do: a matrix product, and the
search itself on a small random weight.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salience import grid
from salience.calibration import BACKWARD_TOKENS, Calibration, micro_batch
from salience.checkpoint import Checkpoint
from salience.distillation import LOGITS
from salience.engine import window
from salience.errors import DoesNotFitError, SalienceError
from salience.formats import Dense, Format, stored_config
from salience.formats.gguf import block_bits
from salience.job import Job
from salience.machine import (
    available_ram_bytes,
    fast_matmul,
    free_disk_bytes,
    matmul_flops,
    peak_rss_bytes,
)
from salience.methods import EndToEnd, Method, Problem, Tuning
from salience.methods.awq import EXPONENTS, SCALE_ROWS, TILE_CANDIDATES
from salience.methods.tuned import Rounding
from salience.scheme import Scheme, fitting_group_sizes
from salience.source import Source
from salience.structure import Fold, codable, find_blocks, linears, weight_of

_FLOAT_BYTES = 2  # what is not quantized is written in fp16 or bf16
_TOKENIZER_BYTES = 2500  # for each entry of the vocabulary
_TRIAL_COLUMNS = 256  # of the search that is timed: so few that products with H cost little
_CLOSE = 0.8  # of the memory there is: from here on a rehearsal comes first
_READ_BYTES_PER_SECOND = 2e9
# Of a block that learns: floats for each coded weight, and for each number that enters or leaves a
# linear (with what lies between the linears), which wait for the backward pass.
_LEARN_COPIES = 12
_LEARN_ACTIVATIONS = 3
_LOGITS_HELD = 6  # tensors as large as logits while their gradient is made
_VECTORS = 10  # as long as what is tuned: numbers, gradient, Adam's two, the best, rates, and steps
_BLOCK_SECONDS = 5e-3  # of a step: starting the kernels of a block, three times
_WEIGHT_SECONDS = {"cpu": 2e-8, "cuda": 1e-11}  # of a step: making a weight of its code, and back


@dataclass(frozen=True, slots=True)
class Plan:
    """What `quantize` will need.

    Args:
        bits_per_weight: of the quantized linears.
        disk_bytes: of the checkpoint to write.
        temporary_bytes: of disk, beside that, while it is made.
        ram_bytes: peak resident memory.
        vram_bytes: peak GPU memory, 0 on CPUs.
        memory: peak bytes of tensors on the device, by phase.
        seconds: by phase.
        hidden_on_disk: whether the hidden states of the text stay on the disk.
        fits: whether memory and disk suffice now.
        advice: what would make it fit, one line each.
    """

    model: str
    scheme: str
    method: str
    device: str
    parameters: int
    quantized_parameters: int
    bits_per_weight: float
    source_bytes: int
    disk_bytes: int
    temporary_bytes: int
    ram_bytes: int
    vram_bytes: int
    memory: dict[str, int]
    seconds: dict[str, float]
    hidden_on_disk: bool
    fits: bool
    advice: list[str]


@dataclass(frozen=True, slots=True)
class Budget:
    """How a job is to use the memory there is.

    Args:
        on_disk: the hidden states stay on the disk.
        is_close: little is left over, so that a rehearsal is worth its time.
        temporary_bytes: of disk while the checkpoint is made.
    """

    on_disk: bool
    is_close: bool
    temporary_bytes: int


def make_plan(
    job: Job, calibration: Calibration | None, out: Path, max_memory: int | None = None
) -> Plan:
    """Estimate a quantization.

    Args:
        job: one that `prepare` has let pass.
        calibration: None when no text is read.
        out: where it would be written.
        max_memory: bytes it may take on its device; None for what is free.
    """
    source, model, weights, device = job.source, job.skeleton, job.weights, job.device
    schemes, method = job.schemes, job.method
    names = {name for name, _ in model.named_parameters()} & weights.names()
    source_bytes = sum(weights.nbytes(name) for name in names)
    disk = checkpoint_bytes(model, schemes, job.fmt, job_bits(job))
    backward = job.target_bits is not None
    try:
        budget = choose_budget(
            source, model, schemes, calibration, method, device, max_memory, backward
        )
        advice = []
    except DoesNotFitError as error:
        hidden = _hidden_bytes(model, calibration, method)
        budget, advice = Budget(True, True, hidden), [str(error)]
    temporary = disk + budget.temporary_bytes
    if disk + temporary > free_disk_bytes(out):
        short = disk + temporary - free_disk_bytes(out)
        advice.append(f"the disk of {out} is short by {short / 2**20:.0f} MiB; name another --out")
    memory = device_memory(model, schemes, calibration, method, device, budget.on_disk, backward)
    shapes = _shapes(model, schemes)
    on_gpu = device.type == "cuda"
    seconds = _seconds(model, schemes, calibration, method, device, source_bytes)
    if job.target_bits is not None:
        # Read twice and observed once more; of a few tokens all is run back, which costs three
        # times what it costs to run it. Rounding to nearest is small beside that.
        tokens = calibration.samples * calibration.seqlen if calibration is not None else 1
        part = min(1.0, BACKWARD_TOKENS / tokens)
        seconds["sensitivity"] = 2 * seconds["read"] + (1 + 3 * part) * seconds["statistics"]
    return Plan(
        model=source.name,
        scheme=" ".join(sorted({str(scheme) for scheme in _possible(job)})),
        method=method.name,
        device=str(device),
        parameters=sum(p.numel() for p in model.parameters()),
        quantized_parameters=sum(rows * columns for rows, columns in shapes.values()),
        bits_per_weight=job_bits(job),
        source_bytes=source_bytes,
        disk_bytes=disk,
        temporary_bytes=temporary,
        ram_bytes=_ram_bytes(source, model, memory, device, calibration),
        vram_bytes=max(memory.values()) if on_gpu else 0,
        memory=memory,
        seconds=seconds,
        hidden_on_disk=budget.on_disk,
        fits=not advice,
        advice=advice,
    )


def _possible(job: Job) -> set[Scheme]:
    return {scheme for name, own in job.schemes.items() for scheme in job.options.get(name, [own])}


def choose_budget(
    source: Source,
    model: Any,
    schemes: Mapping[str, Scheme],
    calibration: Calibration | None,
    method: Method,
    device: torch.device,
    max_memory: int | None,
    backward: bool = False,
) -> Budget:
    """Whether the hidden states can stay in memory.

    Args:
        backward: whether blocks are run backward, too, as `salience.sensitivity` does.

    Raises:
        DoesNotFitError: the work needs more than there is even if they stay on the disk.
    """
    needs = []
    for on_disk in (False, True):
        memory = device_memory(model, schemes, calibration, method, device, on_disk, backward)
        if device.type == "cuda":
            needs.append(max(memory.values()))
        else:
            needs.append(_ram_bytes(source, model, memory, device, calibration))
    cap = _memory_cap(device) if max_memory is None else max_memory
    if needs[1] > cap:
        larger = "--max-memory" if max_memory is not None else "machine"
        shorter = "" if calibration is None else "a shorter --seqlen, "
        raise DoesNotFitError(
            f"{source.name} needs {needs[1] / 2**30:.1f} GiB on {device.type} and has "
            f"{cap / 2**30:.1f} GiB; use {shorter}--method rtn or a larger {larger}"
        )
    on_disk = needs[0] > cap
    need = needs[on_disk]
    temporary = 2 * _hidden_bytes(model, calibration, method)
    if backward:
        temporary += _inputs_bytes(model, calibration)
    if method.end_to_end is not None:
        temporary += _hidden_bytes(model, calibration, replace(method, learns=None))
        temporary += 4 * _VECTORS * _numbers(model, schemes)
    return Budget(on_disk, need > _CLOSE * cap, temporary)


def check_source(source: Source, model: nn.Module, weights: Checkpoint) -> None:
    """Refuse a source that is quantized already or lacks a tensor of `model`.

    Raises:
        SalienceError: naming the tensor.
    """
    if stored_config(source.config, source.stored):
        raise SalienceError(f"{source.name} is quantized already; start from the float model")
    missing = {name for name, _ in model.named_parameters()} - weights.names()
    if missing:
        raise SalienceError(f"tensor {min(missing)} is missing from {weights.path}")


def check_schemes(model: nn.Module, schemes: Mapping[str, Scheme], fmt: Format) -> None:
    """Refuse schemes that do not fit the linears or the format.

    Raises:
        SalienceError: naming a linear and the group sizes that would fit.
    """
    prefix, _ = find_blocks(model)
    outside = [name for name in schemes if not name.startswith(f"{prefix}.")]
    if outside and not fmt.heads:
        raise SalienceError(
            f"readers of --format {fmt.name} take {outside[0]} for float; use "
            "--format compressed-tensors, or leave it out of --rule"
        )
    shapes = _shapes(model, schemes)
    fmt.check(schemes, shapes)
    for name, (_, columns) in shapes.items():
        scheme = schemes[name]
        if columns % scheme.group_columns(columns):
            fit = fitting_group_sizes({columns for _, columns in shapes.values()})
            better = ", ".join(f"w{scheme.bits}g{size}" for size in fit) or "none of the usual ones"
            raise SalienceError(
                f"group size {scheme.group_size} does not divide the {columns} inputs of "
                f"{name}; schemes that fit this model: {better}"
            )


def check_act_order(method: Method, fmt: Format) -> None:
    """Refuse groups in activation order where the format cannot say which column is in which.

    Raises:
        SalienceError: naming a format that can.
    """
    if method.act_order and not fmt.act_order:
        raise SalienceError(
            f"--format {fmt.name} has no place for the groups of --act-order; use --format gptq"
        )


def _shapes(model: nn.Module, schemes: Mapping[str, Scheme]) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear to quantize."""
    found = codable(model)
    return {name: _shape(found[name]) for name in schemes}


def _shape(linear: nn.Module) -> tuple[int, int]:
    rows, columns = weight_of(linear).shape
    return rows, columns


def mean_bits(model: nn.Module, schemes: Mapping[str, Scheme], fmt: Format) -> float:
    """Stored bits a quantized weight, scales and zeros included."""
    shapes = _shapes(model, schemes)
    weights = sum(rows * columns for rows, columns in shapes.values())
    return stored_bits(schemes, shapes, fmt) / max(1, weights)


def stored_bits(
    schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]], fmt: Format
) -> int:
    """Bits that linears take, scales and zeros included.

    Args:
        shapes: (out, in) of each of `schemes`, whose groups divide the columns.
    """

    def of_weight(scheme: Scheme, columns: int) -> float:
        if isinstance(fmt, Dense):
            return 8.0 * _FLOAT_BYTES
        return block_bits(scheme) if fmt.container == "gguf" else scheme.bits_per_weight(columns)

    return sum(
        round(rows * columns * of_weight(schemes[name], columns))
        for name, (rows, columns) in shapes.items()
    )


def job_bits(job: Job) -> float:
    """Stored bits a quantized weight; where they are not chosen yet, the most they may be."""
    schemes, model = job.schemes, job.skeleton
    if job.target_bits is None:
        return mean_bits(model, schemes, job.fmt)
    inside = {name: s for name, s in schemes.items() if name not in job.outside}
    outside = {name: schemes[name] for name in job.outside}
    count, more = (
        sum(rows * columns for rows, columns in _shapes(model, some).values())
        for some in (inside, outside)
    )
    bits = count * job.target_bits + more * mean_bits(model, outside, job.fmt)
    return bits / max(1, count + more)


def checkpoint_bytes(
    model: Any, schemes: Mapping[str, Scheme], fmt: Format, bits: float | None = None
) -> int:
    """Size of the written checkpoint, of `bits` a quantized weight where the schemes are open."""
    quantized = sum(rows * columns for rows, columns in _shapes(model, schemes).values())
    others = sum(p.numel() for p in model.parameters()) - quantized
    mean = mean_bits(model, schemes, fmt) if bits is None else bits
    return round(quantized * mean / 8) + others * _FLOAT_BYTES


def device_memory(
    model: Any,
    schemes: Mapping[str, Scheme],
    calibration: Calibration | None,
    method: Method,
    device: torch.device,
    on_disk: bool,
    backward: bool = False,
) -> dict[str, int]:
    """Peak bytes of tensors on the device, by phase."""
    prefix, blocks = find_blocks(model)
    learns = method.learns
    held = window(blocks, device, learns is not None)
    largest = max(blocks, key=lambda block: sum(p.numel() for p in block.parameters()))
    weights = held * sum(p.numel() for p in largest.parameters())
    outside = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(f"{prefix}."))
    embedding = model.get_input_embeddings().weight
    groups = _groups(largest)
    solved = max((_solve_floats(*group, device, method) for group in groups), default=0)
    if calibration is None:
        return {"search": 4 * (weights + solved), "write": 4 * embedding.numel()}
    batch = _batch_tokens(calibration, method, device)
    hidden = 0 if on_disk else _hidden_bytes(model, calibration, method) // 4
    moments = held * sum(columns**2 for _, columns in groups)
    first = held * batch * embedding.shape[1]
    live = batch * _live_floats(largest)
    learning = {}
    if learns is not None:
        coded = sum(rows * columns for rows, columns in groups)
        kept = batch * _LEARN_ACTIVATIONS * sum(rows + columns for rows, columns in groups)
        pairs = 3 * batch * embedding.shape[1]
        floats = hidden + weights + moments + _LEARN_COPIES * coded + kept + pairs
        learning = {"learn": 4 * floats}
    whole = {}
    if method.end_to_end is not None:
        largest_weights = weights // held
        teacher = hidden if learns is None else hidden // 2
        whole = {
            "teacher": 4 * (teacher + outside + largest_weights + live),
            "end to end": 4 * (teacher + outside + 4 * largest_weights)
            + _end_to_end_bytes(model, schemes, calibration, method.end_to_end, device, on_disk),
        }
    found = {
        "embeddings": 4 * (hidden + outside + 2 * batch * embedding.shape[1]),
        "statistics": 4 * (hidden + weights + moments + first + live),
        "folds": 4 * (hidden + 2 * weights + moments + first + live),
        "search": 4 * (hidden + weights + moments + first + held * solved),
        **learning,
        "write": 4 * embedding.numel(),
        **whole,
    }
    if backward:
        # A block keeps what its gradients need; the logits of one sequence come several times.
        states = min(BACKWARD_TOKENS, calibration.samples * calibration.seqlen)
        logits = _LOGITS_HELD * calibration.seqlen * embedding.shape[0]
        block = weights + 3 * live + 2 * moments
        streams = hidden + 3 * max(states, batch) * embedding.shape[1]
        found["sensitivity"] = 4 * (streams + max(block, outside + embedding.numel() + logits))
    return found


def _end_to_end_bytes(
    model: Any,
    schemes: Mapping[str, Scheme],
    calibration: Calibration,
    settings: EndToEnd,
    device: torch.device,
    on_disk: bool,
) -> int:
    """What tuning the whole model takes beside weights and the teacher's hidden states."""
    _, blocks = find_blocks(model)
    largest = max(blocks, key=lambda block: sum(p.numel() for p in block.parameters()))
    vocabulary, width = model.get_input_embeddings().weight.shape
    samples, seqlen = calibration.samples, calibration.seqlen
    tokens = settings.step_samples(samples, seqlen) * seqlen
    inputs = (len(blocks) + 2) * tokens * width
    live = tokens * _trained_floats(largest)
    # A backward pass has the codes of one linear as floats.
    codes = max(weight_of(linear).numel() for linear in linears(largest).values())
    logits = _LOGITS_HELD * min(tokens * vocabulary, LOGITS[device.type])
    total = 4 * (inputs + live + codes + logits)
    total += 4 * _VECTORS * _numbers(model, schemes)
    if not on_disk:
        total += sum(p.numel() for p in blocks.parameters())  # nearly all of them are codes
    return total


def _numbers(model: nn.Module, schemes: Mapping[str, Scheme]) -> int:
    """How many scales, norms and biases a model has, or a few more."""
    floats = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    shapes = _shapes(model, schemes)
    return floats + sum(
        rows * columns // schemes[name].group_columns(columns)
        for name, (rows, columns) in shapes.items()
    )


def _trained_floats(block: nn.Module) -> int:
    """Floats a token takes while a block runs and what its gradients need is kept."""
    return 2 * sum(sum(_shape(linear)) for linear in linears(block).values())


def _groups(block: nn.Module) -> list[tuple[int, int]]:
    """(rows, columns) of the linears that share an input, guessed from their shapes.

    Two of one shape beside each other are gate and up; of more than two of one width, all but the
    last are q, k and v.
    """
    beside: dict[tuple[str, int], list[int]] = {}
    for name, linear in linears(block).items():
        rows, columns = _shape(linear)
        beside.setdefault((name.rpartition(".")[0], columns), []).append(rows)
    groups = []
    for (_, columns), counts in beside.items():
        if len(counts) == 2 and counts[0] == counts[1]:
            groups.append((sum(counts), columns))
        elif len(counts) > 2:
            groups += [(sum(counts[:-1]), columns), (counts[-1], columns)]
        else:
            groups += [(each, columns) for each in counts]
    return groups


def _solve_floats(rows: int, columns: int, device: torch.device, method: Method) -> int:
    """Floats alive in the search for a group, beside weights and moments."""
    weight, square = rows * columns, columns**2
    scales = 4 * weight + square
    grids = 4 * weight + square + 6 * TILE_CANDIDATES[device.type]
    if method.act_order:  # H in order, beside H
        scales, grids = scales + weight + square, grids + weight + square
    codes = 7 * weight + 4 * square if method.reads_moments_to_code else 4 * weight + square
    return max(scales, grids, codes + (weight + square if method.act_order else 0))


def _live_floats(block: nn.Module) -> int:
    """Floats a token takes while a block runs: its residual stream and its widest part."""
    found = linears(block).values()
    widest = max(max(_shape(m)) for m in found)
    narrowest = min(max(_shape(m)) for m in found)
    return 4 * narrowest + 5 * widest


def _hidden_bytes(model: Any, calibration: Calibration | None, method: Method) -> int:
    """Of the float model's hidden states and, where blocks learn, the quantized one's."""
    if calibration is None:
        return 0
    width = model.get_input_embeddings().weight.shape[1]
    models = 1 if method.learns is None else 2
    return 4 * models * calibration.samples * calibration.seqlen * width


def _batch_tokens(calibration: Calibration, method: Method, device: torch.device) -> int:
    samples, seqlen = calibration.samples, calibration.seqlen
    learning = None if method.learns is None else method.learns.batch_tokens
    return seqlen * micro_batch(samples, seqlen, device, learning)


def _inputs_bytes(model: Any, calibration: Calibration | None) -> int:
    """Disk for the inputs of all blocks that a pass backward starts from."""
    if calibration is None:
        return 0
    _, blocks = find_blocks(model)
    tokens = min(BACKWARD_TOKENS, calibration.samples * calibration.seqlen)
    return 4 * len(blocks) * tokens * int(model.get_input_embeddings().weight.shape[1])


def _ram_bytes(
    source: Source,
    model: Any,
    memory: Mapping[str, int],
    device: torch.device,
    calibration: Calibration | None,
) -> int:
    embedding = model.get_input_embeddings().weight
    # What is written last: the embeddings and a head of their own, in fp16, and a block's file.
    shard = 2 * _FLOAT_BYTES * max(p.numel() for p in model.parameters())
    total = peak_rss_bytes()
    if source.is_gguf:
        total += sum(source.stored.nbytes(name) for name in source.stored.names())  # stays mapped
    if calibration is not None:
        total += _TOKENIZER_BYTES * embedding.shape[0]
    if device.type == "cuda":
        return total + shard
    work = {**memory, "write": memory["write"] + shard}
    return total + max(work.values())


def _memory_cap(device: torch.device) -> int:
    """Bytes this process may have on the device, what it has included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return available_ram_bytes() + peak_rss_bytes()


def _seconds(
    model: Any,
    schemes: Mapping[str, Scheme],
    calibration: Calibration | None,
    method: Method,
    device: torch.device,
    source_bytes: int,
) -> dict[str, float]:
    _, blocks = find_blocks(model)
    large = 1024 if device.type == "cpu" else 8192
    flops = matmul_flops(device, large)
    with fast_matmul():
        fast = matmul_flops(device, large)
    seconds = {"read": source_bytes / _READ_BYTES_PER_SECOND}
    if calibration is not None:
        tokens = calibration.samples * calibration.seqlen
        weights = sum(weight_of(m).numel() for m in linears(blocks).values())
        squares = sum(columns**2 for block in blocks for _, columns in _groups(block))
        seconds["statistics"] = 2 * tokens * (weights + squares) / fast
        batch = _batch_tokens(calibration, method, device)
        if method.folds:  # each is proved by two runs of a micro-batch
            seconds["statistics"] += 4 * batch * weights / flops
        if method.learns is not None:
            seconds["learn"] = _learn_seconds(method.learns, tokens, batch, weights, fast, device)
    each = _search_cost(next(iter(schemes.values())), method, device)
    held = window(blocks, device, method.learns is not None)
    search = 0.0
    for block in blocks:
        for rows, columns in _groups(block):
            # A GPU starts as many kernels for a narrow problem as for a wide one.
            starts = columns if device.type == "cpu" else _TRIAL_COLUMNS
            search += starts * each.start / held + columns * each.row * rows
            # Products of all rows with H: two for plain rounding and one for the result; two for
            # the clip search, two for a scale, which is found on a part of the rows.
            exact, rough = (3 * rows, 2 * rows) if method.reads_text else (0, 0)
            if method.folds:
                rough += 2 * rows + len(EXPONENTS) * min(rows, 2 * SCALE_ROWS)
            if method.reads_moments_to_code:
                exact += 3 * rows + 2 * columns
            search += 2 * columns**2 * (exact / flops + rough / fast)
    seconds["search"] = search
    if calibration is not None and method.end_to_end is not None:
        seconds["end to end"] = _end_to_end_seconds(
            model, calibration, method.end_to_end, device, fast
        )
    return seconds


def _learn_seconds(
    tuning: Tuning, tokens: int, batch: int, weights: int, flops: float, device: torch.device
) -> float:
    """Of all blocks: forward and backward, the weights themselves, and the loss held out."""
    _, held = tuning.split(tokens // batch)
    checks = 1 + tuning.iterations // tuning.check_every
    products = 6 * tuning.iterations * batch + 2 * (checks * len(held) * batch + tokens)
    scheme = Scheme(4, 64)
    weight = torch.randn(256 if device.type == "cpu" else 8192, 1024, device=device)
    rounding = Rounding([weight], [grid.quantize(weight, scheme)])
    rate = torch.zeros((), device=device)
    for _ in range(2):  # the first also pays for starting up
        start = time.perf_counter()
        rounding.step(rate, rate, tuning.bound)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - start
    return weights * (products / flops + tuning.iterations * took / weight.numel())


def _end_to_end_seconds(
    model: Any,
    calibration: Calibration,
    settings: EndToEnd,
    device: torch.device,
    flops: float,
) -> float:
    """A forward pass of the teacher, then all steps and measurements."""
    _, blocks = find_blocks(model)
    samples, seqlen = calibration.samples, calibration.seqlen
    tokens = samples * seqlen
    weights = sum(p.numel() for p in blocks.parameters())
    head = model.get_input_embeddings().weight.numel()
    held = max(1 / settings.held_out, settings.step_samples(samples, seqlen) / samples)
    # Blocks run twice and once backward, which is two; the head once, backward, and the teacher's.
    step = 2 * tokens * (4 * weights + 3 * head) / flops
    measured = 2 * tokens * held * (weights + 2 * head) / flops
    steps = samples // settings.step_samples(samples, seqlen)
    fixed = len(blocks) * _BLOCK_SECONDS + weights * _WEIGHT_SECONDS[device.type]
    passes = settings.passes * (step * (1 - held) + measured + steps * fixed)
    return 2 * tokens * weights / flops + 3 * measured + passes


@dataclass(frozen=True, slots=True)
class _Cost:
    """Seconds of a search for each column: to start, and for each row."""

    start: float
    row: float


def _search_cost(scheme: Scheme, method: Method, device: torch.device) -> _Cost:
    """What a search costs here, by doing two small ones."""
    columns = _TRIAL_COLUMNS
    counts = (64, 512) if device.type == "cpu" else (64, 8192)
    took = []
    for rows in (counts[0], *counts):  # the first also pays for starting up
        start = time.perf_counter()
        _search_once(rows, columns, scheme, method, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    row = max(0.0, took[2] - took[1]) / (counts[1] - counts[0])
    return _Cost(max(0.0, took[1] - row * counts[0]) / columns, row / columns)


def _search_once(
    rows: int, columns: int, scheme: Scheme, method: Method, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x = random(2 * columns, columns)
    if scheme.group_size > columns:
        scheme = Scheme(scheme.bits, columns, scheme.sym, scheme.codebook)
    text = method.reads_text
    second = (x.T @ x / len(x))[None] if text else None
    mean_abs = x.abs().mean(0)[None] if text else None
    problem = Problem((("a",),), random(1, rows, columns), (rows,), scheme, second, mean_abs)
    if method.folds and text:
        method.scales([problem], Fold("a", ("b",), "norm", torch.arange(columns), 0.0))
    method.codes(problem, method.grids(problem))
