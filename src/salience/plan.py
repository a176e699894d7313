"""Before anything runs: what a quantization will take, from the config and the headers alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salience.calibration import Calibration
from salience.checkpoint import Checkpoint
from salience.errors import SalienceError
from salience.formats import Format
from salience.machine import available_ram_bytes, free_disk_bytes, matmul_flops, peak_rss_bytes
from salience.scheme import Scheme, fitting_group_sizes
from salience.source import Source
from salience.structure import find_blocks, linears, weight_of

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
SHARD_BYTES = 2**29
_FLOAT_BYTES = 2  # what is not quantized is written in fp16
_TOKENIZER_BYTES = 2500  # for each entry of the vocabulary
# Candidates of the scale and the clip search of AWQ, and the time one takes for a weight beside
# its share of the products; from a profile of SmolLM2.
_SCALE_CANDIDATES = 13
_CLIP_CANDIDATES = 33
_SECONDS_PER_CANDIDATE = {"cpu": 4e-9, "cuda": 1.3e-9}


@dataclass(frozen=True, slots=True)
class Plan:
    """What `quantize` will need.

    Args:
        bits_per_weight: of the quantized linears.
        disk_bytes: of the checkpoint to write.
        ram_bytes: peak resident memory.
        vram_bytes: peak GPU memory, 0 on CPUs.
        seconds: by phase.
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
    ram_bytes: int
    vram_bytes: int
    seconds: dict[str, float]
    fits: bool
    advice: list[str]


def make_plan(
    source: Source,
    scheme: Scheme,
    fmt: Format,
    calibration: Calibration | None,
    method: str,
    device: torch.device,
    out: Path,
) -> Plan:
    """Estimate a quantization; `calibration` is None for a method that looks at no text.

    Raises:
        SalienceError: a source that cannot be quantized, or a scheme that the model or the format
            cannot have.
    """
    model = source.skeleton()
    _, blocks = find_blocks(model)
    weights = source.weights(model)
    check_source(source, model, weights)
    check_scheme(model, scheme, fmt)
    names = {name for name, _ in model.named_parameters()} & weights.names()
    disk = checkpoint_bytes(model, scheme)
    source_bytes = sum(weights.nbytes(name) for name in names)
    memory = _memory(model, blocks, calibration, device, disk)
    ram = peak_rss_bytes() + (memory if device.type == "cpu" else min(SHARD_BYTES, disk))
    if source.is_gguf:
        ram += source_bytes  # the file stays mapped, so what was read of it counts
    vram = memory if device.type == "cuda" else 0
    advice = []
    if ram > available_ram_bytes():
        advice.append("RAM is short: use fewer --samples, a shorter --seqlen, or a larger machine")
    if vram and vram > torch.cuda.mem_get_info(device)[0]:
        advice.append("GPU memory is short: use fewer --samples, or --device cpu")
    if disk > free_disk_bytes(out):
        advice.append(f"the disk of {out} is short by {disk - free_disk_bytes(out)} bytes")
    quantized = sum(weight_of(linear).numel() for linear in linears(blocks).values())
    return Plan(
        model=source.name,
        scheme=str(scheme),
        method=method,
        device=str(device),
        parameters=sum(p.numel() for p in model.parameters()),
        quantized_parameters=quantized,
        bits_per_weight=mean_bits(blocks, scheme),
        source_bytes=source_bytes,
        disk_bytes=disk,
        ram_bytes=ram,
        vram_bytes=vram,
        seconds=_seconds(blocks, scheme, calibration, device),
        fits=not advice,
        advice=advice,
    )


def check_source(source: Source, model: nn.Module, weights: Checkpoint) -> None:
    """Refuse a source that is quantized already or lacks a tensor of `model`.

    Raises:
        SalienceError: naming the tensor.
    """
    if getattr(source.config, "quantization_config", None):
        raise SalienceError(f"{source.name} is quantized already; start from the float model")
    missing = {name for name, _ in model.named_parameters()} - weights.names()
    if missing:
        raise SalienceError(f"tensor {min(missing)} is missing from {weights.path}")


