"""Learned rounding: codes and ranges of a whole block, moved by gradient towards its float output.

The closed forms (AWQ, GPTQ) make each linear's output right on float inputs. What counts is the
output of the whole block, behind softmax, gate and norm, on the inputs it will really get, which
come from quantized blocks. Nothing says in closed form which way to round for that; a gradient does
(Cheng et al., arXiv 2309.05516). With w the weight as a value that is still to be rounded and L the
largest code, each weight has an offset v, each group two factors a and b of its range:

    lo = lo_0 (1 + a)        scale = fp16((hi - lo) / L)
    hi = hi_0 (1 + b)        zero  = round(-lo / scale)
    step  = clamp(round(w / scale + v), -zero, L - zero)         code = step + zero
    value = step * scale

so that at every moment the weight is one that the checkpoint can hold, bit for bit. Rounding passes
the gradient on as if it were not there (straight-through), which with g the gradient of the value,
and sums over a group, comes to

    dv = g scale                                 of the steps that are not clamped
    dlo = sum of g, clamped low                - 1/L sum of g (step - w / scale), not clamped
    dhi = sum of g, clamped high               + 1/L sum of g (step - w / scale), not clamped

Start. The ranges lo_0 and hi_0 are those of the grids that were searched, and w is the float weight
moved just so far that it rounds to the codes of the start (GPTQ's): at most 0.49 of a step beside
the code, on the float weight's side of it. With v = a = b = 0 the block is then exactly the start,
and a small offset goes first to the weights that were nearly rounded the other way.

Loss. The squared difference from the float block's output on float inputs, relative to the square
of that output, token by token: a norm ends the model, and a few tokens are far longer than the
others. It is taken on micro-batches of the calibration text, some of which are never trained on. On
these it is measured now and then, and the best state is kept; a block that is not better there than
its start keeps its start, bit for bit. The start must not know them either: the error of GPTQ's
codes is 8 % lower on the text that its second moments are of.

Settings, by the mean squared error on tokens held out after 100 iterations, that of the start being
1 (first block of SmolLM2-135M, 112 x 256 tokens of WikiText-2, 1024 an iteration, on a CPU):

                                            rates of offsets, ranges
    w3g64  sign of the gradient             0.0025, 0.0025            0.87
           (AutoRound's way)                0.005,  0.001             0.84
           Adam                             0.002,  0.0005            0.75
                                            0.005,  0.0005            0.74
                                            0.003,  0.0001            0.77
                                            0.002,  0.002             0.84
           w at the start's code itself     0.005,  0.0005            1.16
    w4g64  Adam, 60 iterations              0.003,  0.0005            0.81
    w2g64  Adam, 60 iterations              0.003,  0.0005            0.79

The relative loss (0.003, 0.0003) ended with less of both errors than the plain one at any of these
rates: on the last sequences 0.0374 against 0.0377 plain, 0.0069 against 0.0074 relative. A text of
20 x 256 tokens is learned by heart: at no rate did the loss held out fall by more than 2 %.
"""

import torch
from torch import Tensor

from salience.adam import Adam
from salience.qtensor import QTensor

_WIDEST = 0.5  # by how much a range may grow or shrink
_BESIDE = 0.49  # of a step: how far from the start's code the value to round may lie
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # fp16 above 0


