"""The tokens of prompts, where replies in them keep the tokens that were drawn.

The engine computes what of a prompt is not in its cache. For that to be the new turn alone, the old
turns must have the tokens that were computed. The text of a reply, taken apart again, often has
others: a model draws "Py" and "thon" where the tokenizer would write "Python". So the tokens that
were drawn are kept beside the text up to their end, and where a new prompt begins with such a text,
it begins with those tokens. The rest is tokenized by itself, which is right only where it begins
with a token that the tokenizer never joins to its surroundings, as the end of a turn is. Elsewhere
(the template changed the reply, cut its thought, wrote a call of a tool anew, or has no such token)
the whole is tokenized as ever.

Texts are compared whole, so a prompt gets only tokens that say what it says itself, whoever's reply
they were.
"""

import threading
from array import array
from collections import OrderedDict
from typing import Any

from salience.runtime import Request

_MOST = 1000
_MOST_BYTES = 64 << 20


class Encoder:
    """Encodes prompts and remembers replies, the last ones used. From any thread.

    Args:
        tokenizer: of Transformers.
        context: tokens that prompt and reply can have. A prompt that leaves no room for a reply in
            the tokens that were drawn has the tokenizer's.
        special: whether the tokenizer adds special tokens to a text; False where the text, of a
            chat template, has them.
        most: texts that are kept.
        most_bytes: of these texts and their tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        context: int,
        special: bool,
        most: int = _MOST,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self._tokenizer = tokenizer
        self._context = context
        self._special = special
        self._most = most
        self._left = most_bytes
        self._apart = frozenset(tokenizer.get_added_vocab().values())
        added = tokenizer.added_tokens_decoder.items()
        self._hidden = {index for index, token in added if token.special}
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt's text, those that were drawn as far as a known text goes."""
        with self._lock:
            begins = [known for known in self._known if text.startswith(known)]
        for known in sorted(begins, key=len, reverse=True):
            rest = self._tokens(text[len(known) :], special=False)
            if rest and rest[0] in self._apart:
                drawn = self._use(known)
                if drawn and len(drawn) + len(rest) < self._context:
                    return [*drawn, *rest]
        return self._tokens(text, self._special)

    def keep(self, prompt: str, request: Request) -> None:
        """Remember the tokens of a reply that ended, as far as its text says them.

        Args:
            prompt: the text whose tokens the request had.
            request: finished or cancelled.
        """
        drawn = request.tokens
        if drawn and drawn[-1] in request.ends:
            drawn = drawn[:-1]
        elif request.finish_reason == "stop":
            return  # by a stop string, which is in the tokens and not in the text
        if not drawn or (
            request.sampling.skip_special_tokens and not self._hidden.isdisjoint(drawn)
        ):
            return  # nothing, or a token that the text does not show
        text, tokens = prompt + request.text, array("i", [*request.prompt, *drawn])
        with self._lock:
            self._forget(text)
            self._known[text] = tokens
            self._left -= _size(text, tokens)
            while self._known and (len(self._known) > self._most or self._left < 0):
                self._forget(next(iter(self._known)))

    def _use(self, text: str) -> "array[int] | None":
        """The tokens of a text; None if another thread's reply has taken its place."""
        with self._lock:
            if text in self._known:
                self._known.move_to_end(text)
            return self._known.get(text)

    def _forget(self, text: str) -> None:
        tokens = self._known.pop(text, None)
        if tokens is not None:
            self._left += _size(text, tokens)

    def _tokens(self, text: str, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])


def _size(text: str, tokens: "array[int]") -> int:
    return text.__sizeof__() + tokens.__sizeof__()
