"""Adam on the numbers of a student model, and the measurements that say which of them to keep.

    d       <- d - rate(t) * direction          (`salience.adam`)
    rate(t) =  rate * (1 + cos(pi t / steps)) / 2

A scale's rate is over the largest code L of its scheme: what counts is by how much of a step of the
grid it moves the weights. SmolLM2-135M, 128 x 512 tokens of WikiText-2, on an H100, by that step:

                                                     0.007   0.014   0.028   0.056
    w3g64 after AWQ + GPTQ, 4 passes: divergence
    held out, 0.259 before                           0.178   0.169   0.169   0.189

                                                     0.015   0.0225  0.03
    w4g64 after learned rounding, perplexity of      18.87   18.83             4 passes
    the test, 18.95 to 19.01 before                  18.85           18.82     6 passes

Between these last the divergence held out (0.0323 to 0.0332) says nothing; the learned codes have
read the text, and a longer step takes the scales further from what suits it alone.

The order of the steps is another one in each pass, from the seed alone: it can be found again from
the number of the step.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salience.adam import Adam, correction
from salience.blocks.blockwise import record_inputs
from salience.blocks.job import Job
from salience.capture import captured
from salience.learning.distillation import Tails
from salience.learning.student import FURTHEST, Student, moved_float, moved_leaf
from salience.loading import set_tensor
from salience.methods import EndToEnd
from salience.writer import to_dtype


@dataclass(frozen=True, slots=True)
class _Outside:
    """A norm or bias after the blocks: its name, as it is stored, and where its numbers are."""

    name: str
    stored: Tensor
    place: slice


class Trainer:
    """Adam on the numbers of a student, a micro-batch at a time.

    Args:
        job: with the teacher's weights of what is in no block; they become the student's.
        student: its blocks.
        tokens: [samples, seqlen].
        targets: what leaves the teacher's last block.
        settings: how.
        dtype: to compute in.
    """

    def __init__(
        self,
        job: Job,
        student: Student,
        tokens: Tensor,
        targets: Tensor,
        settings: EndToEnd,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.student = student
        self._job, self._settings, self._dtype = job, settings, dtype
        size = settings.step_samples(*tokens.shape)
        self._tokens, self._targets = tokens.split(size), targets.split(size)
        parts = len(self._tokens)
        held = max(1, parts // settings.held_out)
        self._trained, self._held = range(parts - held), range(parts - held, parts)
        self.total = settings.passes * len(self._trained)
        self._tails = self._make_tails()
        self._outside = self._find_outside()
        count = self._outside[-1].place.stop if self._outside else student.count
        self.moved = torch.zeros(count, dtype=dtype, device=job.device)
        self._adam = Adam(self.moved)
        self.best = torch.zeros_like(self.moved)
        self._rates = self._make_rates()
        self._arguments = record_inputs(
            job.skeleton, job.blocks, tokens, size, job.device, lambda _part, _hidden: None
        )
        self._part = 0
        self._hidden, self._target = (each.clone() for each in self._enter(0))
        self._gradient = torch.zeros_like(self.moved)
        self._total = torch.zeros((), dtype=torch.float64, device=job.device)
        self._find: Callable[[], None] = self._find_gradient
        if student.resident and not self._arguments.others:
            self._find = captured(self._find, [self._gradient, self._total])
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._sum = 0.0

    def _make_tails(self) -> Tails:
        """Put what the student has of its own in no block into the model."""
        model, job = self._job.skeleton, self._job
        teacher: dict[str, Tensor] = {}
        for name in job.outside:
            full = f"{name}.weight"
            teacher[full] = model.get_submodule(name).weight
        for full in teacher:
            weight = self.student.linear(full.removesuffix(".weight")).dequantize()
            set_tensor(model, full, weight)
        for name in job.parted_heads():
            teacher.setdefault(f"{name}.weight", model.get_submodule(name).weight)
        return Tails(model, job.blocks, teacher)

    def _find_outside(self) -> list[_Outside]:
        """The norms and biases in no block that the logits depend on."""
        job = self._job
        stored = {
            name: to_dtype(parameter, name, job.dtype)
            for name, parameter in job.skeleton.named_parameters()
            if parameter.ndim == 1 and not name.startswith(f"{job.prefix}.")
        }
        piece = self._targets[0][:1, :2].to(job.device, self._dtype)
        leaves = {name: value.to(self._dtype).requires_grad_() for name, value in stored.items()}
        _, _, found = self._tails.gradients(piece, piece, leaves, 1.0)
        outside, start = [], self.student.count
        for (name, value), gradient in zip(stored.items(), found, strict=True):
            if gradient is not None:
                outside.append(_Outside(name, value, slice(start, start + value.numel())))
                start += value.numel()
        return outside

    def _make_rates(self) -> Tensor:
        job, settings, student = self._job, self._settings, self.student
        rates = torch.full_like(self.moved, settings.float_rate)
        for index, slots in enumerate(student.slots):
            own = rates[student.part(index)].split([slot.shape.numel() for slot in slots])
            for slot, rate in zip(slots, own, strict=True):
                if slot.codes:
                    name = f"{job.block_name(index)}.{slot.name}"
                    rate.fill_(settings.rate / job.schemes[name].levels)
        return rates

    def advance(self) -> float:
        """One step, and a measurement where a pass begins or ends; the mean divergence of it."""
        if not self.history:
            self._measure(self.moved)
        number, at = divmod(self.step, len(self._trained))
        generator = torch.Generator().manual_seed(self._settings.seed + 2**16 * number)
        part = int(torch.randperm(len(self._trained), generator=generator)[at])
        kl, gradient = self.gradient(self._trained[part])
        if not math.isfinite(kl):
            return kl
        self.step += 1
        self._move(gradient)
        self._sum += kl
        if at == len(self._trained) - 1:
            self._measure(self.moved)
        return kl

    def _move(self, gradient: Tensor) -> None:
        done = (self.step - 1) / self.total
        rate = 0.5 * (1 + math.cos(math.pi * done)) * correction(self.step)
        self.moved.addcmul_(self._adam.direction(gradient), self._rates, value=-rate)
        self.moved.clamp_(-FURTHEST, FURTHEST)

    def gradient(self, part: int) -> tuple[float, Tensor]:
        """The mean divergence of a micro-batch, and its gradient [count], in memory used again.

        On a GPU it is one graph of thousands of small kernels, where all codes are there.
        """
        self._part = part
        for kept, new in zip((self._hidden, self._target), self._enter(part), strict=True):
            kept.copy_(new)
        self._find()
        return self._total.item() / self._tokens[part].numel(), self._gradient

    def _find_gradient(self) -> None:
        student, gradient = self.student, self._gradient.zero_()
        inputs = [self._hidden]
        for index in range(len(self._job.blocks)):
            inputs.append(self._run(index, self._part, self.moved, inputs[-1]))
        leaves = {
            each.name: self._value(each, self.moved).detach().requires_grad_()
            for each in self._outside
        }
        scale = 1 / self._tokens[0].numel()
        total, back, found = self._tails.gradients(inputs.pop(), self._target, leaves, scale)
        self._total.copy_(total)
        for each, own in zip(self._outside, found, strict=True):
            if own is not None:
                gradient[each.place] = own * each.stored.to(self._dtype).abs()
        for index in reversed(range(len(inputs))):
            place = student.part(index)
            args = self._arguments.of(index, self._part)
            back, own = student.backward(index, self.moved[place], inputs.pop(), args, back)
            gradient[place] = own

    def _run(self, index: int, part: int, moved: Tensor, hidden: Tensor) -> Tensor:
        place, args = self.student.part(index), self._arguments.of(index, part)
        return self.student.run(index, moved[place], hidden, args)

    def _enter(self, part: int) -> tuple[Tensor, Tensor]:
        """What enters the first block, and what leaves the teacher's last."""
        job, tokens = self._job, self._tokens[part]
        states: list[Tensor] = []
        record_inputs(
            job.skeleton,
            job.blocks,
            tokens,
            len(tokens),
            job.device,
            lambda _, hidden: states.append(hidden.to(self._dtype)),
        )
        return states[0], self._targets[part].to(job.device, self._dtype)

    def _value(self, each: _Outside, moved: Tensor) -> Tensor:
        return moved_leaf(each.stored, moved[each.place], self._dtype)

    def divergence(self, parts: range, moved: Tensor) -> float:
        """The mean over the tokens of some micro-batches."""
        total = 0.0
        values = {each.name: self._value(each, moved) for each in self._outside}
        for part in parts:
            hidden, target = self._enter(part)
            for index in range(len(self._job.blocks)):
                hidden = self._run(index, part, moved, hidden)
            total += self._tails.divergence(hidden, target, values).item()
        return total / sum(self._tokens[part].numel() for part in parts)

    def _measure(self, moved: Tensor) -> None:
        """Note the divergence on held-out tokens, and keep the numbers if they are the best."""
        found = self.divergence(self._held, moved)
        if self.history and not math.isfinite(found):
            return
        least = min((each["held_out"] for each in self.history), default=math.inf)
        if found < least:
            self.best.copy_(moved)
        noted: dict[str, float] = {"step": self.step, "held_out": found}
        if self.history:
            noted["trained"] = self._sum / len(self._trained)
        else:
            noted["sample"] = self.divergence(self._sample, moved)
        self.history.append(noted)
        self._sum = 0.0

    @property
    def _sample(self) -> range:
        """As many of the micro-batches that are trained on as are held out."""
        return self._trained[: len(self._held)]

    def finish(self) -> None:
        """All steps are done, or no more can be."""
        if not self.history:  # the very first was not finite
            self._measure(self.moved)
        last = self.history[-1]
        if "after" not in last:
            last["after"] = self.divergence(self._sample, self.best)

    def outside(self, moved: Tensor) -> dict[str, Tensor]:
        """What changes in no block, by the model's names."""
        made = {
            each.name: moved_float(each.stored, moved[each.place], self._dtype)
            for each in self._outside
        }
        return {
            each.name: made[each.name]
            for each in self._outside
            if not torch.equal(made[each.name], each.stored)
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the rest of the steps depends on."""
        return self._tensors(), {"step": self.step, "history": self.history, "sum": self._sum}

    def _tensors(self) -> dict[str, Tensor]:
        adam = self._adam
        return {"moved": self.moved, "mean": adam.mean, "square": adam.square, "best": self.best}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])
        self.step, self._sum = values["step"], values["sum"]
        self.history = list(values["history"])

    def record(self) -> dict[str, Any]:
        """What the report says of it."""
        first, last = self.history[0], self.history[-1]
        least = min(self.history, key=lambda each: each["held_out"])
        each = self._tokens[0].numel()
        return {
            "numbers": len(self.moved),
            "steps": self.step,
            "step_tokens": each,
            "trained_tokens": each * len(self._trained),
            "held_out_tokens": each * len(self._held),
            "held_out_before": first["held_out"],
            "held_out_after": least["held_out"],
            "trained_before": first["sample"],
            "trained_after": last["after"],
            "kept_start": least["step"] == 0,
            "history": self.history,
        }
