"""The tokens of a text, chosen so that more of them are in the cache.

A reply is drawn token by token, and its tokens need not be those that the tokenizer makes of its
text: "un" + "der" is a reply as good as "under". When the text comes back as a part of the next
prompt, the two differ from there on, and all after it would be computed anew. But the model has
read the drawn ones, so they are put in the place of the others: as far as the text of a prompt and
of something in the cache are the same, the prompt gets the tokens of the cache.
"""

from collections.abc import Sequence
from typing import Any

_BEFORE = 8  # tokens that are decoded with what differs, for spaces and parts of characters
_TRIES = 16  # tokens at whose ends a boundary of the other tokens is looked for
_PART = "\ufffd"  # stands for bytes that are no character yet
_WORTH_IT = 16  # tokens that more must be in the cache


def same_text(tokenizer: Any, held: Sequence[Sequence[int]], prompt: Sequence[int]) -> list[int]:
    """A prompt with the tokens of what is held, as far as that has the same text.

    Args:
        tokenizer: of Transformers; None changes nothing.
        held: sequences of tokens in the cache.
        prompt: its tokens.
    """
    best, gain = list(prompt), _WORTH_IT
    if tokenizer is None:
        return best
    for tokens in held:
        start = shared(tokens, prompt)
        if min(len(tokens), len(prompt)) - start < gain:
            continue  # the rest is too short
        found = _aligned(tokenizer, tokens, prompt, max(start - _BEFORE, 0))
        if found is not None and found[0] - start >= gain:
            gain = found[0] - start + 1
            best = [*tokens[: found[0]], *prompt[found[1] :]]
    return best


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest beginning that both have."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


def _aligned(
    tokenizer: Any, a: Sequence[int], b: Sequence[int], start: int
) -> tuple[int, int] | None:
    """The furthest (i, j) so that a[start:i] and b[start:j] have the same text."""

    def text(tokens: Sequence[int], end: int) -> str:
        decoded = tokenizer.decode(tokens[start:end], clean_up_tokenization_spaces=False)
        return str(decoded)

    whole = text(b, len(b))
    # The texts of beginnings are beginnings of the text, but for a part of a character at the end:
    # search by halves.
    low, high = start, len(a)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if whole.startswith(text(a, middle).rstrip(_PART)) else (low, middle - 1)
        )
    for i in range(low, max(start, low - _TRIES), -1):
        wanted = text(a, i)
        first, last = start, len(b)
        while first < last:
            middle = (first + last) // 2
            if len(text(b, middle)) < len(wanted):
                first = middle + 1
            else:
                last = middle
        if text(b, first) == wanted and whole.startswith(wanted) and wanted[-1:] != _PART:
            return i, first
    return None
