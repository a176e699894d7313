"""How much the model loses when a linear is coded in fewer bits.

The loss is the divergence of the model's predictions, KL(float || coded), a token. To second order
it is half of d^T F d, where d is the change of the logits and F = diag(p) - p p^T their Fisher
information. A change e = (W' - W) x of the output of one linear reaches the logits through the rest
of the model, a Jacobian J, so that

    KL = 1/2 E[e^T J^T F J e]

Nothing of the size of J is needed. For a random v of covariance F,

    v = sqrt(p) * n - p <sqrt(p), n>,   n standard normal,

one backward pass from v gives g = J^T v at the output of every linear of the model, for all tokens
at once, and E[g g^T] = J^T F J. Of that matrix the diagonal is kept: what one unit of squared error
in an output row costs. With the error that coding in b bits leaves in that row, which the second
moment H of the input gives for any weight,

    cost(linear, b) = 1/2 sum over rows r of  E[g_r^2] (W'_b - W)_r H (W'_b - W)_r^T

in nats a token. W'_b is rounded to nearest, each group in the best of a few ranges (`row_errors`):
what the method itself would make of it has a smaller error in all linears and widths, and is a
hundred times the work.

It takes two passes over the blocks: one forward, over the whole calibration text, in which each
block is rounded in every width; one backward, over its first few thousand tokens, in which each
block is run again from the inputs that the first pass left on the disk. One block is in memory at a
time, as in the work that follows.

What is left out: errors of different rows, tokens and linears that add up or cancel, and all that
is not small. At two bits the sum is an estimate of the order of magnitude, and what counts is the
order of the linears.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from salience import grid
from salience.blocks.block import LoadedBlock
from salience.blocks.blockwise import (
    BACKWARD_TOKENS,
    Arguments,
    logits_of,
    micro_batch,
    run_block,
)
from salience.blocks.job import Job
from salience.blocks.journal import Journal
from salience.blocks.outside import embeddings_loaded
from salience.errors import SalienceError
from salience.machine import release_memory
from salience.methods.base import no_scales
from salience.pipeline.engine import gather
from salience.scheme import Scheme
from salience.serving import FUSED
from salience.stats import output_error
from salience.structure import weight_of
from salience.writer import write_tensors

_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Linears that get one width, and what each width costs.

    Args:
        names: full names; runtimes fuse those that share an input into one linear.
        costs: nats a token by bits.
    """

    names: tuple[str, ...]
    costs: dict[int, float]


