"""Perplexity alone, by the protocol that the quantization papers use: see `scores`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from salience.evaluation.scores import score


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
    found = score(model, tokenizer, text, context, max_chunks, progress=progress)
    return Perplexity(found.perplexity, sum(found.tokens), context, found.protocol)