def check_scheme(model: nn.Module, scheme: Scheme, fmt: Format) -> None:
    """Refuse a scheme that does not fit the linears or the format.

    Raises:
        SalienceError: naming a linear and the group sizes that would fit.
    """
    prefix, blocks = find_blocks(model)
    shapes = {
        f"{prefix}.{name}": (weight_of(linear).shape[0], weight_of(linear).shape[1])
        for name, linear in linears(blocks).items()
    }
    fmt.check(dict.fromkeys(shapes, scheme), shapes)
    for name, (_, columns) in shapes.items():
        if columns % scheme.group_columns(columns):
            fit = fitting_group_sizes({columns for _, columns in shapes.values()})
            better = ", ".join(f"w{scheme.bits}g{size}" for size in fit) or "none of the usual ones"
            raise SalienceError(
                f"group size {scheme.group_size} does not divide the {columns} inputs of "
                f"{name}; schemes that fit this model: {better}"
            )


def mean_bits(blocks: nn.ModuleList, scheme: Scheme) -> float:
    """Stored bits a quantized weight, scales and zeros included."""
    found = linears(blocks).values()
    bits = sum(weight_of(m).numel() * scheme.bits_per_weight(weight_of(m).shape[1]) for m in found)
    return bits / sum(weight_of(m).numel() for m in found)


def checkpoint_bytes(model: Any, scheme: Scheme) -> int:
    """Size of the written checkpoint."""
    _, blocks = find_blocks(model)
    quantized = sum(weight_of(linear).numel() for linear in linears(blocks).values())
    others = sum(p.numel() for p in model.parameters()) - quantized
    return round(quantized * mean_bits(blocks, scheme) / 8) + others * _FLOAT_BYTES


def _memory(
    model: Any,
    blocks: nn.ModuleList,
    calibration: Calibration | None,
    device: torch.device,
    disk: int,
) -> int:
    """Peak bytes of tensors: the larger of reading the embeddings and working on a block."""
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    found = linears(blocks[0]).values()
    widest = max(weight_of(m).numel() for m in found)
    embedding = model.get_input_embeddings().weight
    waiting = min(SHARD_BYTES, disk)
    # Written last, with what waits for it: the embeddings in fp32 and fp16.
    rest = 6 * embedding.numel()
    if calibration is None:
        return max(4 * (largest + 6 * widest), rest) + waiting
    hidden = calibration.samples * calibration.seqlen * embedding.shape[1]
    moments = sum({k: k**2 for k in (weight_of(m).shape[1] for m in found)}.values()) * 2
    tokens = MICRO_BATCH_TOKENS[device.type]
    activations = tokens * 6 * max(max(weight_of(m).shape) for m in found)
    block = 4 * (largest + moments + 6 * widest + activations)
    first = 4 * (embedding.numel() + hidden)  # while the parts of the hidden states are joined
    tokenizer = _TOKENIZER_BYTES * embedding.shape[0]
    return tokenizer + 4 * hidden + max(first, block + waiting, rest + waiting)


def _seconds(
    blocks: nn.ModuleList, scheme: Scheme, calibration: Calibration | None, device: torch.device
) -> dict[str, float]:
    flops = matmul_flops(device)
    each = _SECONDS_PER_CANDIDATE[device.type]
    found = linears(blocks).values()
    count = sum(weight_of(m).numel() for m in found)
    if calibration is None:
        return {"search": 4 * each * count}
    tokens = calibration.samples * calibration.seqlen
    inputs = sum(weight_of(m).shape[1] ** 2 for m in found)
    statistics = 2 * tokens * (count + inputs) / flops
    products = sum(weight_of(m).numel() * weight_of(m).shape[1] for m in found)
    groups = sum(weight_of(m).numel() * scheme.group_columns(weight_of(m).shape[1]) for m in found)
    search = 2 * (_SCALE_CANDIDATES + 4) * products / flops + 2 * _CLIP_CANDIDATES * groups / flops
    search += each * count * (_SCALE_CANDIDATES + _CLIP_CANDIDATES)
    return {"statistics": statistics, "search": search}
