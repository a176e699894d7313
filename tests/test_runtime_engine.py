"""The engine against Transformers: the same tokens, whatever shares the batch or the cache."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from salience.errors import SalienceError
from salience.runtime import Engine, Event, Request, Result, Sampling, runner
from salience.runtime.cache import SlotCache, padded
from salience.runtime.step import Sequential, Step, make_step
from tiny_architectures import COMMON, OTHERS, REFUSED, architecture
from tiny_models import llama_config, make_model, make_tokenizer, random_tokens

TOKENIZER = make_tokenizer()
# What Transformers' own `generate` fails on: it computes all tokens again for each.
BROKEN = ("recurrent_gemma", "xlstm")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(llama_config()).requires_grad_(False)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in random_tokens(1, length, seed=seed)[0]]


def greedy(count: int, **changes: Any) -> Sampling:
    return Sampling(max_new_tokens=count, ignore_eos=True, **changes)


def expected(model: Any, tokens: list[int], count: int, **options: Any) -> list[int]:
    """What Transformers generates."""
    out = model.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return [int(token) for token in out[0, len(tokens) :]]


class Counted:
    """The numbers of tokens that each call of a model computes."""

    def __init__(self, model: Any) -> None:
        self.calls: list[tuple[int, ...]] = []
        self._handle = model.get_input_embeddings().register_forward_pre_hook(
            lambda _module, inputs: self.calls.append(tuple(inputs[0].shape))
        )

    def __enter__(self) -> list[tuple[int, ...]]:
        return self.calls

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


LENGTHS = (5, 8, 23, 33)


def check_architecture(name: str, fast: bool = True) -> Engine:
    """Prompts of several lengths in one batch, some prefilled together and some in chunks, against
    the plain model.

    A token may differ where the best two logits are as good as equal.
    """
    model = make_model(architecture(name)).requires_grad_(False)
    options = {"use_cache": False} if name in BROKEN else {}
    engine = Engine(model, max_batch=3, prefill_chunk=16, max_context=64, fast=fast)
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    for tokens, result in zip(prompts, engine.generate(prompts, greedy(8)), strict=True):
        with torch.no_grad():
            ids = torch.tensor([tokens + result.tokens])
            logits = model(input_ids=ids, **options).logits[0]
        logits = logits[len(tokens) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
        assert ((logits.max(-1).values - chosen) < 1e-3 * logits.std()).all(), name
    return engine


# Families: plain, learned positions, sliding windows with soft caps, alibi, latent attention,
# experts, chunks, shared layers, and what needs its own cache.
FAMILIES = {
    "llama": True,
    "opt": True,
    "gpt2": True,
    "gemma2": True,
    "gemma3_text": True,
    "gemma4_text": True,
    "mistral": True,
    "bloom": True,
    "mpt": True,
    "falcon-rw": True,
    "deepseek_v3": True,
    "mixtral": True,
    "gpt_oss": True,
    "llama4_text": True,
    "gpt_neo": False,
    "mamba": False,
    "qwen3_next": False,
    "openai-gpt": False,
    "xlstm": False,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    assert check_architecture(name).static == FAMILIES[name]


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", sorted({*COMMON, *OTHERS, *REFUSED}))
def test_architectures(name: str, fast: bool) -> None:
    check_architecture(name, fast)


@pytest.mark.parametrize("fast", [True, False])
def test_tokens_are_those_of_transformers(model: Any, fast: bool) -> None:
    prompts = [prompt(length, seed=length) for length in (1, *LENGTHS)]
    results = Engine(model, max_batch=2, prefill_chunk=9, fast=fast).generate(prompts, greedy(20))
    for tokens, result in zip(prompts, results, strict=True):
        assert result.tokens == expected(model, tokens, 20)
        assert result.finish_reason == "length"
        assert result.prompt_tokens == len(tokens)


def test_repetition_penalty_is_that_of_transformers(model: Any) -> None:
    tokens = prompt(12)
    found = Engine(model).generate([tokens], greedy(15, repetition_penalty=1.7))[0]
    assert found.tokens == expected(model, tokens, 15, repetition_penalty=1.7)
    assert found.tokens != expected(model, tokens, 15)


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_chunks_give_the_logits_of_the_whole(model: Any, chunk: int) -> None:
    tokens = random_tokens(1, 30)
    step = Step(model, SlotCache(2, 64), 320)
    with torch.no_grad():
        whole = model(input_ids=tokens).logits[:, -1]
        for start in range(0, 30, chunk):
            found = step.prefill(1, tokens[:, start : start + chunk], start)
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


def steps(model: Any, lengths: tuple[int, ...], count: int, capacity: int) -> Iterator[Any]:
    """Logits of steps over slots of several lengths, and those of the plain model."""
    texts = random_tokens(len(lengths), 40)
    cache = SlotCache(len(lengths) + 1, capacity)
    step = Step(model, cache, 320)
    for row, length in enumerate(lengths):
        step.prefill(row + 1, texts[row : row + 1, :length], 0)
    for i in range(count):
        positions = torch.tensor([length + i for length in lengths])
        cache.at_rows(positions, first=1, length=capacity)
        found = step(texts.gather(1, positions[:, None]), positions)
        for row, length in enumerate(lengths):
            plain = model(input_ids=texts[row : row + 1, : length + i + 1]).logits[0, -1]
            yield found[row], plain


@torch.no_grad()
def test_rows_at_their_own_positions(model: Any) -> None:
    for found, plain in steps(model, (3, 17, 9), 4, 64):
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_step_can_be_traced(model: Any) -> None:
    """To an ATen graph of the same signature, for other tokens and positions too."""
    step = make_step(model, 2, 64)
    assert isinstance(step, Step) and not step.waits
    tokens = random_tokens(2, 20)
    for row, length in enumerate((9, 5)):
        step.prefill(row, tokens[row : row + 1, :length], 0)
    positions = torch.tensor([9, 5])
    step.cache.at_rows(positions)
    traced = make_fx(step)(torch.tensor([[7], [8]]), positions)
    for i in range(3):
        positions = torch.tensor([9 + i, 5 + i])
        found = traced(tokens.gather(1, positions[:, None]), positions)
        for row in range(2):
            plain = model(input_ids=tokens[row : row + 1, : positions[row] + 1]).logits[0, -1]
            torch.testing.assert_close(found[row], plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_a_fast_step_takes_the_place(model: Any, fast: bool) -> None:
    engine = Engine(model, max_batch=2, max_context=100, fast=fast)
    prompts = [prompt(length, seed=length) for length in (8, 20)]
    wanted = [expected(model, tokens, 9) for tokens in prompts]
    for tokens, one in zip(prompts, wanted, strict=True):
        assert engine.generate([tokens], greedy(9))[0].tokens == one
    assert [r.tokens for r in engine.generate(prompts, greedy(9))] == wanted
    with Counted(model) as calls:  # all is traced by now
        results = engine.generate(prompts, greedy(9))
    assert [r.tokens for r in results] == wanted
    steps = [call for call in calls if call[1] == 1][2:]  # but for the last tokens of the prompts
    assert (len(steps) == 0) == fast


def test_fast_falls_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "optimize", lambda step, *_, **__: step)
    engine = Engine(model, max_batch=2, max_context=500)
    assert engine.generate([prompt(8)], greedy(9))[0].tokens == expected(model, prompt(8), 9)
    assert engine._runner.step.cache.length == padded(8 + 9)  # type: ignore[union-attr]


def test_a_turn_prefills_only_new_text(model: Any) -> None:
    engine = Engine(model, max_batch=2, prefill_chunk=100)
    first = prompt(30)
    reply = engine.generate([first], greedy(6))[0]
    turn = [*first, *reply.tokens, *prompt(4, seed=9)]
    with Counted(model) as calls:
        found = engine.generate([turn], greedy(3))[0]
    # The last token of the reply was drawn and never fed.
    assert calls == [(1, 5)]
    assert found.cached_tokens == len(turn) - 5
    assert found.tokens == expected(model, turn, 3)


def test_a_prompt_that_turns_off_in_the_middle(model: Any) -> None:
    engine = Engine(model, prefill_chunk=100)
    first = prompt(30)
    engine.generate([first], greedy(2))
    other = [*first[:20], 5, *prompt(7, seed=3)]
    assert other[20] != first[20]
    with Counted(model) as calls:
        found = engine.generate([other], greedy(4))[0]
    assert calls[0] == (1, 8) and found.cached_tokens == 20
    assert found.tokens == expected(model, other, 4)
    again = engine.generate([other], greedy(4))[0]
    assert again.tokens == found.tokens and again.cached_tokens == 27  # the last is for its logits


def test_what_a_running_reply_shares_is_copied(model: Any) -> None:
    engine = Engine(model, max_batch=2, prefill_chunk=100)
    shared = prompt(40)
    running = engine.submit([*shared, 7], greedy(30))
    engine.step()
    found = engine.generate([[*shared, 9, 8]], greedy(5))[0]
    assert found.cached_tokens == 40
    assert found.tokens == expected(model, [*shared, 9, 8], 5)
    while not running.finished:
        engine.step()
    assert running.result().tokens == expected(model, [*shared, 7], 30)


def test_prompts_are_prefilled_together(model: Any) -> None:
    """Of about one length, from one position on, in neighbouring slots, as many as a chunk has."""
    engine = Engine(model, max_batch=6, prefill_chunk=64)
    lengths = (10, 12, 6, 20, 19, 40)
    prompts = [prompt(length, seed=length) for length in lengths]
    with Counted(model) as calls:
        results = engine.generate(prompts, greedy(6))
    assert [call for call in calls if call[1] > 1] == [(3, 12), (2, 20), (1, 40)]
    for tokens, result in zip(prompts, results, strict=True):
        assert result.tokens == expected(model, tokens, 6)
    talks = [[*p, *r.tokens, 7, 9] for p, r in zip(prompts[:2], results[:2], strict=True)]
    for talk, result in zip(talks, engine.generate(talks, greedy(6)), strict=True):
        assert result.tokens == expected(model, talk, 6)
        assert result.cached_tokens == len(talk) - 3


def test_a_long_prompt_goes_on_when_a_short_one_is_done(model: Any) -> None:
    engine = Engine(model, max_batch=2, prefill_chunk=30)
    prompts = [prompt(length, seed=length) for length in (12, 15)]
    prompts.append([*prompts[0], 3])
    with Counted(model) as calls:
        results = engine.generate(prompts, [greedy(3, temperature=2.0), greedy(9), greedy(4)])
    assert calls[0] == (2, 15)
    for i in (1, 2):
        assert results[i].tokens == expected(model, prompts[i], len(results[i].tokens))


def test_models_whose_prompts_go_one_by_one(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Step._forward

    def refuse(self: Step, ids: Tensor, positions: Tensor, keep: Any = 1) -> Tensor:
        if len(ids) > 1 and ids.shape[1] > 1:
            raise ValueError("one row only")
        return forward(self, ids, positions, keep)

    monkeypatch.setattr(Step, "_forward", refuse)
    prompts = [prompt(length, seed=length) for length in (12, 12)]
    engine = Engine(model, max_batch=2)
    assert engine.static
    for tokens, result in zip(prompts, engine.generate(prompts, greedy(4)), strict=True):
        assert result.tokens == expected(model, tokens, 4)


def test_two_talks_keep_their_slots(model: Any) -> None:
    engine = Engine(model, max_batch=2)
    talks = [prompt(20, seed=1), prompt(25, seed=2)]
    for turn in range(3):
        for talk in talks:
            found = engine.generate([talk], greedy(4))[0]
            assert found.tokens == expected(model, talk, 4)
            assert found.cached_tokens >= (len(talk) - 4 if turn else 0)
            talk += [*found.tokens, *prompt(3, seed=turn)]


def test_prompts_wait_for_a_slot(model: Any) -> None:
    engine = Engine(model, max_batch=2, prefill_chunk=8)
    prompts = [prompt(3 + seed, seed=seed) for seed in range(7)]
    samplings = [greedy(2 + seed % 3) for seed in range(7)]
    results = engine.generate(prompts, samplings)
    for tokens, sampling, result in zip(prompts, samplings, results, strict=True):
        assert result.tokens == expected(model, tokens, sampling.max_new_tokens)
    assert engine.idle and engine.free_slots == 2 and engine.waiting == 0


def test_sampled_rows_do_not_know_of_each_other(model: Any) -> None:
    sampling = [
        greedy(12, temperature=1.5, seed=4, top_p=0.9),
        greedy(12, temperature=0.8, seed=5, presence_penalty=1.0),
        greedy(12),
        greedy(12, temperature=1.5, seed=6, logprobs=2),
    ]
    prompts = [prompt(9, seed=seed) for seed in range(4)]
    together = Engine(model, max_batch=4).generate(prompts, sampling)
    alone = [Engine(model).generate([p], s)[0] for p, s in zip(prompts, sampling, strict=True)]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    again = Engine(model, max_batch=2).generate(prompts, sampling)
    assert [r.tokens for r in again] == [r.tokens for r in alone]
    other = Engine(model).generate([prompts[0]], greedy(12, temperature=1.5, seed=40, top_p=0.9))
    assert other[0].tokens != alone[0].tokens


def test_logprobs(model: Any) -> None:
    tokens = prompt(9)
    found = Engine(model).generate([tokens], greedy(5, logprobs=3))[0]
    assert found.logprobs is not None and len(found.logprobs) == 5
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens + found.tokens])).logits[0, 8:-1]
    for row, entry in zip(logits.double().log_softmax(-1), found.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
        assert entry.top[0][0] == entry.token
    assert Engine(model).generate([tokens], greedy(1))[0].logprobs is None


def test_guided_replies(model: Any) -> None:
    """A mask before each token: only a token that is as long as the reply is now."""
    engine = Engine(model, max_batch=2)
    request = engine.submit(prompt(5), greedy(6), guided=True)
    free = engine.submit(prompt(5, seed=1), greedy(6))
    for _ in range(2):
        engine.step()
    assert request.tokens == [] and len(free.tokens) > 0  # it waits for its mask alone
    while not request.finished or not free.finished:
        mask = torch.zeros(10, dtype=torch.int32)
        mask[1] = 1 << len(request.tokens)
        request.allow(mask)
        engine.step()
    assert request.result().tokens == [32 + n for n in range(6)]
    assert free.result().tokens == expected(model, prompt(5, seed=1), 6)


def test_ends_at_a_token(model: Any) -> None:
    tokens = prompt(9)
    ids = expected(model, tokens, 12)
    end = next(token for token in ids if token != ids[0])
    found = Engine(model, TOKENIZER).generate([tokens], greedy(12, stop_token_ids=(end,)))[0]
    assert found.tokens == ids[: ids.index(end) + 1] and found.finish_reason == "stop"
    assert found.text == TOKENIZER.decode(found.tokens[:-1])


def test_ends_at_the_models_own_token(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(9)
    ids = expected(model, tokens, 12)
    end = next(token for token in ids if token != ids[0])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, 1])
    engine = Engine(model)
    assert engine.generate([tokens], Sampling(max_new_tokens=12))[0].tokens[-1] == end
    assert engine.generate([tokens], greedy(12))[0].tokens == ids


def test_stop_strings(model: Any) -> None:
    tokens = prompt(9)
    engine = Engine(model, TOKENIZER)
    whole = engine.generate([tokens], greedy(30, temperature=3.0))[0]
    assert len(whole.text) > 20
    stop = whole.text[10:14]
    events = list(engine.stream(tokens, greedy(30, temperature=3.0, stop=(stop,))))
    text = "".join(event.text for event in events)
    assert text == whole.text[: whole.text.index(stop)]
    assert events[-1].finish_reason == "stop"
    assert all(event.finish_reason is None for event in events[:-1])


def test_stream_is_generate(model: Any) -> None:
    engine = Engine(model, TOKENIZER, max_batch=2)
    result = engine.generate([prompt(9)], greedy(20))[0]
    events = list(engine.stream(prompt(9), greedy(20)))
    assert [token for event in events for token in event.tokens] == result.tokens
    assert "".join(event.text for event in events) == result.text
    assert result.text == TOKENIZER.decode(result.tokens)
    assert [event.finish_reason for event in events] == [None] * 19 + ["length"]


def test_closing_a_stream_frees_its_slot(model: Any) -> None:
    engine = Engine(model, TOKENIZER)
    stream = engine.stream(prompt(9), greedy(200))
    head = [next(stream) for _ in range(3)]
    assert engine.free_slots == 0
    stream.close()  # type: ignore[attr-defined]
    assert engine.idle
    with Counted(model) as calls:
        again = list(engine.stream(prompt(9), greedy(3)))
    assert [event.tokens for event in again] == [event.tokens for event in head]
    assert calls[0] == (1, 1)  # the prompt is still there


def test_a_stream_that_is_never_read_takes_no_slot(model: Any) -> None:
    engine = Engine(model)
    engine.stream(prompt(9), greedy(5))
    assert engine.idle


def test_cancel(model: Any) -> None:
    engine = Engine(model, TOKENIZER, max_batch=1, prefill_chunk=4)
    running, waiting = (engine.submit(prompt(9, seed=s), greedy(50)) for s in range(2))
    for _ in range(5):
        engine.step()
    assert 0 < len(running.tokens) < 5
    waiting.cancel()
    threading.Thread(target=running.cancel).start()
    while not running.finished:
        events = engine.step()
    assert {event.finish_reason for event in events} <= {"cancelled", None}
    assert running.result().finish_reason == waiting.result().finish_reason == "cancelled"
    assert waiting.result().tokens == [] and waiting.result().tokens_per_second == 0
    assert engine.idle
    filling = engine.submit(prompt(30, seed=7), greedy(5))
    engine.step()
    filling.cancel()
    engine.step()
    assert engine.idle
    found = engine.generate([prompt(30, seed=7)], greedy(5))[0]
    assert found.cached_tokens == 4
    assert found.tokens == expected(model, prompt(30, seed=7), 5)


def test_threads_share_an_engine(model: Any) -> None:
    engine = Engine(model, max_batch=2)
    found: dict[int, list[int]] = {}

    def ask(seed: int) -> None:
        events = engine.stream(prompt(5 + seed, seed=seed), greedy(10))
        found[seed] = [token for event in events for token in event.tokens]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {s: expected(model, prompt(5 + s, seed=s), 10) for s in range(5)}


def test_a_reply_fills_the_context_and_no_more(model: Any) -> None:
    engine = Engine(model, max_context=32, max_batch=2)
    results = engine.generate([prompt(20), prompt(31)], greedy(99))
    assert [len(result.tokens) for result in results] == [12, 1]
    assert results[0].tokens == expected(model, prompt(20), 12)
    assert {result.finish_reason for result in results} == {"length"}


@pytest.mark.parametrize(
    ("tokens", "sampling", "message"),
    [
        ([], Sampling(), "the prompt is empty"),
        ([1] * 32, Sampling(), "the prompt has 32 tokens, which leaves no room .* context of 32"),
        ([1, 320], Sampling(), "the prompt has token 320, the model has 320 tokens"),
        ([-1], Sampling(), "the prompt has token -1"),
        ([1], Sampling(stop=("x",)), "stop strings need a tokenizer"),
    ],
)
def test_prompts_that_cannot_be(
    model: Any, tokens: list[int], sampling: Sampling, message: str
) -> None:
    engine = Engine(model, max_context=32)
    for ask in (engine.submit, engine.stream):
        with pytest.raises(SalienceError, match=message):
            ask(tokens, sampling)
    with pytest.raises(SalienceError, match=message):
        engine.generate([[1, 2], tokens], sampling)
    assert engine.idle


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "must be at least 1"),
        ({"prefill_chunk": 0}, "must be at least 1"),
        ({"max_context": 1}, "max_context is 1, must be at least 2"),
        ({"max_context": 513}, "max_context is 513, the model was made for 512 tokens"),
        ({"graphs": True}, "CUDA graphs need"),
    ],
)
def test_options_that_cannot_be(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SalienceError, match=message):
        Engine(model, **options)


def test_samplings_match_prompts(model: Any) -> None:
    with pytest.raises(SalienceError, match="2 prompts have 1 samplings"):
        Engine(model).generate([[1], [2]], [Sampling()])


def test_own_cache_says_so(caplog: pytest.LogCaptureFixture) -> None:
    state_space = make_model(architecture("mamba")).requires_grad_(False)
    engine = Engine(state_space, max_batch=2)
    assert not engine.static and not engine.graphs
    assert [record.message for record in caplog.records if record.name.startswith("salience")] == [
        "MambaForCausalLM runs with its own cache, one sequence at a time and without CUDA graphs "
        "(its state is a NoneType)"
    ]
    twice = [engine.generate([prompt(9)], greedy(5))[0] for _ in range(2)]
    assert twice[0].tokens == twice[1].tokens and twice[1].cached_tokens == 0
    assert isinstance(make_step(state_space, 1, 64), Sequential)


def test_a_cache_that_disagrees_is_not_used(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were Transformers to ask for positions in another way, the probe must see it."""
    monkeypatch.setattr(SlotCache, "get_query_offset", lambda self, layer_idx=0: 0)
    monkeypatch.setattr(SlotCache, "get_seq_length", lambda self, layer_idx=0: 0)
    step = make_step(model, 2, 64)
    assert isinstance(step, Sequential)
    tokens = prompt(9)
    assert Engine(model).generate([tokens], greedy(4))[0].tokens == expected(model, tokens, 4)


