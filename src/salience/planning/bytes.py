"""Bytes that a quantization takes, of disk and of memory, by the config and the headers alone.

Memory is counted tensor by tensor for the largest block, since only one is held.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from salience.blocks.blockwise import BACKWARD_TOKENS, micro_batch
from salience.blocks.job import Job
from salience.blocks.window import moment_floats, window
from salience.calibration import Calibration
from salience.formats import Dense, Format
from salience.formats.gguf import block_bits
from salience.learning.distillation import LOGITS
from salience.machine import peak_rss_bytes
from salience.methods import EndToEnd, Method
from salience.methods.awq import TILE_CANDIDATES
from salience.modules import shape_of, shapes_of
from salience.scheme import Scheme
from salience.source import Source
from salience.structure import find_blocks, linears, weight_of

_FLOAT_BYTES = 2  # what is not quantized is written in fp16 or bf16
_TOKENIZER_BYTES = 2500  # for each entry of the vocabulary
# Of a block that learns: floats for each coded weight, and for each number that enters or leaves a
# linear (with what lies between the linears), which wait for the backward pass.
_LEARN_COPIES = 12
_LEARN_ACTIVATIONS = 3
_LOGITS_HELD = 6  # tensors as large as logits while their gradient is made
VECTORS = 10  # as long as what is tuned: numbers, gradient, Adam's two, the best, rates, and steps


def mean_bits(model: nn.Module, schemes: Mapping[str, Scheme], fmt: Format) -> float:
    """Stored bits a quantized weight, scales and zeros included."""
    shapes = shapes_of(model, schemes)
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
        sum(rows * columns for rows, columns in shapes_of(model, some).values())
        for some in (inside, outside)
    )
    bits = count * job.target_bits + more * mean_bits(model, outside, job.fmt)
    return bits / max(1, count + more)


def checkpoint_bytes(
    model: Any, schemes: Mapping[str, Scheme], fmt: Format, bits: float | None = None
) -> int:
    """Size of the written checkpoint, of `bits` a quantized weight where the schemes are open."""
    quantized = sum(rows * columns for rows, columns in shapes_of(model, schemes).values())
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
    groups = input_groups(largest)
    solved = max((_solve_floats(*group, device, method) for group in groups), default=0)
    if calibration is None:
        return {"search": 4 * (weights + solved), "write": 4 * embedding.numel()}
    batch = batch_tokens(calibration, method, device)
    hidden = 0 if on_disk else hidden_bytes(model, calibration, method) // 4
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
        # Back, a block keeps what its gradients need, and the logits of one sequence come several
        # times. Solved, it has a copy, and a moment for each linear beside those of the inputs.
        states = min(BACKWARD_TOKENS, calibration.samples * calibration.seqlen)
        logits = _LOGITS_HELD * calibration.seqlen * embedding.shape[0]
        back = max(weights + 3 * live, outside + embedding.numel() + logits)
        search = 2 * weights + moments + moment_floats(largest) + max(live, solved)
        streams = hidden + 3 * max(states, batch) * embedding.shape[1]
        found["sensitivity"] = 4 * (streams + max(back, search))
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
    total += 4 * VECTORS * tuned_numbers(model, schemes)
    if not on_disk:
        total += sum(p.numel() for p in blocks.parameters())  # nearly all of them are codes
    return total


def tuned_numbers(model: nn.Module, schemes: Mapping[str, Scheme]) -> int:
    """How many scales, norms and biases a model has, or a few more."""
    floats = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    shapes = shapes_of(model, schemes)
    return floats + sum(
        rows * columns // schemes[name].group_columns(columns)
        for name, (rows, columns) in shapes.items()
    )


def _trained_floats(block: nn.Module) -> int:
    """Floats a token takes while a block runs and what its gradients need is kept."""
    return 2 * sum(sum(shape_of(linear)) for linear in linears(block).values())


def input_groups(block: nn.Module) -> list[tuple[int, int]]:
    """(rows, columns) of the linears that share an input, guessed from their shapes.

    Two of one shape beside each other are gate and up; of more than two of one width, all but the
    last are q, k and v.
    """
    beside: dict[tuple[str, int], list[int]] = {}
    for name, linear in linears(block).items():
        rows, columns = shape_of(linear)
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
    widest = max(max(shape_of(m)) for m in found)
    narrowest = min(max(shape_of(m)) for m in found)
    return 4 * narrowest + 5 * widest


def hidden_bytes(model: Any, calibration: Calibration | None, method: Method) -> int:
    """Of the float model's hidden states and, where blocks learn, the quantized one's."""
    if calibration is None:
        return 0
    width = model.get_input_embeddings().weight.shape[1]
    models = 1 if method.learns is None else 2
    return 4 * models * calibration.samples * calibration.seqlen * width


def batch_tokens(calibration: Calibration, method: Method, device: torch.device) -> int:
    """Tokens of a micro-batch."""
    samples, seqlen = calibration.samples, calibration.seqlen
    learning = None if method.learns is None else method.learns.batch_tokens
    return seqlen * micro_batch(samples, seqlen, device, learning)


def inputs_bytes(model: Any, calibration: Calibration | None) -> int:
    """Disk for the inputs of all blocks that a pass backward starts from."""
    if calibration is None:
        return 0
    _, blocks = find_blocks(model)
    tokens = min(BACKWARD_TOKENS, calibration.samples * calibration.seqlen)
    return 4 * len(blocks) * tokens * int(model.get_input_embeddings().weight.shape[1])


def ram_bytes(
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
