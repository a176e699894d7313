"""One reply of the tiny model: what it is asked, what it streams, when it stops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import salience
from salience.chat.reply import reply
from salience.errors import SalienceError
from tiny_models import make_tokenizer


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return salience.load(llama)


def asked(model: Any, tokenizer: Any, *args: Any, **options: Any) -> str:
    """The text of the tokens that the model was given."""
    seen: list[torch.Tensor] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0])
    )
    reply(model, tokenizer, *args, max_new_tokens=2, **options)
    handle.remove()
    prompt = next(ids for ids in reversed(seen) if ids.shape[1] > 1)
    return str(tokenizer.decode(prompt[0]))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_pieces_join_to_the_text(
    temperature: float, model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    pieces: list[str] = []
    found = reply(
        model,
        tokenizer,
        "What is a lambda?",
        max_new_tokens=40,
        temperature=temperature,
        on_text=pieces.append,
    )
    assert "".join(pieces) == found.text
    assert found.text and all(pieces)
    assert 0 < found.tokens <= 40
    assert found.first_token_seconds > 0
    assert found.tokens_per_second > 0 or found.tokens == 1


def test_greedy_is_the_likeliest_token_each_time(
    model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = reply(model, tokenizer, "for x in", max_new_tokens=8)
    ids = tokenizer("<|user|>for x in<|end|><|assistant|>", return_tensors="pt")["input_ids"]
    count = ids.shape[1]
    with torch.no_grad():
        for _ in range(found.tokens):
            likeliest = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, likeliest], dim=1)
    assert found.text == tokenizer.decode(ids[0, count:], skip_special_tokens=True)
    assert found.prompt_tokens == count
    assert found == reply_again(found, model, tokenizer)


def reply_again(found: Any, model: Any, tokenizer: Any) -> Any:
    """The same question again, with the times of the first answer."""
    again = reply(model, tokenizer, "for x in", max_new_tokens=8)
    times = (found.first_token_seconds, found.tokens_per_second)
    return type(found)(again.text, again.prompt_tokens, again.tokens, *times)


def test_sampling_by_seed(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [
        reply(model, tokenizer, "x", max_new_tokens=30, temperature=2.0, seed=seed).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_chat_template(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    assert asked(model, tokenizer, "hi") == "<|user|>hi<|end|><|assistant|>"
    with_system = asked(model, tokenizer, "hi", "Be brief.")
    assert with_system == "<|system|>Be brief.<|end|><|user|>hi<|end|><|assistant|>"


def test_no_chat_template(model: Any) -> None:
    plain = make_tokenizer()
    plain.chat_template = None
    assert asked(model, plain, "def f():") == "def f():"
    assert asked(model, plain, "def f():", "Python") == "Python\n\ndef f():"


def test_stops_at_the_end_token(
    model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokenizer("<|user|>x<|end|><|assistant|>", return_tensors="pt")
    count = prompt["input_ids"].shape[1]
    ids = model.generate(**prompt, max_new_tokens=9, do_sample=False)[0, count:].tolist()
    end = next(token for token in ids if token != ids[0])
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    found = reply(model, tokenizer, "x", max_new_tokens=9)
    assert found.tokens == ids.index(end) + 1 < 9


@pytest.mark.parametrize("count", [1, 2])
def test_few_tokens(count: int, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    found = reply(model, tokenizer, "x", max_new_tokens=count)
    assert found.tokens == count
    assert (found.tokens_per_second > 0) == (count > 1)


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_empty_prompt(prompt: str, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SalienceError, match="the prompt is empty"):
        reply(model, tokenizer, prompt)
