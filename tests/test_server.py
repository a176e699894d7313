"""The server through OpenAI's own client, against the engine by itself."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from helpers_server import MESSAGES, Served, serving, tiny_engine
from salience.chat.prompt import encode
from salience.errors import SalienceError
from salience.runtime import Sampling
from salience.server.guard import Limits
from tiny_models import make_tokenizer


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as made:
        yield made


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return served.client()


def chat(client: openai.OpenAI, count: int = 24, **options: Any) -> Any:
    values: dict[str, Any] = {"temperature": 0, "max_tokens": count, **options}
    return client.chat.completions.create(model="tiny", messages=MESSAGES, **values)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "salience"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_a_chat(served: Served, client: openai.OpenAI) -> None:
    expected = served.reply(Sampling(max_new_tokens=24))
    answer = chat(client)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == expected.prompt_tokens + 24
    assert answer.model == "tiny" and answer.object == "chat.completion"


def test_a_stream_says_the_same(served: Served, client: openai.OpenAI) -> None:
    expected = served.reply(Sampling(max_new_tokens=60))
    chunks = list(chat(client, 60, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    *said, last = chunks
    assert [chunk.choices[0].finish_reason for chunk in said] == [None] * (len(said) - 1) + [
        "length"
    ]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in said)
    assert text == expected.text
    assert last.choices == [] and last.usage.completion_tokens == 60
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in said)


def test_no_usage_unless_asked(client: openai.OpenAI) -> None:
    assert all(chunk.choices for chunk in chat(client, 4, stream=True))


def test_texts_end_before_a_stop_string(served: Served, client: openai.OpenAI) -> None:
    text = served.reply(Sampling(max_new_tokens=60)).text
    stop = text[20:24]
    expected = text[: text.index(stop)]
    answer = chat(client, 60, stop=["not in it at all", stop]).choices[0]
    assert answer.message.content == expected and answer.finish_reason == "stop"
    chunks = list(chat(client, 60, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_end_token_is_no_part_of_a_reply(served: Served, client: openai.OpenAI) -> None:
    tokens = served.reply(Sampling(max_new_tokens=24)).tokens
    extra = {"stop_token_ids": [tokens[7]]}
    answer = chat(client, logprobs=True, extra_body=extra)
    first = tokens.index(tokens[7])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == first + 1
    assert len(answer.choices[0].logprobs.content or ()) == first


def test_logprobs(served: Served, client: openai.OpenAI) -> None:
    expected = served.reply(Sampling(max_new_tokens=12))
    prompt = encode(served.service.tokenizer, MESSAGES)
    with torch.no_grad():
        logits = served.service.engine.model(torch.tensor([prompt + expected.tokens])).logits[0]
    logprobs = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    top = logprobs.topk(3).values
    for stream in (False, True):
        options = {"logprobs": True, "top_logprobs": 3, "stream": stream}
        answer = chat(client, 12, **options)
        parts = list(answer) if stream else [answer]
        found = [
            entry
            for part in parts
            for choice in part.choices
            for entry in (choice.logprobs.content if choice.logprobs else ())
        ]
        assert len(found) == 12
        for row, token, entry in zip(logprobs, expected.tokens, found, strict=True):
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        for row, entry in zip(top, found, strict=True):
            given = [each.logprob for each in entry.top_logprobs]
            assert given == pytest.approx(row.tolist(), abs=1e-4)
        text = b"".join(bytes(entry.bytes or ()) for entry in found)
        assert text.decode(errors="replace") == expected.text


def test_seeds_and_four_replies(client: openai.OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        answer = chat(client, 16, temperature=1.5, **options)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.message.content for choice in answer.choices]

    four = texts(n=4, seed=11)
    assert len(set(four)) == 4
    assert four == texts(n=4, seed=11)
    assert [texts(seed=11 + i) for i in range(4)] == [[text] for text in four]
    assert texts()[0] != texts()[0], "without a seed each reply is another"
    streamed = [""] * 4
    for chunk in chat(client, 16, temperature=1.5, n=4, seed=11, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == four


def test_sampling_fields_reach_the_engine(served: Served, client: openai.OpenAI) -> None:
    expected = served.reply(
        Sampling(
            max_new_tokens=16,
            temperature=1.3,
            top_p=0.9,
            top_k=40,
            min_p=0.01,
            presence_penalty=0.5,
            frequency_penalty=0.25,
            repetition_penalty=1.2,
            seed=5,
        )
    )
    options = {"temperature": 1.3, "top_p": 0.9, "presence_penalty": 0.5, "seed": 5}
    extra = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "unknown": [1]}
    answer = chat(client, 16, frequency_penalty=0.25, **options, extra_body=extra)
    assert answer.choices[0].message.content == expected.text


@pytest.mark.parametrize("seed", range(4))
def test_a_second_turn_reads_only_what_is_new(client: openai.OpenAI, seed: int) -> None:
    """Also where the drawn tokens are not those of their text, as random ones seldom are."""
    tokenizer = make_tokenizer()
    messages: list[Any] = [{"role": "user", "content": f"what is module {seed}"}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=40, temperature=1.0, seed=seed, n=2
    )
    text = "<|end|><|user|>and then<|end|><|assistant|>"
    new = len(tokenizer(text)["input_ids"])
    for choice in answer.choices:
        said = choice.message.content or ""
        talk = [
            *messages,
            {"role": "assistant", "content": said},
            {"role": "user", "content": "and then"},
        ]
        again = client.chat.completions.create(model="tiny", messages=talk, max_tokens=2).usage
        assert again is not None and again.prompt_tokens_details is not None
        # A reply that was cut off has its last token still to be computed.
        left = again.prompt_tokens - (again.prompt_tokens_details.cached_tokens or 0)
        assert left in (new, new + 1), choice.finish_reason


def test_message_parts(served: Served, client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "a module"}]
    messages: list[Any] = [{"role": "user", "content": parts}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=24, temperature=0
    )
    assert answer.choices[0].message.content == served.reply(Sampling(max_new_tokens=24)).text


def test_images_are_refused(client: openai.OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "see"}, image]}]
    with pytest.raises(openai.BadRequestError, match="no images") as caught:
        client.chat.completions.create(model="tiny", messages=messages)
    assert caught.value.param == "messages.0.content.1"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model": "other"}, openai.NotFoundError, "does not exist"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"content": "x"}]}, openai.BadRequestError, "no role"),
        ({"messages": [{"role": "user"}]}, openai.BadRequestError, "no content"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n: "),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs needs logprobs"),
        ({"logit_bias": {"1": 5}}, openai.BadRequestError, "logit_bias"),
        ({"response_format": {"type": "json"}}, openai.BadRequestError, "may be text"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "needs an object"),
        ({"extra_body": {"stop": [""]}}, openai.BadRequestError, "stop"),
    ],
)
def test_what_is_refused(
    client: openai.OpenAI, options: dict[str, Any], error: type[openai.APIStatusError], words: str
) -> None:
    values: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, **options}
    with pytest.raises(error, match=words):
        client.chat.completions.create(**values)


def test_too_long_for_the_context(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "module " * 3000}]
    with pytest.raises(openai.BadRequestError, match="context is 2048 tokens") as caught:
        client.chat.completions.create(model="tiny", messages=messages)
    assert caught.value.code == "context_length_exceeded"


def test_completions(served: Served, client: openai.OpenAI) -> None:
    tokenizer = served.service.tokenizer
    texts = ["the module", "a function that is"]
    tokens = [list(tokenizer(text)["input_ids"]) for text in texts]
    engine = tiny_engine()
    expected = [r.text for r in engine.generate(tokens, Sampling(max_new_tokens=8))]
    create = client.completions.create
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    assert create(prompt=texts[0], **options).choices[0].text == expected[0]
    assert create(prompt=tokens[1], **options).choices[0].text == expected[1]
    for prompts in (texts, tokens):
        answer = create(prompt=prompts, n=2, **options)
        assert [choice.text for choice in answer.choices] == [
            text for text in expected for _ in range(2)
        ]
        assert answer.usage is not None and answer.usage.completion_tokens == 32
    assert create(prompt=texts[0], echo=True, **options).choices[0].text == texts[0] + expected[0]
    streamed = ["", ""]
    for chunk in create(prompt=texts, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected
    logprobs = create(prompt=texts[0], logprobs=2, **options).choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or ()) == len(logprobs.token_logprobs or ()) == 8
    assert all(len(top) <= 2 for top in logprobs.top_logprobs or ())
    assert (logprobs.text_offset or [])[0] == 0
    with pytest.raises(openai.BadRequestError, match="suffix"):
        create(prompt=texts[0], suffix="end", **options)
    with pytest.raises(openai.BadRequestError, match="prompt"):
        create(prompt=[], **options)
    with pytest.raises(openai.BadRequestError, match="tokens must be between"):
        create(prompt=[1, 10**9], **options)


def test_many_at_once_say_what_each_says_alone(served: Served) -> None:
    def one(i: int) -> str:
        client = served.client()
        answer = chat(client, 10 + i, temperature=1.0, seed=i, stream=i % 2 == 0)
        if i % 2:
            return str(answer.choices[0].message.content)
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(one, range(12)))
    expected = [
        served.reply(Sampling(max_new_tokens=10 + i, temperature=1.0, seed=i)).text
        for i in range(12)
    ]
    assert texts == expected
    assert served.settles(lambda: served.is_idle)


class Spelled:
    """A guide that allows one text, then the end."""

    def __init__(self, tokens: list[int]) -> None:
        self._left = [*tokens, 0]

    def mask(self, left: int | None = None) -> torch.Tensor:
        mask = torch.zeros(10, dtype=torch.int32)
        mask[self._left[0] // 32] |= (
            1 << self._left[0] % 32 if self._left[0] % 32 < 31 else -(2**31)
        )
        return mask

    def accept(self, token: int) -> None:
        assert token == self._left.pop(0)


class Guides:
    """Makes them of patterns that are plain texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def regex(self, pattern: str) -> Spelled:
        if pattern == "(":
            raise SalienceError("the pattern '(' is not closed")
        return Spelled(list(self._tokenizer(pattern)["input_ids"]))

    def json_object(self) -> Spelled:
        return self.regex("{}")

    def json_schema(self, schema: dict[str, Any]) -> Spelled:
        return self.regex(json.dumps(schema["const"]))

    def grammar(self, text: str) -> Spelled:
        return self.regex(text)


