"""Perplexity against a direct computation with Transformers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import salience
from salience.errors import SalienceError
from salience.evaluation import scores as module
from salience.evaluation.perplexity import perplexity
from tiny_models import TEXT


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return salience.load(llama)


def text_of(tokens: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """The start of the text, that many tokens long."""
    text = tokenizer.decode(tokenizer(TEXT[: 8 * tokens])["input_ids"][:tokens])
    assert len(tokenizer(text)["input_ids"]) == tokens
    return text


@torch.no_grad()
def direct(folder: Path, chunks: Tensor) -> float:
    """By Transformers' own loss, in fp64 over the chunks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    losses = [model(input_ids=chunk[None], labels=chunk[None]).loss.item() for chunk in chunks]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("context", [2, 64, 300, 512])
def test_equals_a_direct_computation(
    context: int, model: Any, llama: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = text_of(3 * context + 1, tokenizer)
    chunks = torch.tensor(tokenizer(text)["input_ids"])[: 3 * context].view(3, context)
    found = perplexity(model, tokenizer, text, context)
    assert found.perplexity == pytest.approx(direct(llama, chunks), rel=1e-5)
    assert (found.tokens, found.context) == (3 * (context - 1), context)
    assert found.protocol.startswith(f"3 of 3 non-overlapping chunks of {context} tokens")


def test_tail_is_dropped(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = perplexity(model, tokenizer, text_of(128, tokenizer), 64)
    longer = perplexity(model, tokenizer, text_of(191, tokenizer), 64)
    assert longer.perplexity == whole.perplexity
    assert perplexity(model, tokenizer, text_of(192, tokenizer), 64).tokens == 3 * 63


def test_max_chunks(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    text = text_of(4 * 64, tokenizer)
    found = perplexity(model, tokenizer, text, 64, max_chunks=2)
    assert found.perplexity == perplexity(model, tokenizer, text_of(128, tokenizer), 64).perplexity
    assert found.protocol.startswith("2 of 4 ")
    assert found.perplexity != perplexity(model, tokenizer, text, 64).perplexity
    assert perplexity(model, tokenizer, text, 64, max_chunks=9).tokens == 4 * 63


def test_rows_of_logits_are_only_a_tile(
    model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_of(200, tokenizer)
    whole = perplexity(model, tokenizer, text, 100).perplexity
    monkeypatch.setattr(module, "_HEAD_NUMBERS", 7 * 320)
    monkeypatch.setattr(module, "_SLICE_NUMBERS", {"cpu": 3 * 320})
    assert perplexity(model, tokenizer, text, 100).perplexity == pytest.approx(whole, rel=1e-6)


def test_progress(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    calls: list[tuple[str, int, int]] = []
    perplexity(
        model,
        tokenizer,
        text_of(192, tokenizer),
        64,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("chunk", done, 3) for done in range(4)]


def test_too_short(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SalienceError, match="has 63 tokens, fewer than one chunk of 64"):
        perplexity(model, tokenizer, text_of(63, tokenizer), 64)
    with pytest.raises(SalienceError, match="has 0 tokens"):
        perplexity(model, tokenizer, "", 64)
    with pytest.raises(SalienceError, match="--context is 1"):
        perplexity(model, tokenizer, TEXT, 1)


def test_uniform_model_has_the_vocabulary_as_perplexity(tokenizer: PreTrainedTokenizerFast) -> None:
    class Uniform:
        device = torch.device("cpu")

        def __call__(self, input_ids: Tensor, **_: Any) -> Any:
            class Out:
                logits = torch.zeros(*input_ids.shape, 77)

            return Out

    ids = type("Ids", (), {"__call__": lambda *_, **__: {"input_ids": list(range(70))}})()
    assert perplexity(Uniform(), ids, "", 10).perplexity == pytest.approx(77)