def measure(job: Job, journal: Journal, tokens: Tensor, on_disk: bool) -> list[Sensitivity]:
    """The cost of each width of each group of linears in the blocks.

    Args:
        job: `job.options` has the schemes to try on each linear; the others are coded by
            `job.schemes`.
        journal: where inputs of blocks, and hidden states, go in the meantime.
        tokens: calibration token ids [samples, seqlen].
        on_disk: keep the hidden states on the disk.

    Raises:
        SalienceError: gradients that are not finite, or what `run_blocks` refuses.
    """
    samples, seqlen = tokens.shape
    batch = micro_batch(samples, seqlen, job.device)
    parts = max(1, min(BACKWARD_TOKENS // (batch * seqlen), samples // batch))
    errors: dict[str, dict[int, Tensor]] = {}
    groups: list[tuple[str, ...]] = []
    arguments: list[list[Arguments]] = []
    hidden = None
    # No folds to look for, and nothing to learn yet.
    plain = replace(job, method=replace(job.method, scales=no_scales, learns=None, end_to_end=None))
    for index, found in enumerate(gather(plain, journal, tokens, on_disk, parts)):
        job.progress("sensitivity", index, 2 * len(job.blocks))
        with job.phase("sensitivity"):
            _save(_file(journal, index), found.inputs)
            errors |= _row_errors(job, found.block)
        groups += _units(job, found.block)
        arguments.append(found.arguments)
        hidden = found.hidden
        journal.forget_hidden(hidden.index)
        release_memory()
    if hidden is None:
        return []
    last = [hidden.get(part).clone() for part in range(parts)]
    with job.phase("sensitivity"), torch.enable_grad():
        curvature = output_curvature(
            job, arguments, last, lambda index: _inputs(job, journal, index)
        )
    found_groups = []
    for names in groups:
        widths = {s.bits for s in job.options[names[0]]}.intersection(
            *({s.bits for s in job.options[name]} for name in names)
        )
        costs = {
            bits: sum(float(0.5 * (curvature[name] * errors[name][bits]).sum()) for name in names)
            for bits in sorted(widths)
        }
        found_groups.append(Sensitivity(names, costs))
    return found_groups


def output_curvature(
    job: Job,
    arguments: list[list[Arguments]],
    last: list[Tensor],
    inputs: Callable[[int], list[Tensor]],
) -> dict[str, Tensor]:
    """E[g_r^2] of each output row of each linear in the blocks, fp64 [out], a token.

    Args:
        arguments: of each block, for each micro-batch.
        last: hidden states that leave the last block, by micro-batch.
        inputs: gives the hidden states that enter a block, by micro-batch.

    Raises:
        SalienceError: naming a linear whose gradients are not finite.
    """
    with embeddings_loaded(job, head=True):
        gradients = _head_gradients(job, last)
    count = sum(hidden.shape[0] * hidden.shape[1] for hidden in last)
    found: dict[str, Tensor] = {}
    blocks = len(job.blocks)
    for index in range(blocks - 1, -1, -1):
        job.progress("sensitivity", 2 * blocks - 1 - index, 2 * blocks)
        name = job.block_name(index)
        wanted = [n.removeprefix(f"{name}.") for n in job.options if n.startswith(f"{name}.")]
        with job.loaded(index) as block:
            for part, entering in enumerate(inputs(index)):
                gradients[part], squares = _backward(
                    block, wanted, entering, arguments[index][part], gradients[part]
                )
                for local, square in squares.items():
                    full = f"{name}.{local}"
                    found[full] = found.get(full, torch.zeros_like(square)) + square / count
        release_memory()
    for name, value in found.items():
        if not torch.isfinite(value).all():
            raise SalienceError(
                f"gradients at {name} are not finite on the calibration text; "
                "quantize without --target-bits"
            )
    return found


def _backward(
    block: nn.Module, names: list[str], hidden: Tensor, arguments: Arguments, gradient: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient at a block's input, and the sums of squares of those at its linears' outputs."""
    outputs: list[tuple[str, Tensor]] = []

    def note(_module: nn.Module, _args: object, out: Tensor, name: str) -> None:
        outputs.append((name, out))

    handles = [
        block.get_submodule(name).register_forward_hook(partial(note, name=name)) for name in names
    ]
    try:
        hidden = hidden.detach().requires_grad_()
        result = run_block(block, hidden, arguments)
    finally:
        for handle in handles:
            handle.remove()
    outputs = [(name, out) for name, out in outputs if out.requires_grad]
    wanted = [hidden, *(out for _, out in outputs)]
    entering, *inner = torch.autograd.grad(result, wanted, gradient, allow_unused=True)
    squares: dict[str, Tensor] = {}
    for (name, out), g in zip(outputs, inner, strict=True):
        rows = torch.zeros(out.shape[-1], dtype=torch.float64)
        if g is not None:
            rows = g.flatten(0, -2).square().sum(0).double().cpu()
        squares[name] = squares.get(name, 0) + rows
    for name in names:
        squares.setdefault(
            name, torch.zeros(weight_of(block.get_submodule(name)).shape[0], dtype=torch.float64)
        )
    return torch.zeros_like(hidden) if entering is None else entering, squares


def _head_gradients(job: Job, last: list[Tensor]) -> list[Tensor]:
    """The gradients at the output of the last block, of a random direction of the logits."""
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for states in last:
        gradients: list[Tensor] = []
        for one in states.split(1):  # logits are wide
            hidden = one.detach().requires_grad_()
            logits = logits_of(job.skeleton, job.blocks, hidden, {})
            direction = fisher_direction(logits.detach(), generator)
            gradients += torch.autograd.grad(logits, [hidden], direction)
        found.append(torch.cat(gradients))
    return found


def fisher_direction(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A random vector for each token, of covariance diag(p) - p p^T, p = softmax(logits)."""
    root = logits.softmax(-1).sqrt()
    normal = torch.randn(logits.shape, generator=generator).to(logits.device)
    return root * (normal - root * (root * normal).sum(-1, keepdim=True))


def _row_errors(job: Job, block: LoadedBlock) -> dict[str, dict[int, Tensor]]:
    """The output error of each row, fp64 [out], of each linear in each of its widths."""
    found: dict[str, dict[int, Tensor]] = {}
    for group in block.structure.groups:
        second = block.moments[group[0]].second
        for name in group:
            weight = weight_of(block.module.get_submodule(name))
            found[block.full(name)] = {
                scheme.bits: row_errors(weight, second, scheme).double().cpu()
                for scheme in job.options.get(block.full(name), ())
            }
    return found


def row_errors(weight: Tensor, second: Tensor, scheme: Scheme) -> Tensor:
    """The output error of each row of a weight [out, in] in a scheme.

    Each group's range is narrowed by the ratio of the least sum of H_jj e_j^2; codes are the
    nearest.

    Args:
        second: H of the input, [in, in].
    """
    groups = grid.grouped(weight.float(), scheme)
    lo, hi = grid.value_range(weight.float(), scheme)
    importance = grid.grouped(second.diagonal()[None], scheme)
    best = left = None
    for ratio in _RATIOS:
        made = grid.make_grid(ratio * lo, ratio * hi, scheme)
        error = grid.snap(groups, made).sub_(groups)
        cost = (error.square() * importance).sum(-1, keepdim=True)
        if best is None or left is None:
            best, left = cost, error
        else:
            left = torch.where(cost < best, error, left)
            best = torch.minimum(cost, best)
    return output_error(torch.zeros_like(weight) if left is None else left.flatten(-2), second)


def _units(job: Job, block: LoadedBlock) -> list[tuple[str, ...]]:
    """Linears that get one width: those that share an input, and those that runtimes fuse."""
    units: list[list[str]] = []
    fused = [set(parts) for parts in FUSED.values()]
    for group in block.structure.groups:
        names = [block.full(name) for name in group if block.full(name) in job.options]
        for unit in units if names else ():
            if any(_same_owner(a, b, fused) for a in unit for b in names):
                unit += names
                break
        else:
            units += [names] if names else []
    return [tuple(unit) for unit in units]


def _same_owner(a: str, b: str, fused: list[set[str]]) -> bool:
    (owner, _, leaf), (other, _, other_leaf) = a.rpartition("."), b.rpartition(".")
    return owner == other and any({leaf, other_leaf} <= parts for parts in fused)


def _file(journal: Journal, index: int) -> Path:
    return journal.folder / f"inputs-{index:05d}.safetensors"


def _save(path: Path, parts: list[Tensor]) -> None:
    write_tensors(path, {str(i): part.cpu().contiguous() for i, part in enumerate(parts)}, {})


def _inputs(job: Job, journal: Journal, index: int) -> list[Tensor]:
    """The saved inputs of a block; the file goes when they are read."""
    path = _file(journal, index)
    with safe_open(path, framework="pt") as file:
        found = [file.get_tensor(str(i)).to(job.device) for i in range(len(file.keys()))]
    path.unlink()
    return found
