"""Prompts whose text is in the cache under other tokens."""

import pytest

from salience.runtime.reuse import same_text
from tiny_models import make_tokenizer

TOKENIZER = make_tokenizer()


def tokens(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def letters(text: str) -> list[int]:
    """A text by its bytes, as no tokenizer would write it."""
    return [token for byte in text for token in tokens(byte)]


QUESTION, ANSWER, NEXT = (
    "<|user|>what is it<|end|><|assistant|>",
    "the module is imported",
    "<|end|>",
)


@pytest.mark.parametrize(
    "answer", [ANSWER, "日本語の the module is imported テキスト", "a 🙂 and an end of all that"]
)
def test_a_reply_in_other_tokens_is_found(answer: str) -> None:
    held = tokens(QUESTION) + letters(answer)
    prompt = tokens(QUESTION + answer + NEXT + QUESTION)
    assert prompt[: len(held)] != held
    found = same_text(TOKENIZER, [[], held, tokens("something else")], prompt)
    assert found == held + tokens(NEXT + QUESTION)
    assert TOKENIZER.decode(found) == TOKENIZER.decode(prompt)


def test_a_reply_that_was_cut_is_found_up_to_there() -> None:
    held = tokens(QUESTION) + letters(ANSWER + "\n\nUser:")
    prompt = tokens(QUESTION + ANSWER + NEXT + QUESTION)
    found = same_text(TOKENIZER, [held], prompt)
    assert found[: len(tokens(QUESTION)) + len(ANSWER)] == held[: -len("\n\nUser:")]
    assert TOKENIZER.decode(found) == TOKENIZER.decode(prompt)


def test_two_replies_in_other_tokens() -> None:
    held = [
        *tokens(QUESTION),
        *letters(ANSWER),
        *tokens(NEXT + QUESTION),
        *letters("another reply"),
    ]
    prompt = tokens(QUESTION + ANSWER + NEXT + QUESTION + "another reply" + NEXT + QUESTION)
    found = same_text(TOKENIZER, [held], prompt)
    assert found[: len(held)] == held
    assert TOKENIZER.decode(found) == TOKENIZER.decode(prompt)


@pytest.mark.parametrize("other", ["quite another thing is said here", ANSWER.upper()])
def test_another_text_stays(other: str) -> None:
    held = tokens(QUESTION) + letters(other)
    prompt = tokens(QUESTION + ANSWER + NEXT)
    assert same_text(TOKENIZER, [held], prompt) == prompt
    assert same_text(None, [held], prompt) == prompt
    assert same_text(TOKENIZER, [prompt], prompt) == prompt
