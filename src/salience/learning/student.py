"""A quantized model as a student: codes that stay, and beside them what can be tuned.

    weight[o, i] = scale[o, g] * (code[o, i] - zero[o, g])
    scale        = fp16(start * (1 + d))          one d for each scale
    norm, bias   = fp16(start + |start| * d)      one d for each number that a block stores float

All d of the model lie in one vector, block after block, so that an optimizer is a few operations
on it. They are relative: a scale is as likely to be a hundredth off in a layer of small weights as
in one of large ones, and one learning rate does for both. d = 0 is the start, byte for byte.

The rounding to what is stored (fp16, or bf16 of a norm) is part of the forward pass and left out
of the backward one (straight through): what is measured is what will be written.

Of a block there is as little in memory as can be: what its turn needs is made of the packed tensors
by the format's own reader, on the device, and dropped (or kept, where there is room for the codes
of all blocks at one byte each).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from salience.blocks.blockwise import Arguments
from salience.blocks.job import Job
from salience.checkpoint import Checkpoint
from salience.codebook import table
from salience.conversion import stored_module, stored_tensors
from salience.learning.finished import Finished, FinishedBlock
from salience.modules import is_transposed
from salience.qtensor import QTensor

FURTHEST = 0.5  # a scale stays between a half and one and a half of its start


@dataclass(frozen=True, slots=True)
class Slot:
    """Numbers that are tuned: the scales of a linear, or a parameter that is stored float.

    Args:
        name: in the block; of the linear, or of the parameter.
        shape: of the numbers.
        codes: whether they are scales.
    """

    name: str
    shape: torch.Size
    codes: bool


class Student:
    """The blocks of a quantized model, each of which can run with its numbers moved.

    Args:
        job: how the model was made.
        stored: what was made of the blocks, under the names they are stored by.
        resident: keep the codes of all blocks, a byte each, on the device.
        dtype: to compute in.
    """

    def __init__(
        self, job: Job, stored: Checkpoint, resident: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        self._job = job
        self._dtype = dtype
        self._finished = Finished(job, stored)
        self._kept: dict[int, FinishedBlock] = {}
        self.resident = resident
        self.slots: list[list[Slot]] = []
        self.ends = [0]
        for index in range(len(job.blocks)):
            self.slots.append(self._slots(self.block(index)))
            count = sum(slot.shape.numel() for slot in self.slots[-1])
            self.ends.append(self.ends[-1] + count)

    @property
    def count(self) -> int:
        """How many numbers of the blocks are tuned."""
        return self.ends[-1]

    def part(self, index: int) -> slice:
        """Where the numbers of a block are among those of all blocks."""
        return slice(self.ends[index], self.ends[index + 1])

    def block(self, index: int) -> FinishedBlock:
        """A block as it is stored."""
        if index in self._kept:
            return self._kept[index]
        found = self._finished.block(index)
        if self.resident:
            self._kept[index] = found
        return found

    def linear(self, name: str) -> QTensor:
        """A quantized linear or embedding by its full name."""
        return self._finished.linear(name)

    def _slots(self, block: FinishedBlock) -> list[Slot]:
        slots = [
            Slot(name, qt.scales.shape, True)
            for name, qt in block.linears.items()
            if self._holds_scales(qt)
        ]
        floats = block.floats.items()
        return slots + [Slot(name, value.shape, False) for name, value in floats if value.ndim == 1]

    def _holds_scales(self, qt: QTensor) -> bool:
        """Whether the format gives back other scales as they are, with the same codes.

        Nested scales are codes themselves, and LLM.int8's come back rounded.
        """
        if qt.nested is not None:
            return False
        moved = _with_scales(qt, rounded(qt.scales.float(), 1 + 2.0**-7, qt.scales.dtype))
        found = self._finished.reader.read(self._job.fmt.write(moved), qt.scheme)
        same = (
            torch.equal(a, b)
            for a, b in ((found.q, qt.q), (found.zeros, qt.zeros), (found.scales, moved.scales))
        )
        return found.scheme == qt.scheme and all(same)

    def _named(self, index: int, moved: Tensor) -> dict[str, Tensor]:
        """The numbers of a block by the names of its slots, in their shapes."""
        slots = self.slots[index]
        parts = moved.split([slot.shape.numel() for slot in slots])
        return {s.name: part.view(s.shape) for s, part in zip(slots, parts, strict=True)}

    def _values(self, index: int, block: FinishedBlock, moved: Tensor) -> dict[str, Tensor]:
        """Every parameter of a block with its numbers moved by `moved`, one after the other."""
        values = {}
        named = self._named(index, moved)
        for name, stored in block.floats.items():
            by = named.get(name)
            values[name] = (
                stored.to(self._dtype) if by is None else moved_leaf(stored, by, self._dtype)
            )
        for name, qt in block.linears.items():
            scales = qt.scales.to(self._dtype)
            if name in named:
                scales = rounded(scales, 1 + named[name], qt.scales.dtype)
            weight = _Dequantized.apply(scales, qt)
            linear = self._job.blocks[index].get_submodule(name)
            values[f"{name}.weight"] = weight.T if is_transposed(linear) else weight
        return values

    def run(self, index: int, moved: Tensor, hidden: Tensor, arguments: Arguments) -> Tensor:
        """The output hidden states of a block, with its numbers moved.

        Args:
            index: of the block.
            moved: of `part(index)`.
            hidden: what enters it, [batch, seqlen, ..., hidden].
            arguments: what else it is called with.
        """
        args, kwargs = arguments
        values = self._values(index, self.block(index), moved)
        block = self._job.blocks[index]
        out = functional_call(block, values, (hidden, *args), kwargs, tie_weights=False)
        return out if isinstance(out, Tensor) else out[0]

    def backward(
        self, index: int, moved: Tensor, hidden: Tensor, arguments: Arguments, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of `hidden` and of `moved` from that of the output; the block runs again.

        Args:
            index: as of `run`, and so are the next three.
            gradient: of what `run` returns.
        """
        with torch.enable_grad():
            leaf, numbers = hidden.detach().requires_grad_(), moved.detach().requires_grad_()
            out = self.run(index, numbers, leaf, arguments)
        found = torch.autograd.grad(out, [leaf, numbers], gradient, allow_unused=True)
        back, own = (
            torch.zeros_like(like) if each is None else each
            for each, like in zip(found, (leaf, numbers), strict=True)
        )
        return back, own

    @torch.no_grad()
    def tensors(self, index: int, moved: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a block that change when its numbers are moved."""
        job, name, block = self._job, self._job.block_name(index), self.block(index)
        named = self._named(index, moved)
        made: dict[str, Tensor] = {}
        for slot in self.slots[index]:
            full, by = f"{name}.{slot.name}", named[slot.name]
            if slot.codes:
                before = block.linears[slot.name]
                scales = rounded(before.scales.to(self._dtype), 1 + by, before.scales.dtype)
                module = stored_module(job.skeleton, job.weights, full)
                old, new = (
                    job.fmt.write(qt)
                    for qt in (before, _with_scales(before, scales.to(before.scales.dtype)))
                )
                changed = {k: v for k, v in new.items() if not torch.equal(v, old[k])}
                made |= {f"{module}.{local}": tensor for local, tensor in changed.items()}
            else:
                stored = block.floats[slot.name]
                value = moved_float(stored, by, self._dtype)
                if not torch.equal(value, stored):
                    made |= stored_tensors(job.skeleton, job.weights, full, value)
        return made


def moved_float(stored: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """A norm's weight or a bias, moved and as it is stored then."""
    return moved_leaf(stored, by, dtype).to(stored.dtype)


def moved_leaf(stored: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """`moved_float` in `dtype`, with a gradient."""
    start = stored.to(dtype)
    value: Tensor = _Rounded.apply(start + start.abs() * by, stored.dtype)
    return value


def rounded(start: Tensor, factor: Tensor | float, stored: torch.dtype) -> Tensor:
    """Scales times a factor, rounded to what is stored, and never to 0."""
    value: Tensor = _Rounded.apply(start * factor, stored)
    return torch.where(value == 0, start, value)


def _with_scales(qt: QTensor, scales: Tensor) -> QTensor:
    return QTensor(qt.q, scales.to(qt.scales.dtype), qt.zeros, qt.scheme, qt.g_idx)


class _Rounded(torch.autograd.Function):
    """Rounding to a narrower dtype, and a gradient as if there were none."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Dequantized(torch.autograd.Function):
    """The weight of codes and scales; what is kept for the backward pass are codes of a byte."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, qt: QTensor) -> Tensor:
        ctx.qt = qt
        steps = _steps(qt, scales.dtype)
        if qt.g_idx is not None:
            return steps.mul_(scales[:, qt.g_idx.long()])
        return steps.unflatten(1, (scales.shape[1], -1)).mul_(scales[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        qt, [weight] = ctx.qt, gradients
        found = _steps(qt, weight.dtype).mul_(weight)
        if qt.g_idx is None:
            return found.unflatten(1, (qt.scales.shape[1], -1)).sum(-1), None
        sums = torch.zeros(qt.scales.shape, dtype=weight.dtype, device=weight.device)
        return sums.index_add_(1, qt.g_idx.long(), found), None


def _steps(qt: QTensor, dtype: torch.dtype) -> Tensor:
    """What each scale is multiplied by, [out, in]."""
    if qt.scheme.codebook is not None:
        return table(qt.scheme.codebook, qt.q.device)[qt.q.int()].to(dtype)
    if qt.g_idx is not None:
        return qt.q.to(dtype).sub_(qt.zeros.to(dtype)[:, qt.g_idx.long()])
    steps = qt.q.to(dtype).unflatten(1, (qt.zeros.shape[1], -1))
    return steps.sub_(qt.zeros.to(dtype)[..., None]).flatten(1)