def test_guided_replies() -> None:
    engine = tiny_engine()
    with serving(engine, guides=Guides(engine.tokenizer)) as served:
        client = served.client()

        def text(count: int = 64, **options: Any) -> str:
            choice = chat(client, count, temperature=1.0, **options).choices[0]
            assert choice.finish_reason == "stop"
            return str(choice.message.content)

        assert text(response_format={"type": "json_object"}) == "{}"
        schema = {"name": "x", "schema": {"const": ["a", "b c"]}}
        form: Any = {"type": "json_schema", "json_schema": schema}
        assert json.loads(text(response_format=form)) == ["a", "b c"]
        assert text(extra_body={"guided_regex": "exactly this"}) == "exactly this"
        assert text(extra_body={"structured_outputs": {"regex": "and this"}}) == "and this"
        for choice in chat(client, 40, n=3, extra_body={"guided_regex": "three"}).choices:
            assert choice.message.content == "three"
        with pytest.raises(openai.BadRequestError, match="not closed"):
            text(extra_body={"guided_regex": "("})
        with pytest.raises(openai.BadRequestError, match="only one form"):
            text(extra_body={"guided_regex": "a", "guided_json": {}})
        # Those that are guided and those that are not share steps.
        with ThreadPoolExecutor(4) as pool:
            free = [pool.submit(chat, client, 30) for _ in range(2)]
            guided = [pool.submit(text, extra_body={"guided_regex": "exactly this"})]
            assert guided[0].result() == "exactly this"
            expected = served.reply(Sampling(max_new_tokens=30)).text
            assert [f.result().choices[0].message.content for f in free] == [expected] * 2


