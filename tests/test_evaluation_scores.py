"""Scores against fp64 sums over whole logits, for models that do more than a product at the end."""

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import salience
from salience.errors import SalienceError
from salience.evaluation import scores as module
from salience.evaluation.parts import take_apart
from salience.evaluation.scores import Reference, Scores, score
from salience.monitor import Sampler
from tiny_architectures import COMMON, OTHERS, REFUSED, architecture
from tiny_models import TEXT, VOCABULARY, llama_config, make_model, make_tokenizer, random_tokens

CONTEXT = 32
CHUNKS = 3


class Ids:
    """A tokenizer of texts that are numbers."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def text_of(vocabulary: int = VOCABULARY, tokens: int = CHUNKS * CONTEXT, seed: int = 1) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(map(str, torch.randint(vocabulary, (tokens,), generator=generator).tolist()))


def tame(config: Any) -> None:
    """Caps and scales that matter to logits as small as those of tiny models."""
    for name, value in (("final_logit_softcapping", 3.0), ("logits_scaling", 4.0)):
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    if hasattr(config, "logit_scale"):
        config.logit_scale = 0.5


def perturbed(model: Any, config: Any, size: float, seed: int = 0) -> Any:
    """A copy of a model with noise in its weights."""
    other = make_model(config, seed)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * parameter.std().nan_to_num() * torch.randn_like(parameter))
    return other


@torch.no_grad()
def whole_logits(model: Any, text: str) -> Tensor:
    """fp64 [chunks, context - 1, vocabulary], of the model called as it is."""
    chunks = torch.tensor(Ids()(text)["input_ids"]).view(-1, CONTEXT)
    logits = [model(input_ids=chunk[None], use_cache=False).logits[0, :-1] for chunk in chunks]
    return torch.stack(logits).double()


def oracle(own: Tensor, theirs: Tensor, text: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over each chunk in fp64: negative log-likelihood, divergence, agreement."""
    targets = torch.tensor(Ids()(text)["input_ids"]).view(-1, CONTEXT)[:, 1:]
    nll = -torch.log_softmax(own, -1).gather(-1, targets[..., None])[..., 0]
    width = min(own.shape[-1], theirs.shape[-1])
    own, theirs = own[..., :width], theirs[..., :width]
    log_q, log_p = torch.log_softmax(own, -1), torch.log_softmax(theirs, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    agree = own.argmax(-1) == theirs.argmax(-1)
    return nll.sum(-1), kl.sum(-1), agree.sum(-1)


def assert_equal(found: Scores, own: Tensor, theirs: Tensor, text: str) -> None:
    nll, kl, agree = oracle(own, theirs, text)
    assert found.kl is not None and found.agree is not None
    assert found.nll == pytest.approx(nll.tolist(), rel=1e-5)
    assert found.kl == pytest.approx(kl.tolist(), rel=1e-5, abs=1e-5 * (CONTEXT - 1))
    assert found.agree == tuple(agree.tolist())
    tokens = CHUNKS * (CONTEXT - 1)
    assert found.tokens == (CONTEXT - 1,) * CHUNKS
    assert found.perplexity == pytest.approx(math.exp(nll.sum() / tokens), rel=1e-5)
    assert found.mean_kl == pytest.approx(kl.sum().item() / tokens, rel=1e-5, abs=1e-5)
    assert found.agreement == agree.sum().item() / tokens


@pytest.mark.parametrize("slices", [2**24, 5 * VOCABULARY])
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "cohere", "granite", "opt", "falcon_h1", "modernbert-decoder"]
)
def test_equals_fp64(
    name: str, slices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HEAD_NUMBERS", slices)
    monkeypatch.setattr(module, "_SLICE_NUMBERS", {"cpu": slices // 2})
    config = architecture(name)
    tame(config)
    model, text = make_model(config), text_of()
    other = perturbed(model, config, 0.2)
    theirs, own = whole_logits(model, text), whole_logits(other, text)
    reference = Reference.record(model, Ids(), text, CONTEXT, folder=tmp_path)
    assert reference.portable
    del model
    found = score(other, Ids(), text, CONTEXT, reference=reference)
    assert_equal(found, own, theirs, text)
    assert (found.mean_kl or 0) > 1e-4 and 0 < (found.agreement or 0) < 1
    alone = score(other, Ids(), text, CONTEXT)
    assert alone.nll == pytest.approx(found.nll, rel=1e-6) and alone.kl is None
    nll, _, _ = oracle(theirs, theirs, text)
    assert reference.scores.nll == pytest.approx(nll.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_what_comes_after_the_head_is_kept(name: str) -> None:
    """A product alone would not do for these."""
    config = architecture(name)
    tame(config)
    model, tokens = make_model(config), random_tokens(1, 8)[0]
    parts = take_apart(model, tokens)
    hidden = parts.hidden(tokens)
    with torch.no_grad():
        product = model.get_output_embeddings()(hidden)
        expected = model(input_ids=tokens[None]).logits[0]
    assert (parts.logits(tokens, hidden) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (product - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMMON, *OTHERS, *REFUSED])
def test_parts_of_every_architecture(name: str) -> None:
    """Rows made apart are those of the whole, be the model taken apart or not."""
    try:
        model = make_model(architecture(name))
    except ValueError:
        pytest.skip("no causal language model")
    tokens = random_tokens(1, 24)[0]
    parts = take_apart(model, tokens)
    with torch.no_grad():
        expected = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    hidden = parts.hidden(tokens)
    rows = [parts.logits(tokens[i : i + 7], hidden[i : i + 7]) for i in range(0, 24, 7)]
    assert (torch.cat(rows) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_packed_against_float(tmp_path: Path, llama: Path) -> None:
    salience.quantize(str(llama), tmp_path / "out", method="rtn", scheme="w4g32")
    dense, packed, text = salience.load(llama), salience.load(tmp_path / "out"), text_of()
    reference = Reference.record(dense, Ids(), text, CONTEXT)
    found = score(packed, Ids(), text, CONTEXT, reference=reference)
    assert_equal(found, whole_logits(packed, text), whole_logits(dense, text), text)
    same = score(dense, Ids(), text, CONTEXT, reference=reference)
    assert same.mean_kl == 0.0 and same.agreement == 1.0
    assert same.nll == pytest.approx(reference.scores.nll, rel=1e-6)


@pytest.mark.parametrize("widths", [(320, 352), (352, 320)])
def test_vocabularies_of_other_widths(widths: tuple[int, int]) -> None:
    """Some checkpoints have rows after the last token, so that sizes are round."""
    theirs, own = (make_model(llama_config(vocab_size=width), seed=width) for width in widths)
    text = text_of(320)
    reference = Reference.record(theirs, Ids(), text, CONTEXT)
    found = score(own, Ids(), text, CONTEXT, reference=reference)
    assert_equal(found, whole_logits(own, text), whole_logits(theirs, text), text)


class Whole:
    """A model that is no module, so that nothing of it can be replaced."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, model.device

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def test_a_model_that_cannot_be_taken_apart() -> None:
    config, text = architecture("gemma2"), text_of()
    model = make_model(config)
    other = perturbed(model, config, 0.05)
    reference = Reference.record(Whole(model), Ids(), text, CONTEXT)
    assert not reference.portable
    found = score(Whole(other), Ids(), text, CONTEXT, reference=reference)
    assert_equal(found, whole_logits(other, text), whole_logits(model, text), text)


def test_a_stub_that_is_wrong_is_not_used() -> None:
    """A model whose logits depend on more than the last hidden states."""
    model, tokens = make_model(llama_config()), random_tokens(1, 24)[0]
    plain = type(model).forward

    def forward(self: Any, input_ids: Tensor, **options: Any) -> Any:
        output = plain(self, input_ids=input_ids, **options)
        output.logits = output.logits + input_ids.float().cumsum(1)[..., None]
        return output

    model.forward = forward.__get__(model)
    assert take_apart(model, tokens).second is None


def test_the_reference_lets_go_of_the_model(tmp_path: Path) -> None:
    model, text = make_model(llama_config()), text_of()
    blocks = weakref.ref(model.model.layers[0])
    reference = Reference.record(model, Ids(), text, CONTEXT, folder=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == CHUNKS
    del model
    gc.collect()
    assert blocks() is None
    del reference
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_as_it_was() -> None:
    model, tokens = make_model(llama_config()), random_tokens(1, 24)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        score(model, Ids(), text_of(), CONTEXT)
        assert torch.equal(model(input_ids=tokens).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_refusals(tokenizer: PreTrainedTokenizerFast) -> None:
    model, text = make_model(llama_config()), text_of()
    reference = Reference.record(model, Ids(), text, CONTEXT)
    with pytest.raises(SalienceError, match="in chunks of 32 tokens, not of 16"):
        score(model, Ids(), text, 16, reference=reference)
    with pytest.raises(SalienceError, match="other tokens, from token 0 on"):
        score(model, Ids(), text_of(seed=2), CONTEXT, reference=reference)
    with pytest.raises(SalienceError, match="other tokens, from token 64 on"):
        score(model, Ids(), text, CONTEXT, max_chunks=2, reference=reference)
    words = Reference.record(model, make_tokenizer(), TEXT[:2000], CONTEXT)
    with pytest.raises(SalienceError, match="compare models of one tokenizer"):
        score(model, Bytes(), TEXT[:2000], CONTEXT, reference=words)


class Bytes:
    """Another tokenizer."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode()[:256])}


@pytest.mark.slow
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a chunk are 240 MB, those of all 720; slices of them are 8 MB each."""
    monkeypatch.setattr(module, "_HEAD_NUMBERS", 2**21)
    width, context = 40_000, 1500
    config = llama_config(
        vocab_size=width, hidden_size=32, num_hidden_layers=1, max_position_embeddings=context
    )
    model, text = make_model(config), text_of(width, 3 * context)
    with Sampler(interval=0.01) as sampler:
        start = sampler.sample().resident
        reference = Reference.record(model, Ids(), text, context)
        found = score(model, Ids(), text, context, reference=reference)
        rise = sampler.peak.resident - start
    assert found.mean_kl == 0.0 and len(found.nll) == 3
    assert rise < 120 * 2**20
