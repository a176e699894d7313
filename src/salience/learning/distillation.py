"""How far a student model's next-token distributions are from a teacher's, and which way is nearer.

With p the teacher's distribution of a token and q the student's, both over a vocabulary of V:

    KL(p || q) = sum_v p(v) (log p(v) - log q(v))            d KL / d logit_v = q(v) - p(v)

The loss is its mean over tokens, in nats. It is 0 only where the student says exactly what the
teacher says, so it asks for nothing that the float model does not do: no text is learned, only read
for typical inputs. (The likelihood of the text itself as a loss would fine-tune the model on it.)

Logits are a hundred times as wide as hidden states, so they are never there for a whole
micro-batch: those of a few sequences, or a piece of one, are made of the hidden states that leave
the last block, turned into the gradient above in place, sent back to the hidden states, and
dropped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from salience.blocks.blockwise import logits_of

LOGITS = {"cpu": 2**23, "cuda": 2**27}  # that are made at once, of each of the two models


@dataclass(frozen=True, slots=True, eq=False)
class Tails:
    """What teacher and student do after their last block.

    Args:
        model: both; with the weights of what is in no block.
        blocks: its blocks, which may be on meta.
        teacher: parameters by name, where the teacher's are not the model's.
    """

    model: Any
    blocks: nn.ModuleList
    teacher: Mapping[str, Tensor]

    def width(self) -> int:
        """Of the logits, or a little less."""
        weight = self.model.get_input_embeddings().weight
        return int(weight.shape[0])

    @torch.no_grad()
    def divergence(self, hidden: Tensor, target: Tensor, student: Mapping[str, Tensor]) -> Tensor:
        """The sum of KL(p || q) over tokens, an fp64 number.

        Args:
            hidden: what leaves the student's last block, [batch, seqlen, ..., hidden].
            target: what leaves the teacher's, likewise.
            student: parameters by name, where the student's are not the model's.
        """
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for own, theirs in self._pieces(hidden, target):
            logits = logits_of(self.model, self.blocks, own, student)
            total += _compare(logits, logits_of(self.model, self.blocks, theirs, self.teacher))
        return total

    def gradients(
        self, hidden: Tensor, target: Tensor, student: Mapping[str, Tensor], scale: float
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The sum of KL(p || q) over tokens, and the gradients of `scale` times it.

        Args:
            hidden: as of `divergence`, and so is `target`.
            student: leaves that want gradients.
            scale: one over the number of tokens, for a mean.

        Returns:
            The sum; the gradient of `hidden`; those of `student`, in order, None of those that the
            logits do not depend on.
        """
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        back: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(student)
        leaves = list(student.values())
        for own, theirs in self._pieces(hidden, target):
            with torch.no_grad():
                expected = logits_of(self.model, self.blocks, theirs, self.teacher)
            with torch.enable_grad():
                piece = own.detach().requires_grad_()
                logits = logits_of(self.model, self.blocks, piece, student)
            made = logits.detach().clone()
            total += _compare(made, expected)  # both become something else
            expected = made.sub_(expected).mul_(scale)
            found = torch.autograd.grad(logits, [piece, *leaves], expected, allow_unused=True)
            back.append(found[0])
            for i, each in enumerate(found[1:]):
                before = sums[i]
                sums[i] = each if before is None or each is None else before + each
        return total, _joined(back, hidden), sums

    def _pieces(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """A few sequences at a time, or pieces of one: [some, tokens, ..., hidden]."""
        samples, seqlen = tensors[0].shape[:2]
        rows = max(1, LOGITS[tensors[0].device.type] // self.width())
        count, length = max(1, rows // seqlen), min(rows, seqlen)
        for start in range(0, samples, count):
            for at in range(0, seqlen, length):
                yield tuple(t[start : start + count, at : at + length] for t in tensors)


def _joined(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """Pieces in the order of `Tails._pieces` as one tensor of the shape of `like`."""
    return torch.cat([piece.flatten(0, 1) for piece in pieces]).view(like.shape)


def _compare(logits: Tensor, expected: Tensor) -> Tensor:
    """The sum of KL(p || q) over tokens in fp64; `logits` become q and `expected` p."""
    log_q = torch.log_softmax(logits, -1)
    log_p = torch.log_softmax(expected, -1)
    torch.exp(log_p, out=expected)
    torch.exp(log_q, out=logits)
    # Where the teacher excludes a token both logarithms may be -inf, and p is 0.
    ratios = log_p.sub_(log_q).masked_fill_(expected == 0, 0.0)
    return ratios.mul_(expected).sum(-1).double().sum()
