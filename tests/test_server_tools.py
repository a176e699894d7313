"""Tools: what is refused, what templates are given, grammars of calls, and calls in replies."""

import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salience.errors import SalienceError
from salience.runtime import Sampling
from salience.runtime.text import Detokenizer
from salience.server.guide import Guides
from salience.server.tool_parser import ToolDelta, ToolParser
from salience.server.tools import Tools, templated
from test_server_guide import walk
from tiny_models import make_tokenizer

# Small templates in the styles of real ones.
TAGS = (
    "{% if tools %}<|user|>In <tool_call> tags:{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|end|>{% endfor %}<|assistant|>"
)
LIST = TAGS.replace("<tool_call>", "[TOOL_CALLS]").replace("</tool_call>", "")
BARE = (
    '{% if tools %}<|user|>Answer {"name": f, "parameters": {}} to one of '
    "{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
NAMED = {"type": "function", "function": {"name": "weather"}}


def tokenizer(template: str | None = None) -> Any:
    made = make_tokenizer()
    if template is not None:
        made.chat_template = template
    return made


def of(template: str | None = None, choice: Any = None, **options: Any) -> Tools:
    made = Tools.of(tokenizer(template), TOOLS, choice, **options)
    assert made is not None
    return made


def test_none() -> None:
    assert Tools.of(tokenizer(), [], None) is None
    assert Tools.of(tokenizer(), None, "auto") is None
    assert Tools.of(tokenizer(TAGS), TOOLS, "none") is None


def function(**changes: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", **changes}}]


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ("weather", None, "tools must be a list"),
        ([{"type": "web_search"}], None, r"tools\[0\].type"),
        ([{"type": "function"}], None, r"tools\[0\].function must be"),
        (function(name="a b"), None, r"tools\[0\].function.name"),
        (function(name=""), None, r"function.name"),
        (function(name="x" * 65), None, r"function.name"),
        (function() * 2, None, r"tools\[1\].function.name is 'f'"),
        (function(description=1), None, r"description must be text"),
        (function(parameters=[1]), None, r"parameters must be a JSON schema"),
        (function(parameters={"type": "string"}), None, r"parameters.type"),
        (
            function(parameters={"properties": {"a": {"not": {}}}}, strict=True),
            None,
            r"tools\[0\].function.parameters: .*'not'",
        ),
        (function(), "always", "tool_choice must be"),
        (function(), {"type": "function", "function": {"name": "g"}}, "'g', which is not in tools"),
        ([], "required", "there are no tools"),
        (function() * 200, None, "at most 128"),
    ],
)
def test_refused(tools: Any, choice: Any, message: str) -> None:
    with pytest.raises(SalienceError, match=message):
        Tools.of(tokenizer(), tools, choice)


@pytest.mark.parametrize("template", [TAGS, LIST, BARE])
def test_a_template_that_knows_tools_is_given_them(template: str) -> None:
    made = of(template)
    assert made.template_tools == TOOLS
    messages = [{"role": "user", "content": "hi"}]
    assert made.messages(messages) == messages


def test_any_other_model_is_told_in_words() -> None:
    made = of()
    assert made.template_tools is None
    told = made.messages(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    )
    assert [each["role"] for each in told] == ["system", "user"]
    assert told[0]["content"].startswith("Be kind.\n\n") and "<tool_call>" in told[0]["content"]
    assert json.dumps(WEATHER["function"]) in told[0]["content"]
    assert [m["role"] for m in made.messages([{"role": "user", "content": "hi"}])] == [
        "system",
        "user",
    ]
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}x"
    made = of(strict)
    (only,) = made.messages([{"role": "user", "content": "hi"}])
    assert only["role"] == "user" and only["content"].endswith("\n\nhi")


HISTORY = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Bonn"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]


