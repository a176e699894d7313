"""From tokens to pieces of text: whole characters, and nothing of a text that ends the reply.

A token may hold a part of a character, and what it says may depend on the token before it (a word's
leading space goes only at the very start). So tokens are decoded together with a few before them,
and a text that ends in U+FFFD, the sign for bytes that are no character yet, waits for more.
"""

from collections.abc import Sequence
from typing import Any

_CONTEXT = 6  # tokens of the prompt that the first piece is decoded with
_UNFINISHED = "\ufffd"


class Detokenizer:
    """The text of a growing list of tokens.

    Args:
        tokenizer: of Transformers; only its `decode` is used.
        prompt: the tokens before.
        skip_special_tokens: whether special tokens have no text.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._tokens = list(prompt[-_CONTEXT:])
        self._known = self._decode()  # the text of the tokens that were given out
        if self._known.endswith(_UNFINISHED):
            self._tokens, self._known = [], ""
        self._read = len(self._tokens)

    def _decode(self) -> str:
        if not self._tokens:
            return ""
        text = self._tokenizer.decode(
            self._tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )
        return str(text)

    def push(self, token: int) -> str:
        """The text that a token adds; empty when it is not known yet."""
        self._tokens.append(token)
        text = self._decode()
        if text.endswith(_UNFINISHED):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """What is left at the end, U+FFFD included."""
        return self._give(self._decode())

    def _give(self, text: str) -> str:
        piece = text[len(self._known) :]
        if piece:
            # From here on the tokens of this piece are the context.
            self._tokens = self._tokens[self._read :]
            self._known = self._decode()
        self._read = len(self._tokens)
        return piece


class StopStrings:
    """Cuts a text at the first of some stop strings, however it is cut into pieces.

    Args:
        stops: the strings, none empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string was met, with which it ends."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            # The one that is complete first, which is the same for any cut into pieces.
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
