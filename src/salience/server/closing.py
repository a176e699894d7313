"""How a text that is held to a grammar can end soon.

The shortest end would be a search through the grammar. For JSON, and for most of what people write
as a regex, one greedy pass finds an end that is hardly longer: close what can be closed, else open
the shortest value. It only has to know whether it is inside a string, where brackets are text. It
knows that of all that it writes itself, and where it begins it tries both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PRINTED = [bytes([code]) for code in range(32, 127)]
_LETTERS = [each for each in _PRINTED if each.isalnum()]
_MARKS = [b"@", b".", b":", *[each for each in _PRINTED if not each.isalnum()]]
# What closes comes first. Of the others, those that are not written yet: so that no loop of a regex
# is run for long, a@b.cc is found for [a-z]+@[a-z]+[.][a-z]{2}, not aaa...
_CLOSERS = {False: [b"}", b"]", b",", b":", b'"', b"0", b"n", b"t", b"f", b"[", b"{"], True: [b'"']}
_ORDERS = {False: [*_LETTERS, *_MARKS], True: [*_MARKS, *_LETTERS]}
# Where a text may be: outside of a string or inside; there also after a backslash, in \\uXXXX, or
# within a character, whose other bytes come first.
_ESCAPES = [b"n", b"0", b"00", b"000", b"0000"]
_HALVES = [half * count for half in (b"\xa0", b"\x90", b"\x80") for count in (1, 2, 3)]
_LIKELY = [(b"", False), (b"", True)]
_OTHERS = [(start, True) for start in (*_ESCAPES, *_HALVES)]
# Where the beginning is wrong an end is seldom found, so short ends are looked for first.
_ROUNDS = [(_LIKELY, 32), (_LIKELY, 64), (_LIKELY, 128), (_LIKELY, 256), (_OTHERS, 256)]
_ROUNDS += [(_LIKELY, 2048)]


class Vocabulary:
    """The bytes of all tokens.

    Args:
        texts: of each token; empty for those that are none.
        ends: tokens that end a reply.
    """

    def __init__(self, texts: Sequence[bytes], ends: frozenset[int]) -> None:
        self.texts = texts
        self.size = len(texts)
        self._tokens = {text: token for token, text in enumerate(texts) if text}
        self._longest = max(map(len, self._tokens), default=0)
        self.ending = self.only(sorted(ends))
        self.controls = self.only([i for i, text in enumerate(texts) if text and min(text) < 32])
        self.digits = self.only([i for i, text in enumerate(texts) if text[:1].isdigit()])

    def only(self, tokens: Sequence[int]) -> Tensor:
        """The mask of some tokens, int32 [size / 32]."""
        flags = torch.zeros(-(-self.size // 32) * 32, dtype=torch.int64)
        flags[torch.tensor(tokens, dtype=torch.int64)] = 1
        words = (flags.view(-1, 32) << torch.arange(32)).sum(1)
        return words.to(torch.int32)

    def tokens(self, text: bytes) -> list[int] | None:
        """A text in tokens, each as long as can be; None if it has bytes that are no token."""
        found, at = [], 0
        while at < len(text):
            for stop in range(min(len(text), at + self._longest), at, -1):
                token = self._tokens.get(text[at:stop])
                if token is not None:
                    break
            else:
                return None
            found.append(token)
            at = stop
        return found

    def digits_after(self, token: int, before: int) -> int:
        """How many digits a text ends with, after a token."""
        text = self.texts[token]
        here = len(text) - len(text.rstrip(b"0123456789"))
        return here + before if here == len(text) else here


def closing(matcher: Any, vocabulary: Vocabulary) -> list[int] | None:
    """Tokens that end the text of a matcher, few of them; None if none were found.

    Args:
        matcher: of xgrammar; it stays as it is.
        vocabulary: to write them in.
    """
    if matcher.is_completed():
        return []
    for starts, longest in _ROUNDS:
        found = [_end(matcher.fork(), *start, longest, vocabulary) for start in starts]
        ends = [end for end in found if end is not None]
        if ends:
            return vocabulary.tokens(min(ends, key=len))
    return None


def _end(
    matcher: Any, start: bytes, inside: bool, longest: int, vocabulary: Vocabulary
) -> bytes | None:
    """An end that begins with `start`, after which it is inside of a string or not."""
    text = start
    others = list(_ORDERS[inside])
    if start and not matcher.accept_string(start):
        return None
    while not matcher.is_completed():
        if len(text) > longest:
            return None
        piece = matcher.find_jump_forward_string().encode()
        if not (piece and matcher.accept_string(piece)):
            order = (*_CLOSERS[inside], *others)
            piece = next((each for each in order if matcher.accept_string(each)), b"")
            if piece in others:
                others.remove(piece)
                others.append(piece)
        if not piece:
            piece = _any_token(matcher, vocabulary)
            if not piece:
                return None
        text += piece
        for quoted in piece.replace(b"\\\\", b"").replace(b'\\"', b""):
            if quoted == ord('"'):
                inside = not inside
                others = list(_ORDERS[inside])
    return text


def _any_token(matcher: Any, vocabulary: Vocabulary) -> bytes:
    """Go on with a token, whichever is allowed: for texts that are not ASCII."""
    words = vocabulary.only([])[None]
    matcher.fill_next_token_bitmask(words)
    for word, bits in enumerate(words[0].tolist()):
        for bit in range(32) if bits else ():
            token = 32 * word + bit
            if bits >> bit & 1 and token < vocabulary.size and vocabulary.texts[token]:
                return vocabulary.texts[token] if matcher.accept_token(token) else b""
    return b""
