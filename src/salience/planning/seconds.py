"""Seconds that a quantization takes: the operations of each phase over what this machine does.

That is seen at once: a matrix product, and the search itself on a small random weight.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salience import grid
from salience.blocks.window import window
from salience.calibration import Calibration
from salience.machine import fast_matmul, matmul_flops
from salience.methods import EndToEnd, Method, Problem, Tuning
from salience.methods.awq import EXPONENTS, SCALE_ROWS
from salience.methods.tuned import Rounding
from salience.modules import coded_blocks
from salience.planning.bytes import batch_tokens, input_groups
from salience.scheme import Scheme
from salience.structure import Fold, find_blocks, linears, weight_of

_TRIAL_COLUMNS = 256  # of the search that is timed: so few that products with H cost little
_READ_BYTES_PER_SECOND = 2e9
# Small kernels take their time however little they do: of a block, in a step of the end-to-end pass
# and, on a GPU, in an iteration of learning (SmolLM2 on an H100: 123 ms a step, 2.5 an iteration).
_BLOCK_SECONDS, _ITERATION_SECONDS = 4e-3, 2e-3
_WEIGHT_SECONDS = {"cpu": 2e-8, "cuda": 1e-11}  # of a step: making a weight of its code, and back


def seconds_of(
    model: Any,
    schemes: Mapping[str, Scheme],
    calibration: Calibration | None,
    method: Method,
    device: torch.device,
    source_bytes: int,
) -> dict[str, float]:
    """Seconds by phase.

    Args:
        source_bytes: of what is read.
    """
    name, blocks = find_blocks(model)
    coded = coded_blocks(name, schemes)
    # The text goes to the last block that is coded, unless something behind it asks for more.
    whole = method.learns is not None or any(not n.startswith(f"{name}.") for n in schemes)
    read = blocks if whole or not coded else blocks[: coded[-1] + 1]
    large = 1024 if device.type == "cpu" else 8192
    flops = matmul_flops(device, large)
    with fast_matmul():
        fast = matmul_flops(device, large)
    seconds = {"read": source_bytes / _READ_BYTES_PER_SECOND}
    if calibration is not None:
        tokens = calibration.samples * calibration.seqlen
        weights = sum(weight_of(m).numel() for block in read for m in linears(block).values())
        squares = sum(columns**2 for block in read for _, columns in input_groups(block))
        seconds["statistics"] = 2 * tokens * (weights + squares) / fast
        batch = batch_tokens(calibration, method, device)
        if method.folds:  # each is proved by two runs of a micro-batch
            seconds["statistics"] += 4 * batch * weights / flops
        if method.learns is not None:
            seconds["learn"] = _learn_seconds(
                method.learns, tokens, batch, len(read), weights, fast, device
            )
    each = _search_cost(next(iter(schemes.values())), method, device)
    held = window(blocks, device, method.learns is not None)
    search = 0.0
    for index in coded:
        for rows, columns in input_groups(blocks[index]):
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
    tuning: Tuning,
    tokens: int,
    batch: int,
    blocks: int,
    weights: int,
    flops: float,
    device: torch.device,
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
    starts = blocks * tuning.iterations * _ITERATION_SECONDS if device.type == "cuda" else 0.0
    return starts + weights * (products / flops + tuning.iterations * took / weight.numel())


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
