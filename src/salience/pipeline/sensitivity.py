"""How much the model loses when a linear is coded in fewer bits.

The loss is the divergence of the model's predictions, KL(float || coded), a token. To second order
it is half of d^T F d, where d is the change of the logits and F = diag(p) - p p^T their Fisher
information. A change e = (W' - W) x of the output of one linear reaches the logits through the rest
of the model, a Jacobian J, so that

    KL = 1/2 E[e^T J^T F J e]

Nothing of the size of J is needed. For a random v of covariance F,

    v = sqrt(p) * n - p <sqrt(p), n>,   n standard normal,

one backward pass from v gives g = J^T v at the output of every linear of the model, for all tokens
at once, and E[g g^T] = J^T F J. Of that the squares are kept, as a product of what a row counts and
what a token counts: the first token of a text, say, to which later ones look, is many times as dear
as others where keys are made, and its input is like no other's. With n tokens and G the sum of all
squares,

    a_r = 1/n sum_t g_tr^2        w_t = n/G sum_r g_tr^2        H_w = 1/n sum_t w_t x_t x_t^T

    cost(linear, b) = 1/2 sum over rows r of  a_r (W'_b - W)_r H_w (W'_b - W)_r^T

in nats a token. W'_b is what the method itself makes of the weight in b bits, with its scales,
grids and codes: a better method loses less, and not in proportion (SmolLM2-135M at groups of 64,
the sum over all linears at 2, 3 and 4 bits: 3.0, 0.91 and 0.23 rounded to nearest, 1.1, 0.28 and
0.076 by GPTQ).

It takes three passes over the blocks: one forward and one backward, over the first few thousand
tokens of the calibration text; then the method's own over all of it, in which each block is solved
in every width, and its few thousand inputs are seen again. One block is in memory at a time, as in
the work that follows.

What is left out: errors of different rows, tokens and linears that add up or cancel, and all that
is not small. The sum over all linears is below what the model loses, the more so the fewer the bits
(with GPTQ's codes 0.10 of 0.10 nats at four, 0.35 of 0.40 at three, 1.2 of 1.8 at two).
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from salience.blocks.block import LoadedBlock, row_errors, solve, unfolded
from salience.blocks.blockwise import (
    BACKWARD_TOKENS,
    Arguments,
    BlockArguments,
    logits_of,
    micro_batch,
    observe,
    record_inputs,
    run_block,
)
from salience.blocks.job import Job
from salience.blocks.journal import Journal
from salience.blocks.outside import embeddings_loaded
from salience.errors import SalienceError
from salience.machine import fast_matmul, release_memory
from salience.modules import shape_of
from salience.pipeline.engine import Gathered, gather
from salience.serving import FUSED
from salience.stats import SecondMoment
from salience.structure import restore
from salience.writer import write_tensors


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Linears that get one width, and what each width costs.

    Args:
        names: full names; runtimes fuse those that share an input into one linear.
        costs: nats a token by bits.
    """

    names: tuple[str, ...]
    costs: dict[int, float]


@dataclass(frozen=True, slots=True)
class Curvature:
    """What a squared error at the output of a linear costs: by row, and by token.

    Args:
        rows: E[g_r^2], fp64 [out]; the mean is over the tokens of the text.
        tokens: w_t, fp32, mean 1, of each token that the linear sees, in the order it sees them.
    """

    rows: Tensor
    tokens: Tensor


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
    with job.phase("sensitivity"):
        arguments, last = _forward(job, journal, tokens[: parts * batch], batch)
        with torch.enable_grad():
            curvature = _output_curvature(job, journal, arguments, last)
    last.clear()
    found: list[Sensitivity] = []
    # Nothing is learned for this; what the method codes is near enough.
    solving = replace(job, method=replace(job.method, learns=None, end_to_end=None))
    blocks = len(job.blocks)
    for index, each in enumerate(gather(solving, journal, tokens, on_disk, parts)):
        job.progress("sensitivity", 2 * blocks + index, 3 * blocks)
        with job.phase("sensitivity"):
            weighted = _weighted(each, curvature)
            costs = _costs(solving, each.block, weighted, curvature)
        for names in _units(job, each.block):
            widths = set.intersection(*(set(costs[name]) for name in names))
            sums = {b: sum(costs[name][b] for name in names) for b in sorted(widths)}
            found.append(Sensitivity(names, sums))
        journal.forget_hidden(each.hidden.index)
        release_memory()
    return found


def _forward(
    job: Job, journal: Journal, tokens: Tensor, batch: int
) -> tuple[BlockArguments, list[Tensor]]:
    """Run the blocks, keeping what enters each in the journal.

    Returns what each is called with beside that, and what leaves the last by micro-batch.
    """
    hidden: list[Tensor] = []
    with embeddings_loaded(job):
        arguments = record_inputs(
            job.skeleton, job.blocks, tokens, batch, job.device, lambda _, part: hidden.append(part)
        )
    for index in range(len(job.blocks)):
        job.progress("sensitivity", index, 3 * len(job.blocks))
        _save(_file(journal, index), hidden)
        with job.loaded(index) as block, fast_matmul():
            hidden = [run_block(block, x, arguments.of(index, i)) for i, x in enumerate(hidden)]
        release_memory()
    return arguments, hidden