class Rounding:
    """Offsets and ranges of the weights of one scheme, side by side as groups [groups, size].

    Args:
        weights: float weights fp32 [out, in].
        start: what they are coded as, of one scheme and group width, with no `g_idx`.
    """

    def __init__(self, weights: list[Tensor], start: list[QTensor]) -> None:
        scheme = start[0].scheme
        size = scheme.group_columns(start[0].in_features)
        self.scheme, self.levels, self.sym = scheme, scheme.levels, scheme.sym
        self.shapes = [tuple(weight.shape) for weight in weights]
        weight = torch.cat([each.reshape(-1, size) for each in weights])
        scale = torch.cat([qt.scales.reshape(-1, 1) for qt in start]).to(weight.dtype)
        zero = torch.cat([qt.zeros.reshape(-1, 1) for qt in start]).to(weight.dtype)
        steps = torch.cat([qt.q.reshape(-1, size) for qt in start]).to(weight.dtype) - zero
        beside = weight / scale - steps
        # What lies beyond the grid stays there, so that a wider range finds it.
        end = torch.full_like(scale, torch.inf)
        least = torch.where(steps > -zero, -_BESIDE, -end)
        most = torch.where(steps < self.levels - zero, _BESIDE, end)
        beside = torch.clamp(beside, least, most)
        self.base = (steps + beside).mul_(scale)
        self.lo, self.hi = -zero * scale, (self.levels - zero) * scale
        self.offset = torch.zeros_like(self.base)
        self.range = torch.zeros(2, *scale.shape, dtype=weight.dtype, device=weight.device)
        self._adams = [Adam(each) for each in self.state()]
        self.value = torch.empty_like(self.base)
        self.gradient = torch.zeros_like(self.base)
        self.round()

    def parts(self, flat: Tensor) -> list[Tensor]:
        """What is [groups, n] as the matrices [out, groups of a row times n] that it is of."""
        counts = [rows * columns // self.base.shape[-1] for rows, columns in self.shapes]
        pairs = zip(flat.split(counts), self.shapes, strict=True)
        return [part.view(rows, -1) for part, (rows, _) in pairs]

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale, a number of fp16, and zero of each group, [groups, 1]."""
        lo, hi = self.lo * (1 + self.range[0]), self.hi * (1 + self.range[1])
        scale = ((hi - lo) / self.levels).half().clamp_(_SMALLEST, _LARGEST).to(lo.dtype)
        return scale, torch.round(-lo / scale).clamp_(0, self.levels)

    def round(self) -> None:
        """Set `value` from offsets and ranges."""
        scale, zero = self.grid()
        steps = self._place(scale).round_()
        torch.clamp(steps, -zero, self.levels - zero, out=steps)
        torch.mul(steps, scale, out=self.value)

    def _place(self, scale: Tensor) -> Tensor:
        return torch.addcdiv(self.offset, self.base, scale)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Those of `offset` and `range`, from `gradient`, that of `value`."""
        scale, zero = self.grid()
        steps = self._place(scale).round_()
        below, above = steps < -zero, steps > self.levels - zero
        clamped = below | above
        free = self.gradient.masked_fill(clamped, 0)
        shift = (free * torch.addcdiv(steps, self.base, scale, value=-1)).sum(1, keepdim=True)
        low = (self.gradient * below).sum(1, keepdim=True) - shift / self.levels
        high = (self.gradient * above).sum(1, keepdim=True) + shift / self.levels
        low, high = low * self.lo, high * self.hi
        if self.sym:  # one factor for both, which leaves the zero where it is
            low = high = low + high
        return free * scale, torch.stack([low, high])

    def step(self, rounding_rate: Tensor, range_rate: Tensor, bound: float) -> None:
        """Move each offset and factor by one step of Adam, and `round`.

        Args:
            rounding_rate: a number, by how much at most an offset moves; Adam's correction for the
                zeros that its averages start at (`salience.adam.correction`) is in it.
            range_rate: likewise a factor of lo or hi.
            bound: of the offsets' magnitude.
        """
        rates, bounds = (rounding_rate, range_rate), (bound, _WIDEST)
        everything = zip(self.state(), self.gradients(), self._adams, rates, bounds, strict=True)
        for value, gradient, adam, rate, most in everything:
            value.addcmul_(adam.direction(gradient), rate, value=-1).clamp_(-most, most)
        self.round()

    def state(self) -> list[Tensor]:
        """What is learned: `offset` and `range`."""
        return [self.offset, self.range]

    def buffers(self) -> list[Tensor]:
        """All that a step changes."""
        averages = [each for adam in self._adams for each in (adam.mean, adam.square)]
        return [*self.state(), *averages, self.value, self.gradient]

    def codes(self) -> list[QTensor]:
        """The weights as a checkpoint holds them."""
        scale, zero = self.grid()
        steps = torch.clamp(self._place(scale).round_(), -zero, self.levels - zero)
        codes = self.parts(steps.add_(zero).to(torch.uint8))
        scales, zeros = self.parts(scale.half()), self.parts(zero.to(torch.uint8))
        return [QTensor(*each, self.scheme) for each in zip(codes, scales, zeros, strict=True)]
