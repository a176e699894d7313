"""Before anything runs: what a quantization will take, from the config and the headers alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from salience.blocks.blockwise import BACKWARD_TOKENS
from salience.blocks.job import Job
from salience.calibration import Calibration
from salience.errors import DoesNotFitError
from salience.machine import available_ram_bytes, free_disk_bytes, peak_rss_bytes
from salience.methods import Method
from salience.modules import shapes_of
from salience.planning.bytes import (
    VECTORS,
    checkpoint_bytes,
    device_memory,
    hidden_bytes,
    inputs_bytes,
    job_bits,
    ram_bytes,
    tuned_numbers,
)
from salience.planning.seconds import seconds_of
from salience.scheme import Scheme
from salience.source import Source

_CLOSE = 0.8  # of the memory there is: from here on a rehearsal comes first


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
        hidden = hidden_bytes(model, calibration, method)
        budget, advice = Budget(True, True, hidden), [str(error)]
    temporary = disk + budget.temporary_bytes
    if disk + temporary > free_disk_bytes(out):
        short = disk + temporary - free_disk_bytes(out)
        advice.append(f"the disk of {out} is short by {short / 2**20:.0f} MiB; name another --out")
    memory = device_memory(model, schemes, calibration, method, device, budget.on_disk, backward)
    shapes = shapes_of(model, schemes)
    on_gpu = device.type == "cuda"
    seconds = seconds_of(model, schemes, calibration, method, device, source_bytes)
    if job.target_bits is not None:
        # Read three times, observed once more and solved in every width; a few tokens are run
        # before, back, which costs three times as much, and once again.
        tokens = calibration.samples * calibration.seqlen if calibration is not None else 1
        part = min(1.0, BACKWARD_TOKENS / tokens)
        seconds["sensitivity"] = 3 * seconds["read"] + (1 + 5 * part) * seconds["statistics"]
        seconds["sensitivity"] += max(map(len, job.options.values())) * seconds["search"]
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
        ram_bytes=ram_bytes(source, model, memory, device, calibration),
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
        backward: whether blocks are run backward, too, as `salience.pipeline.sensitivity` does.

    Raises:
        DoesNotFitError: the work needs more than there is even if they stay on the disk.
    """
    needs = []
    for on_disk in (False, True):
        memory = device_memory(model, schemes, calibration, method, device, on_disk, backward)
        if device.type == "cuda":
            needs.append(max(memory.values()))
        else:
            needs.append(ram_bytes(source, model, memory, device, calibration))
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
    temporary = 2 * hidden_bytes(model, calibration, method)
    if backward:
        temporary += inputs_bytes(model, calibration)
    if method.end_to_end is not None:
        temporary += hidden_bytes(model, calibration, replace(method, learns=None))
        temporary += 4 * VECTORS * tuned_numbers(model, schemes)
    return Budget(on_disk, need > _CLOSE * cap, temporary)


def _memory_cap(device: torch.device) -> int:
    """Bytes this process may have on the device, what it has included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return available_ram_bytes() + peak_rss_bytes()