def _output_curvature(
    job: Job, journal: Journal, arguments: BlockArguments, last: list[Tensor]
) -> dict[str, Curvature]:
    """What errors at the output of each linear in the blocks cost.

    Args:
        journal: has what `_forward` kept, which goes as it is read.
        arguments: as of `_forward`, and so is `last`.

    Raises:
        SalienceError: naming a linear whose gradients are not finite.
    """
    with embeddings_loaded(job, head=True):
        gradients = _head_gradients(job, last)
    count = sum(hidden.shape[0] * hidden.shape[1] for hidden in last)
    found: dict[str, Curvature] = {}
    blocks = len(job.blocks)
    for index in range(blocks - 1, -1, -1):
        job.progress("sensitivity", 2 * blocks - 1 - index, 3 * blocks)
        name = job.block_name(index)
        wanted = [n.removeprefix(f"{name}.") for n in job.options if n.startswith(f"{name}.")]
        rows: dict[str, Tensor] = {}
        seen: dict[str, list[Tensor]] = {}
        with job.loaded(index) as block:
            for part, entering in enumerate(_inputs(job, journal, index)):
                gradients[part], squares = _backward(
                    block, wanted, entering, arguments.of(index, part), gradients[part]
                )
                for local, of_rows, of_tokens in squares:
                    rows[local] = rows.get(local, 0) + of_rows
                    seen.setdefault(local, []).append(of_tokens)
            for local in wanted:
                out, _ = shape_of(block.get_submodule(local))
                of_rows = rows.get(local, torch.zeros(out, dtype=torch.float64)) / count
                of_tokens = torch.cat(seen.get(local, [torch.zeros(0, device=job.device)]))
                if not torch.isfinite(of_rows).all():
                    raise SalienceError(
                        f"gradients at {name}.{local} are not finite on the calibration text; "
                        "quantize without --target-bits"
                    )
                of_tokens /= of_tokens.mean().clamp(min=1e-30) if len(of_tokens) else 1.0
                found[f"{name}.{local}"] = Curvature(of_rows, of_tokens)
        release_memory()
    return found


def _backward(
    block: nn.Module, names: list[str], hidden: Tensor, arguments: Arguments, gradient: Tensor
) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
    """The gradient at a block's input, and the squares of those at its linears' outputs: for each
    call the sums of its rows, fp64 [out], and of its tokens.
    """
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
    asked = [out for _, out in outputs if out.requires_grad]
    entering, *inner = torch.autograd.grad(result, [hidden, *asked], gradient, allow_unused=True)
    gradients = iter(inner)
    squares = []
    for name, out in outputs:
        g = next(gradients) if out.requires_grad else None
        flat = (torch.zeros_like(out) if g is None else g).flatten(0, -2)
        square = flat.square()
        squares.append((name, square.sum(0).double().cpu(), square.sum(1)))
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


def _weighted(found: Gathered, curvature: dict[str, Curvature]) -> dict[str, SecondMoment]:
    """The moments of the input of each linear of a block, each token with its weight."""
    block = found.block
    names = [n for group in block.structure.groups for n in group if block.full(n) in curvature]
    moments: dict[str, SecondMoment] = {}
    left: dict[str, Tensor] = {}
    for name in names:
        _, columns = shape_of(block.module.get_submodule(name))
        weights = curvature[block.full(name)].tokens
        moments[name] = SecondMoment.empty(columns, weights.device)
        left[name] = weights.sqrt()

    def add(name: str, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        weights, left[name] = left[name].split([len(flat), len(left[name]) - len(flat)])
        moments[name].update(flat * weights[:, None])

    with fast_matmul():
        for hidden, arguments in zip(found.inputs, found.arguments, strict=True):
            observe(block.module, names, partial(run_block, block.module, hidden, arguments), add)
    return moments


def _costs(
    job: Job,
    block: LoadedBlock,
    moments: dict[str, SecondMoment],
    curvature: dict[str, Curvature],
) -> dict[str, dict[int, float]]:
    """Nats a token, by bits, of each linear of a block, solved in one width after the other."""
    options = {
        block.full(name): {s.bits: s for s in job.options[block.full(name)]} for name in moments
    }
    found: dict[str, dict[int, float]] = {name: {} for name in options}
    saved = unfolded(block)
    for bits in sorted({b for schemes in options.values() for b in schemes}):
        of_width = {name: schemes[bits] for name, schemes in options.items() if bits in schemes}
        schemes = {**job.schemes, **of_width}
        [solved] = solve([block], job.method, schemes.get, job.method.trusted)
        for name, moment in moments.items():
            full = block.full(name)
            if full in of_width:
                rows = row_errors(block, solved, name, moment.second).double().cpu()
                found[full][bits] = float(0.5 * (curvature[full].rows * rows).sum())
        restore(saved)
    return found


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