def test_earlier_calls() -> None:
    known = templated(tokenizer(TAGS), HISTORY)
    assert known[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Bonn"}
    assert known[2] == HISTORY[2]
    words = templated(tokenizer(), HISTORY)
    assert words[1]["content"].startswith('<tool_call>\n{"name": "weather"')
    assert words[2] == {
        "role": "user",
        "content": "<tool_response>\nrain\n</tool_response>",
    }
    bad = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    with pytest.raises(SalienceError, match="arguments of the call of 'f'"):
        templated(tokenizer(), bad)


def guides(template: str | None) -> Guides:
    return Guides(tokenizer(template), 320, {0})


def parsed(made: Tools, text: str) -> tuple[str, list[ToolDelta]]:
    parser = made.parser()
    deltas = [*parser.push(text), *parser.flush()]
    calls = [each for each in deltas if each.index is not None]
    return "".join(each.content for each in deltas), calls


@pytest.mark.parametrize("template", [None, TAGS, LIST, BARE])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_is_forced(template: str | None, choice: Any) -> None:
    made = of(template, choice)
    maker = guides(template)
    for seed in range(8):
        guide = made.guide(maker)
        assert guide is not None
        text = walk(guide, random.Random(seed), 150)
        assert text is not None
        content, calls = parsed(made, text.decode())
        assert content == "" and calls, text
        for index, call in enumerate(calls):
            assert call.index == index and call.name in ("weather", "clock")
            if choice is NAMED:
                assert call.name == "weather"
            if call.name == "weather":
                schema = WEATHER["function"]["parameters"]
                jsonschema.validate(json.loads(call.arguments), schema)


def test_one_call_only() -> None:
    made = of(None, "required", parallel=False)
    maker = guides(None)
    for seed in range(8):
        text = walk(made.guide(maker), random.Random(seed), 150)  # type: ignore[arg-type]
        assert text is not None
        assert len(parsed(made, text.decode())[1]) == 1
    twice = '<tool_call>{"name": "clock"}</tool_call>' * 2
    assert len(parsed(made, twice)[1]) == 1


@pytest.mark.parametrize("template", [None, LIST])
def test_free_text_until_a_call_begins(template: str | None) -> None:
    made = of(template)
    maker = guides(template)
    guide = made.guide(maker)
    assert guide is not None
    begin = "Let me see. <tool_call>" if template is None else "Let me see. [TOOL_CALLS]"
    for token in maker.vocabulary.tokens(begin.encode()) or ():
        guide.accept(token)
    rest = walk(guide, random.Random(1), 150)
    assert rest is not None
    content, calls = parsed(made, begin + rest.decode(errors="ignore"))
    assert content.startswith("Let me see.") and calls[0].name in ("weather", "clock")


def test_bare_calls_are_free_unless_needed() -> None:
    assert of(BARE).guide(guides(BARE)) is None


def test_parameters_that_no_grammar_holds_are_any_object() -> None:
    odd = function(parameters={"type": "object", "properties": {"a": {"not": {}}}})
    made = Tools.of(tokenizer(), odd, "required")
    assert made is not None
    text = walk(made.guide(guides(None)), random.Random(0), 120)  # type: ignore[arg-type]
    assert text is not None and json.loads(parsed(made, text.decode())[1][0].arguments) is not None


CITY = '{"city": "K\\u00f6ln </tool_call> {", "days": 2}'
CALL = f'{{"name": "weather", "arguments": {CITY}}}'
OTHER = '{"name": "clock", "parameters": {}}'
REPLIES: list[tuple[str, str, list[str]]] = [
    ("just text, with <tags> and {braces}", "just text, with <tags> and {braces}", []),
    (f"<tool_call>\n{CALL}\n</tool_call>", "", ["weather"]),
    (
        f"Sure.\n<tool_call>{CALL}</tool_call>\n<tool_call>{OTHER}</tool_call>",
        "Sure.",
        ["weather", "clock"],
    ),
    (f"<tool_call>{CALL}", "", ["weather"]),  # the end is forgotten
    (f"[TOOL_CALLS] [{CALL}, {OTHER}]", "", ["weather", "clock"]),
    (f"[TOOL_CALLS]weather[ARGS]{CITY}", "", ["weather"]),
    (f"<|python_tag|>{OTHER}", "", ["clock"]),
    (CALL, "", ["weather"]),
    (f"{OTHER}; {CALL}", "", ["clock", "weather"]),
    (f"```json\n{CALL}\n```", "", ["weather"]),
    ('{"type": "function", "function": {"name": "clock", "arguments": "{}"}}', "", ["clock"]),
    ('{"name": "nobody", "arguments": {}}', '{"name": "nobody", "arguments": {}}', []),
    ('{"name": "Bob", "age": 3} is he.', '{"name": "Bob", "age": 3} is he.', []),
    ("<tool_call>{oops}</tool_call>", "<tool_call>{oops}</tool_call>", []),
    (f"<tool_call>{CALL[:20]}", f"<tool_call>{CALL[:20]}", []),  # cut by max_tokens
    ("a <tool_call", "a <tool_call", []),
    ("ends in blanks \n", "ends in blanks \n", []),
    ("", "", []),
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(REPLIES), st.data())
def test_calls_are_found_however_the_text_is_cut(
    reply: tuple[str, str, list[str]], data: st.DataObject
) -> None:
    text, content, names = reply
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    parser = ToolParser(frozenset({"weather", "clock"}))
    deltas = []
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        deltas += parser.push(text[start:stop])
    deltas += parser.flush()
    calls = [each for each in deltas if each.index is not None]
    assert "".join(each.content for each in deltas) == content
    assert [call.name for call in calls] == names
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        expected = json.loads(CITY) if call.name == "weather" else {}
        assert json.loads(call.arguments) == expected


@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet='{}[]"<tool_call>/TOOL_CALLS name:,`json\\\n1', max_size=60), st.integers(1, 7)
)
def test_no_text_is_lost(text: str, size: int) -> None:
    parser = ToolParser(frozenset({"weather"}))
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    deltas += parser.flush()
    assert "".join(each.content for each in deltas) == text