def test_a_server_without_guides_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no guided replies"):
        chat(client, response_format={"type": "json_object"})


def test_the_key() -> None:
    with serving(limits=Limits(api_key="a secret")) as served:
        assert [m.id for m in served.client("a secret").models.list()] == ["tiny"]
        for wrong in ("a secre", "a secret2", "other"):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                served.client(wrong).models.list()


def test_a_full_queue_is_refused_and_recovers() -> None:
    with serving(tiny_engine(slots=1), queue=1) as served:
        client = served.client()
        streams = [chat(client, 1500, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="too many") as caught:
            chat(client)
        assert caught.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()
        assert served.settles(lambda: served.is_idle)
        assert chat(client, 2).usage.completion_tokens == 2


def test_a_failing_step_fails_its_requests_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    with serving(engine) as served:
        client = served.client()
        expected = chat(client).choices[0].message.content
        step = engine.step

        def broken() -> Any:
            monkeypatch.setattr(engine, "step", step)
            raise RuntimeError("out of something")

        monkeypatch.setattr(engine, "step", broken)
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            chat(client)
        assert chat(client).choices[0].message.content == expected
        assert served.service.worker.state == "ok"


def test_an_engine_that_is_broken_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    with serving(engine) as served:
        client = served.client()

        def broken() -> Any:
            raise RuntimeError("out of something")

        monkeypatch.setattr(engine, "step", broken)
        for _ in range(3):
            with pytest.raises(openai.InternalServerError):
                chat(client)
        assert served.settles(lambda: served.service.worker.state == "failed")
        with pytest.raises(openai.InternalServerError, match="must be started again"):
            chat(client)
