"""Structured output, tools and responses through OpenAI's own client, against a running server."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from helpers_server import Served, serving, tiny_engine
from salience.runtime.limits import end_tokens
from salience.server import responses
from salience.server.errors import ApiError
from salience.server.guide import Guides
from salience.server.tools import Tools

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
FLAT: Any = {"type": "function", **TOOL["function"]}
HELLO: Any = [{"role": "user", "content": "hello"}]
PIXEL = "data:image/png;base64,AAAA"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    engine = tiny_engine()
    ends = end_tokens(engine.model, engine.tokenizer)
    guides = Guides(engine.tokenizer, engine.model.config.vocab_size, ends)
    with serving(engine, guides=guides, tools=Tools.of) as made:
        yield made


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return served.client()


def chat(client: openai.OpenAI, **options: Any) -> Any:
    values: dict[str, Any] = {"messages": HELLO, "max_tokens": 60, "temperature": 1.0, **options}
    return client.chat.completions.create(model="tiny", **values)


@pytest.mark.parametrize("seed", range(4))
def test_json_schema(client: openai.OpenAI, seed: int) -> None:
    choice = chat(client, response_format=FORMAT, seed=seed).choices[0]
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert choice.finish_reason == "stop"


def test_json_schema_streamed_and_several(client: openai.OpenAI) -> None:
    texts = ["", "", ""]
    for chunk in chat(client, response_format=FORMAT, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_json_object_and_regex(client: openai.OpenAI) -> None:
    text = chat(client, response_format={"type": "json_object"}).choices[0].message.content
    assert isinstance(json.loads(text), dict)
    said = chat(client, extra_body={"guided_regex": "[ab]{3}"}).choices[0].message.content
    assert len(said) == 3 and set(said) <= {"a", "b"}


def test_a_bad_schema(client: openai.OpenAI) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"type": "strin"}}}
    with pytest.raises(openai.BadRequestError, match="none of JSON schema"):
        chat(client, response_format=bad)


def test_a_forced_call(client: openai.OpenAI) -> None:
    choice = chat(client, tools=[TOOL], tool_choice="required", max_tokens=200).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    call = choice.message.tool_calls[0]
    assert call.function.name == "add" and call.id.startswith("call_")
    jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])
    # And the talk goes on with its result.
    history = [*HELLO, choice.message.model_dump(), _result(call.id)]
    assert chat(client, messages=history, tools=[TOOL]).choices[0].message.role == "assistant"


def _result(code: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": code, "content": "3"}


def test_a_streamed_call(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    chunks = list(
        chat(
            client,
            tools=[TOOL],
            tool_choice=named,
            parallel_tool_calls=False,
            max_tokens=200,
            stream=True,
        )
    )
    pieces = [piece for c in chunks for piece in c.choices[0].delta.tool_calls or []]
    assert {piece.index for piece in pieces} == {0} and pieces[0].function.name == "add"
    arguments = json.loads("".join(piece.function.arguments for piece in pieces))
    jsonschema.validate(arguments, TOOL["function"]["parameters"])
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_tools_that_are_wrong_or_not_used(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"function\.name"):
        chat(client, tools=[{"type": "function", "function": {}}])
    assert chat(client, tools=[TOOL], tool_choice="none").choices[0].message.tool_calls is None
    assert chat(client, tools=[TOOL]).choices[0].message.role == "assistant"


def respond(client: openai.OpenAI, **options: Any) -> Any:
    values: dict[str, Any] = {"model": "tiny", "input": "hello", "max_output_tokens": 12, **options}
    return client.responses.create(**values)


def test_a_response(served: Served, client: openai.OpenAI) -> None:
    got = respond(client, instructions="Be brief.", temperature=0, metadata={"k": "v"})
    chatted = chat(
        client,
        messages=[{"role": "system", "content": "Be brief."}, *HELLO],
        temperature=0,
        max_tokens=12,
    )
    assert got.output_text == chatted.choices[0].message.content
    assert got.status == "incomplete" and got.incomplete_details.reason == "max_output_tokens"
    assert got.usage.input_tokens == chatted.usage.prompt_tokens
    assert got.usage.output_tokens == 12 and got.usage.total_tokens == got.usage.input_tokens + 12
    assert got.metadata == {"k": "v"} and got.object == "response" and got.error is None
    assert got.output[0].type == "message" and got.output[0].status == "completed"


def test_a_response_streamed(client: openai.OpenAI) -> None:
    events = list(respond(client, temperature=0, stream=True))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [kind for kind in kinds if kind != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in deltas)
    final = events[-1].response
    assert final.output_text == text == respond(client, temperature=0).output_text
    assert len(deltas) > 1 and {event.item_id for event in deltas} == {final.output[0].id}
    assert events[0].response.id == final.id and events[0].response.status == "in_progress"


def test_the_client_collects_a_stream(client: openai.OpenAI) -> None:
    """It wants a response that is complete, so it is held to a schema."""
    text: Any = {"format": {"type": "json_schema", "name": "it", "schema": SCHEMA}}
    with client.responses.stream(
        model="tiny", input="hello", max_output_tokens=60, text=text
    ) as stream:
        said = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    jsonschema.validate(json.loads(said), SCHEMA)
    assert final.output_text == said and final.status == "completed"


def test_a_response_in_json(client: openai.OpenAI) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "it", "schema": SCHEMA}}
    got = respond(client, text=text, max_output_tokens=60)
    assert got.status == "completed"
    jsonschema.validate(json.loads(got.output_text), SCHEMA)


def test_a_response_that_calls(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"tools": [FLAT], "tool_choice": {"type": "function", "name": "add"}}
    got = respond(client, max_output_tokens=200, parallel_tool_calls=False, **options)
    (call,) = got.output
    assert call.type == "function_call" and call.name == "add"
    jsonschema.validate(json.loads(call.arguments), FLAT["parameters"])
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    by_id = respond(client, input=[output], previous_response_id=got.id, temperature=0)
    items = [{"role": "user", "content": "hello"}, call.model_dump(), output]
    whole = respond(client, input=items, temperature=0)
    assert by_id.output_text == whole.output_text
    events = list(respond(client, max_output_tokens=200, stream=True, **options))
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"][:1]
    jsonschema.validate(json.loads(done.arguments), FLAT["parameters"])
    assert events[-1].response.output[0].arguments == done.arguments


def test_responses_are_kept_unless_told_not_to(client: openai.OpenAI) -> None:
    first = respond(client, temperature=0, instructions="only now")
    again = respond(client, input="more", previous_response_id=first.id, temperature=0)
    talk: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "more"},
    ]
    assert again.output_text == respond(client, input=talk, temperature=0).output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    for forgotten in (first.id, respond(client, store=False).id):
        with pytest.raises(openai.BadRequestError, match="there is no response") as error:
            respond(client, previous_response_id=forgotten)
        assert error.value.param == "previous_response_id"


def test_the_store_is_bounded() -> None:
    store = responses._Store(most=3, most_bytes=3000)
    for n in range(5):
        store.keep([], {"id": str(n)})
    assert list(store._kept) == ["2", "3", "4"]
    store.keep([{"content": "x" * 2980}], {"id": "big"})
    assert len(store._kept) <= 1 and store._left >= 0
    with pytest.raises(ApiError):
        store.get("4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "other"}, "does not exist"),
        ({"input": []}, "input is empty"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0 has type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.arguments must be text"),
        ({"tools": [{"type": "web_search"}]}, "only functions"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format has type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "needs an object schema"),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"background": True}, "background is not possible"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PIXEL}]}]},
            "input.0.content.0|reads text only",
        ),
    ],
)
def test_what_is_refused(client: openai.OpenAI, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.APIStatusError, match=message) as error:
        respond(client, **options)
    assert error.value.status_code in (400, 404)