def test_text_is_shown_as_soon_as_it_can_be() -> None:
    parser = ToolParser(frozenset({"clock"}))
    assert parser.push("Hello wor") == [ToolDelta("Hello wor")]
    assert parser.push("ld <tool") == [ToolDelta("ld")]
    assert parser.push("box>") == [ToolDelta(" <toolbox>")]


def test_marks_that_are_special_tokens_stay_in_the_text() -> None:
    made = tokenizer(LIST)
    made.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    tools = Tools.of(made, TOOLS)
    assert tools is not None
    sampling = tools.sampling(Sampling(seed=3))
    assert not sampling.skip_special_tokens and sampling.seed == 3
    assert of(TAGS).sampling(Sampling()).skip_special_tokens
    tokens = made(f"[TOOL_CALLS][{OTHER}]")["input_ids"]
    shown = Detokenizer(made, (), sampling.skip_special_tokens)
    text = "".join(map(shown.push, tokens)) + shown.flush()
    assert [call.name for call in parsed(tools, text)[1]] == ["clock"]
    hidden = Detokenizer(made)
    assert "TOOL" not in "".join(map(hidden.push, tokens))


def test_a_response_template_of_the_tokenizer_reads_the_reply() -> None:
    made = tokenizer(TAGS.replace("<tool_call>", "<call>").replace("</tool_call>", "</call>"))
    made.response_template = {
        "start_anchor": "<|assistant|>",
        "fields": {
            "tool_calls": {
                "open": "<call>",
                "close": "</call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"content": "text"},
        },
    }
    tools = Tools.of(made, TOOLS)
    assert tools is not None and tools.template_tools == TOOLS
    assert not tools.sampling(Sampling()).skip_special_tokens
    parser = tools.parser(made("<|user|>hi<|end|><|assistant|>")["input_ids"])
    text = f"Well. <call>{CALL}</call>"
    deltas = [delta for piece in text for delta in parser.push(piece)] + list(parser.flush())
    assert "".join(each.content for each in deltas).strip() == "Well."
    (call,) = [each for each in deltas if each.index is not None]
    assert call.name == "weather" and json.loads(call.arguments) == json.loads(CITY)
