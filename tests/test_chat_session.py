"""A talk with the tiny model: what it is asked, what it streams, what it need not compute again."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import salience
from salience.chat.prompt import encode
from salience.chat.session import Session
from salience.chat.talk import Talk
from salience.errors import SalienceError
from salience.runtime import Engine, Sampling
from tiny_models import make_tokenizer


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return salience.load(llama)


@pytest.fixture(scope="module")
def engine(model: Any, tokenizer: PreTrainedTokenizerFast) -> Engine:
    return Engine(model, tokenizer, max_context=200)


@pytest.fixture
def session(engine: Engine) -> Session:
    return Session(engine, Sampling(max_new_tokens=8, temperature=1.5, seed=3))


def asked(engine: Engine, text: str, system: str | None = None) -> str:
    """The text of the tokens that the model was given."""
    seen: list[list[int]] = []
    submit = engine.submit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "submit", lambda ids, how: seen.append(ids) or submit(ids, how))
        Session(engine, Sampling(max_new_tokens=1), Talk(system=system)).ask(text)
    return str(engine.tokenizer.decode(seen[0]))


def test_pieces_join_to_the_text(session: Session) -> None:
    pieces: list[str] = []
    session.sampling = replace(session.sampling, max_new_tokens=40)
    found = session.ask("What is a lambda?", pieces.append)
    assert "".join(pieces) == found.text and found.text and all(pieces)
    assert 0 < len(found.result.tokens) <= 40
    assert session.used == found.result.prompt_tokens + len(found.result.tokens)


def test_greedy_is_the_likeliest_token_each_time(
    engine: Engine, model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = Session(engine, Sampling(max_new_tokens=8)).ask("for x in")
    ids = tokenizer("<|user|>for x in<|end|><|assistant|>", return_tensors="pt")["input_ids"]
    count = ids.shape[1]
    with torch.no_grad():
        for _ in found.result.tokens:
            likeliest = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, likeliest], dim=1)
    assert found.text == tokenizer.decode(ids[0, count:], skip_special_tokens=True)
    assert found.result.prompt_tokens == count


def test_seeds(engine: Engine) -> None:
    def texts(seed: int) -> list[str]:
        session = Session(engine, Sampling(max_new_tokens=20, temperature=2.0, seed=seed))
        return [session.ask("x").text, *("".join(a for _, a in session.again()) for _ in range(2))]

    first = texts(1)
    assert first == texts(1) != texts(5)
    assert len(set(first)) == 3, "to draw again must not bring the same"


def test_setting_a_seed_begins_its_row_anew(session: Session) -> None:
    first = session.ask("x").text
    session.talk = Talk()
    session.sampling = replace(session.sampling, seed=9)
    session.ask("x")
    session.talk = Talk()
    session.sampling = replace(session.sampling, seed=3)
    assert session.ask("x").text == first


def test_chat_template(engine: Engine) -> None:
    assert asked(engine, "hi") == "<|user|>hi<|end|><|assistant|>"
    with_system = asked(engine, "hi", "Be brief.")
    assert with_system == "<|system|>Be brief.<|end|><|user|>hi<|end|><|assistant|>"


def test_no_chat_template(model: Any) -> None:
    plain = make_tokenizer()
    plain.chat_template = None
    engine = Engine(model, plain, max_context=200)
    assert asked(engine, "def f():") == "def f():"
    assert asked(engine, "def f():", "Python") == "Python\n\ndef f():"
    session = Session(engine, Sampling(max_new_tokens=3, temperature=1.0))
    session.ask("a")
    session.ask("b")
    assert len(session.talk.turns) == 4


@pytest.mark.parametrize("reset", ["", " \n\t"])
def test_empty_prompt(session: Session, reset: str) -> None:
    with pytest.raises(SalienceError, match="the prompt is empty"):
        session.ask(reset)
    with pytest.raises(SalienceError, match="no valid Unicode"):
        session.ask("half \ud800")
    assert session.talk == Talk()


def test_only_the_new_turn_is_computed(session: Session, engine: Engine) -> None:
    """Also where the drawn tokens are not those of their text, as random ones seldom are."""
    other = 0
    for text in ("What is this?", "And that?", "Why?"):
        before = session.used
        result = session.ask(text).result
        tokens = engine.tokenizer(f"<|end|><|user|>{text}<|end|><|assistant|>")["input_ids"]
        # A reply that was cut off has its last token still to be computed.
        assert result.cached_tokens >= before - 1
        assert result.prompt_tokens - result.cached_tokens <= len(tokens) + 1
        again = engine.tokenizer(result.text)["input_ids"]
        other += again != result.tokens
    assert other, "all replies have the tokens of their text; draw with another seed"


def test_the_kept_tokens_say_the_talk(session: Session, engine: Engine) -> None:
    for text in ("a", "b"):
        session.ask(text)
    messages = session.talk.messages("c")
    kept = session._encoder.encode(engine.tokenizer.apply_chat_template(messages, tokenize=False))
    written = engine.tokenizer.apply_chat_template(messages, tokenize=False)
    assert engine.tokenizer.decode(kept) == written
    assert kept != engine.tokenizer(written)["input_ids"]


def test_a_template_that_changes_replies(model: Any) -> None:
    """The text counts: what the template cuts from a reply does not come back by its tokens."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content[:3]")
    engine = Engine(model, tokenizer, max_context=200)
    session = Session(engine, Sampling(max_new_tokens=8, temperature=1.5))
    session.ask("abcdef")
    seen: list[list[int]] = []
    submit = engine.submit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "submit", lambda ids, how: seen.append(ids) or submit(ids, how))
        session.ask("ghijkl")
    assert seen[0] == encode(tokenizer, session.talk.messages()[:3])


