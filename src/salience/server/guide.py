"""What a reply may say next: grammars over tokens, by xgrammar.

    guides = Guides(tokenizer, vocabulary_size, end_tokens)
    guide = guides.json_schema({"type": "object", ...})
    request.allow(guide.mask(left))      # before each draw
    guide.accept(token)                  # after it

A grammar alone does not make an answer valid: it must also end. Small models fall into endless
blanks, strings, digits or lists, and at max_tokens the JSON is cut. Three things keep it whole:

- Between the parts of JSON there is one blank, where `json.dumps` has one, and no other. Any other
  choice leaves a loop of blanks, and costs tokens.
- A number has as many digits in a row as a double holds.
- `mask(left)` knows how many tokens the reply may still have. It finds a short text that ends the
  answer (the strings closed, each missing value the shortest, the brackets closed), and when that
  text would soon not fit any more, it is all that is allowed.

The last holds for any grammar and takes nothing from an answer that ends by itself; bounds in a
copy of the schema would (and a `maxLength` takes xgrammar seconds to compile). What it costs: an
answer that would be cut ends some tokens sooner.
"""

import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from salience.errors import SalienceError
from salience.server.closing import Vocabulary, closing
from salience.server.schemas import check_grammar, check_regex, normalized
from salience.server.tool_formats import markers

_DIGITS = 17  # of a double
_CACHED = 64
_CACHED_BYTES = 64 << 20
_ONE_LINE: dict[str, Any] = {"any_whitespace": False}


class Guides:
    """Makes guides for one model. From any thread.

    Args:
        tokenizer: of Transformers.
        vocabulary_size: number of logits, which may be more than the tokenizer's tokens.
        end_tokens: any of which ends a reply.

    Raises:
        SalienceError: xgrammar is not installed or does not know such tokenizers.
    """

    def __init__(self, tokenizer: Any, vocabulary_size: int, end_tokens: Collection[int]) -> None:
        self._xgrammar = _import()
        if not end_tokens:
            raise SalienceError("the model has no end token, so no guided reply would end")
        texts = self._texts(tokenizer, vocabulary_size)
        self.vocabulary = Vocabulary(texts, frozenset(end_tokens))
        self._info = self._xgrammar.TokenizerInfo(
            texts,
            self._xgrammar.VocabType.RAW,
            vocab_size=vocabulary_size,
            stop_token_ids=sorted(end_tokens),
        )
        threads = min(os.cpu_count() or 1, 8)
        self._compiler = self._xgrammar.GrammarCompiler(
            self._info, max_threads=threads, cache_enabled=False
        )
        self._cache: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def _texts(self, tokenizer: Any, size: int) -> list[bytes]:
        """The bytes of each token; none for special ones, as they have no text in a reply."""
        try:
            info = self._xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=max(size, len(tokenizer))
            )
        except (ValueError, RuntimeError, AttributeError) as error:
            raise SalienceError(
                f"no guided replies with this tokenizer: {_reason(error)}"
            ) from None
        texts = [bytes(text) for text in info.decoded_vocab]
        special = set(tokenizer.all_special_ids)
        added = tokenizer.added_tokens_decoder
        special.update(token for token, entry in added.items() if entry.special)
        # Those that begin a tool call are text to us.
        known = set(markers())
        for token in special:
            if token < len(texts) and texts[token].decode(errors="replace") not in known:
                texts[token] = b""
        return texts[:size]

    def json_object(self) -> "Guide":
        """Any JSON object."""
        return self.json_schema({"type": "object"}, strict=False)

    def json_schema(self, schema: Mapping[str, Any], strict: bool = True) -> "Guide":
        """JSON that validates against a schema.

        Args:
            schema: drafts 7 to 2020-12, see `schemas.normalized`.
            strict: no properties and items that the schema does not tell of, unless it says
                `additionalProperties`. Either way the answers validate.

        Raises:
            SalienceError: the schema is wrong, too large, or says what a grammar cannot.
        """
        return self._guide(
            f"schema {strict} {_dumped(schema)}",
            lambda: self._compiler.compile_json_schema(
                json.dumps(normalized(schema)), strict_mode=strict, **_ONE_LINE
            ),
            "the JSON schema",
            json_only=True,
        )

    def regex(self, pattern: str) -> "Guide":
        """Text that a regular expression matches as a whole; a dot is a line end, too.

        Raises:
            SalienceError: it is wrong, too large, or has what xgrammar does not know.
        """
        check_regex(pattern)
        return self._guide(
            f"regex {pattern}", lambda: self._compiler.compile_regex(pattern), "the regex"
        )

    def grammar(self, ebnf: str) -> "Guide":
        """Text of a grammar in GBNF, as llama.cpp writes it; its first rule is `root`.

        Raises:
            SalienceError: it is wrong or too large.
        """
        check_grammar(ebnf)
        return self._guide(
            f"grammar {ebnf}", lambda: self._compiler.compile_grammar(ebnf), "the grammar"
        )

    def tags(self, form: Mapping[str, Any], needed: bool) -> "Guide":
        """Text with parts that are held to schemas: the format of an xgrammar structural tag.

        Args:
            form: in it, {"type": "json_schema", "json_schema": ...} is any schema that
                `json_schema` takes.
            needed: whether the text must end with such a part, not only where it begins one.

        Raises:
            SalienceError: as `json_schema`.
        """

        def make() -> Any:
            tag = {"type": "structural_tag", "format": self._with_grammars(form)}
            return self._compiler.compile_structural_tag(json.dumps(tag))

        return self._guide(f"tags {needed} {_dumped(form)}", make, "the tools", needed)

    def _with_grammars(self, form: Any) -> Any:
        """Schemas as grammars, as only these can be told to leave blanks out."""
        if isinstance(form, list):
            return [self._with_grammars(part) for part in form]
        if not isinstance(form, Mapping):
            return form
        if form.get("type") == "json_schema":
            text = json.dumps(normalized(form["json_schema"]))
            grammar = self._xgrammar.Grammar.from_json_schema(text, **_ONE_LINE)
            return {"type": "grammar", "grammar": str(grammar)}
        return {name: self._with_grammars(part) for name, part in form.items()}

    def _guide(
        self,
        key: str,
        make: Callable[[], Any],
        name: str,
        ends: bool = True,
        json_only: bool = False,
    ) -> "Guide":
        compiled = self._cached(key)
        if compiled is None:
            try:
                compiled = make()
            except (RuntimeError, ValueError) as error:
                raise SalienceError(f"{name} is refused: {_reason(error)}") from None
            if not Guide(self._xgrammar, compiled, self.vocabulary, ends, json_only).possible:
                raise SalienceError(f"{name} allows no answer at all")
            self._keep(key, compiled)
        return Guide(self._xgrammar, compiled, self.vocabulary, ends, json_only)

    def _cached(self, key: str) -> Any:
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
            return found

    def _keep(self, key: str, compiled: Any) -> None:
        with self._lock:
            self._cache[key] = compiled
            while len(self._cache) > 1 and (
                len(self._cache) > _CACHED
                or sum(each.memory_size_bytes for each in self._cache.values()) > _CACHED_BYTES
            ):
                self._cache.popitem(last=False)


