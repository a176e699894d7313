"""Perplexity, by the protocol that the quantization papers use.

The whole text is tokenized once with the tokenizer's defaults and cut into chunks of `context`
tokens that do not overlap; the tail that fills no chunk is dropped. In each chunk tokens 2..L are
predicted from those before them, and the perplexity is exp of the mean negative log-likelihood.
Numbers of different contexts do not compare: longer ones are lower.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.placement import input_device

_LOGIT_ROWS = 256  # rows of logits in fp32 at once


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A measurement: `tokens` were predicted with at most `context` - 1 before them."""

    perplexity: float
    tokens: int
    context: int
    protocol: str


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    context: int = 2048,
    max_chunks: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a Transformers causal language model on a text.

    Args:
        model: on any device.
        tokenizer: its tokenizer.
        text: the whole text.
        context: tokens in a chunk.
        max_chunks: stop after this many chunks.
        progress: called with (phase, done, total).

    Raises:
        SalienceError: a text shorter than one chunk.
    """
    if context < 2:
        raise SalienceError(f"--context is {context}; a chunk needs at least 2 tokens")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    chunks = len(ids) // context
    if chunks == 0:
        raise SalienceError(
            f"the text has {len(ids)} tokens, fewer than one chunk of {context}; "
            "give more text or a smaller --context"
        )
    used = chunks if max_chunks is None else min(chunks, max_chunks)
    total, place = 0.0, input_device(model)
    for i, chunk in enumerate(ids[: used * context].view(used, context)):
        if progress is not None:
            progress("chunk", i, used)
        total += _negative_log_likelihood(model, chunk.to(place))
    if progress is not None:
        progress("chunk", used, used)
    tokens = used * (context - 1)
    return Perplexity(
        perplexity=math.exp(total / tokens),
        tokens=tokens,
        context=context,
        protocol=f"{used} of {chunks} non-overlapping chunks of {context} tokens, "
        "tokens 2..L of each predicted, tail dropped",
    )


@torch.no_grad()
def _negative_log_likelihood(model: Any, chunk: Tensor) -> float:
    logits = model(input_ids=chunk[None], use_cache=False).logits[0, :-1]
    total = 0.0
    for rows, targets in zip(logits.split(_LOGIT_ROWS), chunk[1:].split(_LOGIT_ROWS), strict=True):
        total += torch.nn.functional.cross_entropy(rows.float(), targets, reduction="sum").item()
    return total
