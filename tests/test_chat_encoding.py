"""Prompts that begin with a reply that was drawn in other tokens than the tokenizer's."""

from collections.abc import Sequence
from typing import Any

import pytest

from salience.chat.encoding import Encoder
from salience.runtime import Request, Sampling
from tiny_models import make_tokenizer

TOKENIZER = make_tokenizer()
END = 0
QUESTION, ANSWER = "<|user|>what is it<|end|><|assistant|>", "the module is imported"
NEXT = "<|end|><|user|>and then<|end|><|assistant|>"


def tokens(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def letters(text: str) -> list[int]:
    """A text by its bytes, as no tokenizer would write it."""
    return [token for byte in text for token in tokens(byte)]


def encoder(**options: Any) -> Encoder:
    return Encoder(TOKENIZER, options.pop("context", 500), special=False, **options)


def drew(prompt: Sequence[int], drawn: Sequence[int], **sampling: Any) -> Request:
    """A request whose reply is known; it is cancelled where it does not end by itself."""
    how = Sampling(max_new_tokens=400, **sampling)
    request = Request(prompt, how, TOKENIZER, frozenset([END]), 400)
    for token in drawn:
        if not request.finished:
            request.push(token, None)
    if not request.finished:
        request.end()
    return request


def said(texts: Encoder, prompt: str, drawn: Sequence[int], **sampling: Any) -> Request:
    request = drew(texts.encode(prompt), drawn, **sampling)
    texts.keep(prompt, request)
    return request


@pytest.mark.parametrize("answer", [ANSWER, "日本語の the module テキスト", "a 🙂 and an end"])
@pytest.mark.parametrize("end", [[], [END]])
def test_a_reply_keeps_the_tokens_that_were_drawn(answer: str, end: list[int]) -> None:
    texts = encoder()
    said(texts, QUESTION, [*letters(answer), *end])
    found = texts.encode(QUESTION + answer + NEXT)
    assert found == [*tokens(QUESTION), *letters(answer), *tokens(NEXT)]
    assert found != tokens(QUESTION + answer + NEXT)
    assert TOKENIZER.decode(found) == QUESTION + answer + NEXT


def test_talks_of_several_turns_and_clients() -> None:
    texts = encoder()
    said(texts, QUESTION, letters(ANSWER))
    other = QUESTION.replace("it", "she")
    said(texts, other, letters("another reply"))
    said(texts, QUESTION, letters("the second of n replies"))
    second = QUESTION + ANSWER + NEXT
    said(texts, second, letters(ANSWER))
    start = [*tokens(QUESTION), *letters(ANSWER), *tokens(NEXT)]
    assert texts.encode(second + ANSWER + NEXT) == [*start, *letters(ANSWER), *tokens(NEXT)]
    for prompt, reply in ((other, "another reply"), (QUESTION, "the second of n replies")):
        expected = [*tokens(prompt), *letters(reply), *tokens(NEXT)]
        assert texts.encode(prompt + reply + NEXT) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        QUESTION,
        QUESTION + ANSWER + " and more" + NEXT,  # a token may join what was drawn and what follows
        QUESTION + ANSWER[:-3] + NEXT,  # cut by the client
        QUESTION + ANSWER.upper() + NEXT,
        QUESTION.replace("it", "she") + ANSWER + NEXT,
        QUESTION + ANSWER,
    ],
)
def test_another_text_has_its_own_tokens(prompt: str) -> None:
    texts = encoder()
    said(texts, QUESTION, letters(ANSWER))
    assert texts.encode(prompt) == tokens(prompt)


def test_what_the_text_does_not_show_is_not_kept() -> None:
    texts = encoder()
    texts = encoder()
    # As of a model that goes on after a token that ends a turn.
    hidden = said(texts, QUESTION, [*letters(ANSWER), *tokens("<|user|>"), *letters("x")])
    assert hidden.text == ANSWER + "x"
    prompt = QUESTION + hidden.text + NEXT
    assert texts.encode(prompt) == tokens(prompt)
    stopped = said(texts, QUESTION, letters(ANSWER), stop=("import",))
    assert stopped.text == "the module is "
    prompt = QUESTION + stopped.text + NEXT
    assert texts.encode(prompt) == tokens(prompt)


def test_the_context_holds() -> None:
    prompt = QUESTION + ANSWER + NEXT
    drawn = [*tokens(QUESTION), *letters(ANSWER), *tokens(NEXT)]
    for room, expected in ((len(drawn) + 1, drawn), (len(drawn), tokens(prompt))):
        texts = encoder(context=room)
        said(texts, QUESTION, letters(ANSWER))
        assert texts.encode(prompt) == expected


def test_bounds() -> None:
    replies = [f"reply {i}" for i in range(8)]
    size = len(QUESTION) + 400

    def kept(used: int | None = None, **bounds: int) -> list[str]:
        texts = encoder(**bounds)
        for i, reply in enumerate(replies):
            said(texts, QUESTION, letters(reply))
            if used is not None and i >= used:
                texts.encode(QUESTION + replies[used] + NEXT)
        found = {reply: texts.encode(QUESTION + reply + NEXT) for reply in replies}
        return [r for r in replies if found[r] != tokens(QUESTION + r + NEXT)]

    assert kept() == replies
    assert kept(most=3) == replies[-3:]
    assert kept(used=1, most=3) == [replies[1], *replies[-2:]], "the last used are kept"
    few = kept(most_bytes=3 * size)
    assert 0 < len(few) < len(replies) and few == replies[-len(few) :]
    assert kept(most_bytes=10) == []
