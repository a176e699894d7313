"""Tokens to text, piece by piece: whole characters, spaces, stop strings."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from salience.runtime.text import Detokenizer, StopStrings
from tiny_models import VOCABULARY, make_tokenizer

BYTE_LEVEL = make_tokenizer()


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with a leading ▁ and bytes for the rest, the space at the very start stripped."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s", "▁", "."]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


SENTENCEPIECE = sentencepiece_like()
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["naïve café", "你好世界。", "👩‍👩‍👧‍👦 and 🇩🇪", "  two\n\n spaces ", "שלום", "e\u0301", ""]
)


def pieces(tokenizer: Any, tokens: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(TEXTS)
def test_pieces_of_bytes_are_the_text(text: str) -> None:
    tokens = BYTE_LEVEL(text)["input_ids"]
    found = pieces(BYTE_LEVEL, tokens)
    assert "".join(found) == text
    assert all("\ufffd" not in piece for piece in found) or "\ufffd" in text


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=30))
def test_any_tokens_are_what_the_tokenizer_makes_of_all(tokens: list[int]) -> None:
    whole = BYTE_LEVEL.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces(BYTE_LEVEL, tokens)) == whole


@given(TEXTS)
def test_bytes_between_words(text: str) -> None:
    """Each character's bytes are tokens of their own; the first space of all is no text."""
    words = [257, 258, 259, *(1 + byte for byte in text.encode()), 257, 261]
    found = pieces(SENTENCEPIECE, words)
    assert "".join(found) == SENTENCEPIECE.decode(words) == f"the cats{text} the."
    assert all("\ufffd" not in piece for piece in found) or "\ufffd" in text


def test_a_character_comes_when_it_is_whole() -> None:
    tokens = [1 + byte for byte in "é你".encode()]
    assert pieces(SENTENCEPIECE, tokens) == ["", "é", "", "", "你", ""]


def test_the_space_after_a_prompt_is_kept() -> None:
    assert pieces(SENTENCEPIECE, [258, 259]) == ["cat", "s", ""]
    assert pieces(SENTENCEPIECE, [258, 259], prompt=[257]) == [" cat", "s", ""]
    assert pieces(SENTENCEPIECE, [258], prompt=[257] * 99) == [" cat", ""]


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    assert pieces(SENTENCEPIECE, [257, 1 + 0xE4, 1 + 0xBD]) == ["the", "", "", "\ufffd\ufffd"]
    assert pieces(SENTENCEPIECE, [258], prompt=[1 + 0xE4]) == ["cat", ""]


def test_special_tokens_have_no_text() -> None:
    tokens = BYTE_LEVEL("a<|end|><|user|>b")["input_ids"]
    assert pieces(BYTE_LEVEL, tokens) == ["a", "", "", "b", ""]


def cut(text: str, stops: list[str]) -> str:
    """The text up to the stop string that is complete first."""
    for end in range(len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)]
    return text


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_across_pieces(parts: list[str], stops: list[str]) -> None:
    text = "".join(parts)
    matcher, shown, stopped = StopStrings(stops), "", False
    for n, part in enumerate(parts, 1):
        piece, stopped = matcher.push(part)
        shown += piece
        seen = "".join(parts[:n])
        assert cut(text, stops).startswith(shown)
        if stopped:
            break
        # No more is held back than may still become a stop string.
        held = seen[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
    if not stopped:
        shown += matcher.flush()
    assert shown == cut(text, stops)
    assert stopped == any(stop in text for stop in stops)


@pytest.mark.parametrize("stops", [[], ["<|im_end|>"]])
def test_plain_text_is_not_held_back(stops: list[str]) -> None:
    assert StopStrings(stops).push("hello") == ("hello", False)