def test_stop_string_is_not_in_the_next_prompt(session: Session, engine: Engine) -> None:
    whole = session.ask("x").text
    session.talk = Talk()
    session.sampling = replace(session.sampling, seed=4)
    session.sampling = replace(session.sampling, seed=3, stop=(whole[3:5],))
    assert session.ask("x").text == whole[: whole.index(whole[3:5])]
    text = engine.tokenizer.apply_chat_template(session.talk.messages("y"), tokenize=False)
    assert session._encoder.encode(text) == engine.tokenizer(text)["input_ids"]


def test_stopped(session: Session) -> None:
    session.sampling = replace(session.sampling, max_new_tokens=100)
    pieces = []
    for _, piece in session.stream("x"):
        pieces.append(piece)
        if len(pieces) == 3:
            session.stop()
    assert session.last is not None and session.last.result.finish_reason == "cancelled"
    assert session.talk.turns[-1]["content"] == "".join(pieces) == session.last.text
    assert session.engine.idle
    session.stop()  # nothing to stop
    session.ask("y")
    assert len(session.talk.turns) == 4


def test_left_half_way(session: Session) -> None:
    stream = session.stream("x")
    _, first = next(stream)
    stream.close()
    assert session.talk.turns[-1]["content"].startswith(first)
    assert session.engine.idle


def test_stopped_before_the_first_token(session: Session) -> None:
    session.ask("x")
    before = session.talk
    for stream in (session.stream("y"), session.again()):
        submit = session.engine.submit

        def at_once(*args: Any, submit: Any = submit) -> Any:
            request = submit(*args)
            request.cancel()
            return request

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session.engine, "submit", at_once)
            assert list(stream) == []
        assert session.talk is before


def test_again(session: Session) -> None:
    with pytest.raises(SalienceError, match="nothing was said"):
        list(session.again())
    session.ask("x")
    first = session.talk
    text = "".join(answer for _, answer in session.again())
    assert [m["content"] for m in session.talk.turns] == ["x", text] != first.turns[1]["content"]


def test_longer_than_the_context(session: Session) -> None:
    session.ask("x")
    before = session.talk
    with pytest.raises(SalienceError, match="context of 200; /undo or /reset makes room"):
        session.ask("word " * 300)
    assert session.talk is before
    session.talk = Talk()
    with pytest.raises(SalienceError, match="shorten it, or start with a larger --context"):
        session.ask("word " * 300)


def test_used_is_counted_for_other_talks(session: Session, engine: Engine) -> None:
    assert session.used == 0
    session.ask("x")
    one = session.used
    session.ask("y")
    session.talk, text = session.talk.undone()
    assert text == "y" and session.used in (one + 1, one + 2)  # <|end|><|assistant|>
    session.talk = Talk(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    assert session.used == len(encode(engine.tokenizer, session.talk.messages()))


@pytest.fixture
def thinker(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """A model that thinks, by the text that is read from its tokens."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|assistant|>{%", "<|assistant|><think>\n{%"
    )
    assert "<think>" in tokenizer.chat_template
    text = "so\n</think>\n\nIt is 4."
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
    session = Session(
        Engine(model, tokenizer, max_context=200), Sampling(max_new_tokens=len(pieces))
    )
    monkeypatch.setattr("salience.runtime.text.Detokenizer.push", lambda *_: pieces.pop(0))
    monkeypatch.setattr("salience.runtime.text.Detokenizer.flush", lambda _: "".join(pieces))
    yield session


def test_thoughts_are_told_apart_and_not_sent_back(thinker: Session) -> None:
    pieces = list(thinker.stream("2 + 2?"))
    assert "".join(thought for thought, _ in pieces) == "so"
    assert "".join(answer for _, answer in pieces) == "It is 4."
    assert thinker.talk.turns[-1] == {
        "role": "assistant",
        "content": "It is 4.",
        "reasoning_content": "so",
    }
    tokenizer = thinker.tokenizer
    text = tokenizer.apply_chat_template(thinker.talk.messages("y"), tokenize=False)
    assert "so" not in text and "It is 4." in text
    assert thinker._encoder.encode(text) == tokenizer(text)["input_ids"]