def test_times(model: Any) -> None:
    one, two = (Engine(model).generate([prompt(9)], greedy(n))[0] for n in (1, 2))
    assert isinstance(one, Result) and one.tokens_per_second == 0 < two.tokens_per_second
    assert 0 < two.first_token_seconds < two.seconds
    assert one.first_token_seconds == one.seconds


def test_events_name_their_request(model: Any) -> None:
    engine = Engine(model, max_batch=2)
    requests = [engine.submit(prompt(4, seed=s), greedy(2)) for s in range(2)]
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
    assert all(isinstance(event.request, Request) for event in events)
    for request in requests:
        own = [event for event in events if event.request is request]
        assert [token for event in own for token in event.tokens] == request.result().tokens
        assert list(request.events) == own


def test_after_a_reset_nothing_of_the_cache_is_used(model: Any) -> None:
    engine = Engine(model, max_batch=2, prefill_chunk=8)
    first = engine.submit(prompt(20), greedy(4))
    waiting = [engine.submit(prompt(12, seed=i), greedy(4)) for i in range(3)]
    engine.step()
    assert engine.cache_tokens > 0
    engine.reset()
    assert engine.idle and engine.cache_tokens == 0
    assert all(each.finish_reason == "cancelled" for each in (first, *waiting))
    (result,) = engine.generate([prompt(20)], greedy(4))
    assert result.tokens == expected(model, prompt(20), 4) and result.cached_tokens == 0


def test_replies_are_made_in_the_first_slots_and_talks_stay_in_the_cache(model: Any) -> None:
    engine = Engine(model, max_batch=16, max_context=128)
    talks = [prompt(40, seed=i) for i in range(6)]
    for turn in range(3):
        for i, talk in enumerate(talks):
            request = engine.submit(talk, greedy(4))
            while not engine.idle:
                engine.step()
            result = request.result()
            assert request.slot == 0, "a step of one reply has one row"
            assert result.tokens == expected(model, talk, 4)
            assert result.cached_tokens >= (len(talk) - 6 if turn else 0)
            talks[i] = [*talk, *result.tokens, *prompt(5, seed=10 * turn + i)]