class Guide:
    """What one reply may say. Made by `Guides`."""

    def __init__(
        self, xgrammar: Any, compiled: Any, vocabulary: Vocabulary, ends: bool, json_only: bool
    ) -> None:
        self._xgrammar = xgrammar
        self._compiled = compiled
        self._vocabulary = vocabulary
        self._ends = ends  # whether it must be whole at the end, even where it may go on
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._json = json_only
        self._digits = 0  # in a row, at the end of the text
        self._forced: list[int] | None = None  # tokens that end it
        self._margin: int | None = None  # tokens that are kept for what one may cost at the end
        self._look: float = math.inf  # with no more than this left, see how it would end
        self._failed = 0  # steps to wait after a look that found nothing

    def fresh(self) -> "Guide":
        """A guide for another reply of the same form."""
        return Guide(self._xgrammar, self._compiled, self._vocabulary, self._ends, self._json)

    @property
    def possible(self) -> bool:
        """Whether any token can follow."""
        words = self._xgrammar.allocate_token_bitmask(1, self._vocabulary.size).zero_()
        self._matcher.fill_next_token_bitmask(words)
        return _allows_any(words)

    @property
    def closed(self) -> bool:
        """Whether it was made to end, as its tokens were running out."""
        return self._forced is not None

    @property
    def finished(self) -> bool:
        """Whether the reply has ended as it must."""
        return bool(self._matcher.is_terminated())

    def mask(self, left: int | None = None) -> Tensor:
        """What the next token may be: int32 [vocabulary / 32], bit i of word w is token 32 w + i.

        Args:
            left: tokens that the reply may still have; None to let it be cut anywhere.
        """
        words = self._xgrammar.allocate_token_bitmask(1, self._vocabulary.size)
        if self.finished:
            return self._vocabulary.ending
        if left is not None and self._forced is None:
            self._plan(left)
        if self._forced is not None:
            if not self._forced:
                return self._vocabulary.ending
            return self._vocabulary.only([self._forced[0]])
        self._matcher.fill_next_token_bitmask(words)
        allowed = words[0]
        if self._json:  # which xgrammar forgets in strings with a length
            allowed = allowed & ~self._vocabulary.controls
        if self._digits >= _DIGITS:
            shorter = allowed & ~self._vocabulary.digits
            if _allows_any(shorter):
                allowed = shorter
        return allowed if _allows_any(allowed) else self._vocabulary.ending

    def accept(self, token: int) -> None:
        """Take the token that was drawn.

        Raises:
            SalienceError: the last mask did not allow it.
        """
        if self.finished:
            return
        if not self._matcher.accept_token(token):
            raise SalienceError(f"token {token} is outside of the reply's grammar")
        if self._forced:
            self._forced = self._forced[1:]
        self._digits = self._vocabulary.digits_after(token, self._digits)

    def _plan(self, left: int) -> None:
        """Begin to end the reply, if that is needed now."""
        if left > self._look:
            return
        tokens = closing(self._matcher, self._vocabulary)
        if tokens is None:  # perhaps later
            self._failed = min(2 * self._failed + 1, 16)
            self._look = left - self._failed
            return
        self._failed = 0
        needed = len(tokens) + 1  # the end is a token, too
        if self._margin is None:
            # The most that a token may cost is about what a whole answer does: a recursion.
            self._margin = min(needed + needed // 4 + 8, max(left // 3, 2))
        if not tokens:
            # It may end here. What goes on freely is not made to, but for its last token.
            if self._ends and left <= 1:
                self._forced = []
            self._look = left - 1
        elif needed <= left <= needed + self._margin:
            self._forced = tokens
        else:
            # A token costs at most a few at the end: with much room, look seldom.
            self._look = left - max((left - needed - self._margin) // 8, 1)


def _allows_any(words: Tensor) -> bool:
    return bool(words.any())


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise SalienceError(f"a schema must be JSON: {error}") from None


def _reason(error: Exception) -> str:
    """What xgrammar says, without its clock and line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text.split(".cc:", 1)[-1].split(": ", 1)[-1] if ".cc:" in text else text


def _import() -> Any:
    try:
        import xgrammar
    except ImportError:
        raise SalienceError("guided replies need xgrammar: pip install 'salience[serve]'") from None
    return xgrammar
