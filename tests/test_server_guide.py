"""Guides against brute force over the tiny vocabulary, and against jsonschema."""

import itertools
import json
import random
import sys
import time
from typing import Any

import jsonschema
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salience.errors import SalienceError
from salience.runtime import Engine, Request, Sampling
from salience.server import guide as guide_module
from salience.server.guide import Guide, Guides
from salience.server.schemas import MAX_DEPTH, normalized
from tiny_models import VOCABULARY, llama_config, make_model, make_tokenizer

GUIDES = Guides(make_tokenizer(), VOCABULARY, {0})
TEXTS = GUIDES.vocabulary.texts
END = 0


def allowed(mask: Tensor) -> list[int]:
    bits = mask[:, None] >> torch.arange(32) & 1
    return bits.flatten().nonzero().flatten().tolist()


def walk(guide: Guide, chance: random.Random, left: int) -> bytes | None:
    """What a random model says under a guide; None if it was cut."""
    text = b""
    for used in range(left):
        token = chance.choice(allowed(guide.mask(left - used)))
        guide.accept(token)
        if token == END:
            assert guide.finished
            return text
        text += TEXTS[token]
    return None


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(
        [
            r"(ab|ac)*d?",
            r"[a-f]{2,4}(in|on|the)+",
            r"-?\d+(\.\d{1,2})?",
            r"(a|b)*abb",
            r"th[^x]*e\s?",
        ]
    ),
    st.randoms(use_true_random=False),
)
def test_masks_of_regexes_by_brute_force(pattern: str, chance: random.Random) -> None:
    guide, text = GUIDES.regex(pattern), ""
    ascii_tokens = [i for i, each in enumerate(TEXTS) if each and max(each) < 128]
    for _ in range(8):
        found = set(allowed(guide.mask()))
        expected = {
            token
            for token in ascii_tokens
            if regex.fullmatch(pattern, text + TEXTS[token].decode(), partial=True)
        }
        expected |= {END} if regex.fullmatch(pattern, text) else set()
        assert found & {*ascii_tokens, END} == expected
        token = chance.choice(sorted(expected))
        guide.accept(token)
        if token == END:
            break
        text += TEXTS[token].decode()


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_masks_of_schemas_by_brute_force(chance: random.Random) -> None:
    numbers, words = [7, 12, 125], ["in", "inside", 'a"b', "the\n"]
    schema = {
        "type": "object",
        "properties": {"n": {"enum": numbers}, "w": {"enum": words}, "b": {"type": "boolean"}},
        "required": ["n", "b"],
    }
    answers = [{"n": n, "b": b} for n, b in itertools.product(numbers, (True, False))]
    answers += [
        {"n": n, "w": w, "b": b} for n, w, b in itertools.product(numbers, words, (True, False))
    ]
    valid = [json.dumps(each).encode() for each in answers]
    guide, text = GUIDES.json_schema(schema), b""
    while not guide.finished:
        expected = {
            token
            for token, piece in enumerate(TEXTS)
            if piece and any(each.startswith(text + piece) for each in valid)
        }
        expected |= {END} if text in valid else set()
        assert set(allowed(guide.mask())) == expected
        token = chance.choice(sorted(expected))
        guide.accept(token)
        text += TEXTS[token] if token != END else b""
    assert text in valid


def random_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """Any schema of the kinds that people write."""
    plain = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format"]
    nested = ["object", "array", "anyOf", "types", "tuple", "map", "allOf"]
    kind = chance.choice(plain if depth > 2 else plain + nested * 3)
    low = chance.randrange(-40, 40)

    def inner() -> dict[str, Any]:
        return random_schema(chance, depth + 1)

    if kind == "string":
        bounds = {"minLength": chance.randrange(4), "maxLength": chance.randrange(4, 9)}
        return {"type": "string", **(bounds if chance.random() < 0.3 else {})}
    if kind in ("integer", "number"):
        bounds = {"minimum": low, "exclusiveMaximum": low + chance.randrange(1, 300)}
        if chance.random() < 0.2:
            return {"type": kind, "multipleOf": chance.randrange(1, 9)}
        return {"type": kind, **(bounds if chance.random() < 0.5 else {})}
    if kind == "enum":
        return {"enum": chance.sample([1, "é", None, True, 'q"', [1, {"a": 2}], -2.5], 3)}
    if kind == "const":
        return {"const": chance.choice(["x", 0, {"k": [None]}])}
    if kind == "pattern":
        return {"type": "string", "pattern": chance.choice(["^[a-z]{2,5}$", '^a\\\\b"?$', "\\d+"])}
    if kind == "format":
        return {"type": "string", "format": chance.choice(["date", "uuid", "email", "date-time"])}
    if kind == "object":
        names = chance.sample(["a", "b c", "ä", "d"], chance.randrange(1, 4))
        out: dict[str, Any] = {"type": "object", "properties": {name: inner() for name in names}}
        out["required"] = [name for name in names if chance.random() < 0.6]
        if chance.random() < 0.2:
            out["required"].append("other")
        if chance.random() < 0.3 and "other" not in out["required"]:
            out["additionalProperties"] = chance.choice([False, inner()])
        return out
    if kind == "map":
        return {"type": "object", "additionalProperties": inner()}
    if kind == "array":
        bounds = {"minItems": chance.randrange(3), "maxItems": chance.randrange(3, 5)}
        return {"type": "array", "items": inner(), **(bounds if chance.random() < 0.5 else {})}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [inner(), inner()], "items": False, "minItems": 2}
    if kind == "anyOf":
        return {"anyOf": [inner(), inner()], "description": "either"}
    if kind == "allOf":
        parts = [
            {"type": "object", "properties": {name: inner()}, "required": [name]} for name in "xy"
        ]
        return {"allOf": parts}
    return {"type": ["string", "null", "integer"], "minimum": low, "maxLength": 5}


def test_what_a_random_model_says_validates() -> None:
    chance = random.Random(11)
    for _ in range(100):
        schema = random_schema(chance)
        text = walk(GUIDES.json_schema(schema), chance, 300)
        assert text is not None, schema
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_a_recursive_schema() -> None:
    node = {
        "type": "object",
        "properties": {
            "label": {"type": "string"},
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            "next": {"$ref": "#/$defs/node"},
        },
        "required": ["label", "children"],
    }
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    for seed in range(20):
        text = walk(GUIDES.json_schema(schema), random.Random(seed), 150)
        assert text is not None
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_json_object_is_any_object() -> None:
    for seed in range(30):
        text = walk(GUIDES.json_object(), random.Random(seed), 80)
        assert text is not None and isinstance(json.loads(text), dict)


@pytest.mark.parametrize("left", range(16, 60, 3))
def test_an_answer_ends_before_its_tokens(left: int) -> None:
    """The tiny vocabulary's shortest answer is this; it takes about a token for each byte."""
    schema = {
        "type": "object",
        "properties": {"s": {"type": "string"}, "n": {"type": "array", "minItems": 1}},
        "required": ["s"],
    }
    for seed in range(5):
        text = walk(GUIDES.json_schema(schema), random.Random(seed), left)
        assert text is not None
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_with_too_few_tokens_it_is_cut() -> None:
    schema = {"type": "string", "minLength": 40, "maxLength": 50}
    assert walk(GUIDES.json_schema(schema), random.Random(0), 10) is None


def test_no_more_digits_than_a_double_has() -> None:
    guide = GUIDES.json_schema({"type": "array", "items": {"type": "integer"}})
    for byte in b"[" + b"1" * 17:
        guide.accept(TEXTS.index(bytes([byte])))
    pieces = {TEXTS[token] for token in allowed(guide.mask())}
    assert pieces and not any(piece[:1].isdigit() for piece in pieces)
    # Where only a digit may follow, it does.
    guide = GUIDES.regex("[0-9]{30}")
    for _ in range(20):
        guide.accept(TEXTS.index(b"3"))
    assert allowed(guide.mask())


def test_more_logits_than_tokens() -> None:
    guides = Guides(make_tokenizer(), 400, {0})
    mask = guides.json_schema({"type": "string"}).mask()
    assert mask.shape == (13,) and mask.dtype == torch.int32
    assert max(allowed(mask)) < VOCABULARY


def test_special_tokens_are_no_text_but_marks_of_calls_are() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "<|other|>"]})
    guides = Guides(tokenizer, len(tokenizer), {0})
    mark, other = tokenizer.convert_tokens_to_ids(["[TOOL_CALLS]", "<|other|>"])
    found = allowed(guides.regex(r"\[TOOL_CALLS\]|<\|other\|>|<\|user\|>").mask())
    assert mark in found and other not in found and 1 not in found


REFUSED: list[tuple[Any, str]] = [
    ([], "must be an object, not"),
    ({"type": "strin"}, "type 'strin', which is none"),
    ({"type": "array", "uniqueItems": True}, "'uniqueItems', which is not supported"),
    ({"not": {"type": "null"}}, "'not', which is not supported"),
    ({"if": {}, "then": {}}, "'if', which is not supported"),
    ({"$ref": "https://example.com/x"}, "only '#/...' is supported"),
    ({"$ref": "#/$defs/no"}, "which is not there"),
    ({"$ref": "#"}, "refers|allows no answer"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "requires 'a'"),
    ({"type": "object", "minProperties": 2}, "'minProperties'"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "a pattern and a length"),
    ({"type": "string", "pattern": "("}, "refused"),
    ({"type": "string", "pattern": r"(?=a)b"}, "not supported"),
    ({"type": "string", "maxLength": -1}, "no whole number"),
    ({"type": "number", "multipleOf": 0.1}, "multipleOf 0.1"),
    ({"enum": []}, "must be a list that is not empty"),
    ({"type": "string", "enum": [1]}, "no value of its type"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, "'type' twice"),
    ({"properties": []}, "must be an object"),
    ({"type": "object", "required": "a"}, "list of names"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED, ids=str)
def test_refused_schemas(schema: Any, message: str) -> None:
    with pytest.raises(SalienceError, match=message):
        GUIDES.json_schema(schema)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubled(count: int) -> dict[str, Any]:
    parts: dict[str, Any] = {"d0": {"type": "string"}}
    for i in range(1, count):
        parts[f"d{i}"] = {"allOf": [{"$ref": f"#/$defs/d{i - 1}"}] * 2}
    return {"$ref": f"#/$defs/d{count - 1}", "$defs": parts}


HOSTILE: list[tuple[Any, str]] = [
    (deep(MAX_DEPTH + 1), "deeper"),
    (deep(400), "deeper"),
    ({"anyOf": [{"type": "string"}] * 2000}, "more than 1000 parts"),
    ({"enum": ["x" * 300_000]}, "has 3000.. bytes"),
    (
        {"type": "object", "properties": {str(n): {"maxLength": n} for n in range(90, 200)}},
        "too many different lengths",
    ),
    ({"type": "string", "pattern": "(" * 500 + ")" * 500}, "groups inside each other"),
    ({"type": "string", "pattern": "a{1,99}" * 20}, "counts too far"),
    (doubled(40), "deeper|more than"),
]


@pytest.mark.parametrize(("schema", "message"), HOSTILE, ids=lambda each: str(each)[:30])
def test_hostile_schemas_are_refused_at_once(schema: Any, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(SalienceError, match=message):
        GUIDES.json_schema(schema)
    assert time.perf_counter() - start < 2


def test_hostile_regexes_and_grammars() -> None:
    for pattern in ("(" * 9000, "a" * 9000, "((a{1,128}){1,128}){1,999}" * 2, "(" * 60 + ")" * 60):
        with pytest.raises(SalienceError, match="regex"):
            GUIDES.regex(pattern)
    for ebnf in ("root ::= " + "(" * 100 + ")" * 100, "x" * 70_000, "nothing", 'root ::= "a'):
        with pytest.raises(SalienceError, match="grammar"):
            GUIDES.grammar(ebnf)
    with pytest.raises(SalienceError, match="the regex is refused"):
        GUIDES.regex("[")
    left_recursive = GUIDES.grammar('root ::= root "a" | "b"')
    assert [TEXTS[token] for token in allowed(left_recursive.mask())] == [b"b"]


def test_rewriting_says_no_more() -> None:
    """What a schema's copy allows, the schema does: of draft-7 tuples, both choices, references."""
    schema = {
        "type": "object",
        "properties": {"kind": {"type": "string"}},
        "required": ["kind"],
        "anyOf": [
            {"properties": {"size": {"$ref": "#/definitions/size", "minimum": 2}}},
            {"properties": {"pair": {"items": [{"const": 1}, {"enum": [2, 3]}]}}},
        ],
        "definitions": {"size": {"type": "integer", "maximum": 4}},
    }
    copy = normalized(schema)
    assert copy["anyOf"][0]["properties"]["size"] == {
        "type": "integer",
        "maximum": 4,
        "minimum": 2,
    }
    for seed in range(20):
        text = walk(GUIDES.json_schema(schema), random.Random(seed), 120)
        assert text is not None
        jsonschema.Draft7Validator(schema).validate(json.loads(text))


def test_compiled_once_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    guides = Guides(make_tokenizer(), VOCABULARY, {0})
    made = []
    compiler = guides._compiler
    real = compiler.compile_json_schema
    monkeypatch.setattr(
        compiler, "compile_json_schema", lambda *a, **k: made.append(1) or real(*a, **k)
    )
    first = guides.json_schema({"type": "integer"})
    first.accept(TEXTS.index(b"1"))
    second = guides.json_schema({"type": "integer"})
    assert len(made) == 1 and END not in allowed(second.mask())
    assert END not in allowed(first.fresh().mask()) and END in allowed(first.mask())
    monkeypatch.setattr(guide_module, "_CACHED", 3)
    for n in range(6):
        guides.json_schema({"const": n})
    assert len(guides._cache) == 3
    monkeypatch.setattr(guide_module, "_CACHED_BYTES", 1)
    guides.json_schema({"const": 9})
    assert len(guides._cache) == 1


def test_a_token_outside_the_grammar_is_an_error() -> None:
    guide = GUIDES.json_schema({"type": "integer"})
    with pytest.raises(SalienceError, match="outside of the reply's grammar"):
        guide.accept(TEXTS.index(b"x"))


def test_without_xgrammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(SalienceError, match=r"pip install 'salience\[serve\]'"):
        Guides(make_tokenizer(), VOCABULARY, {0})


def run(engine: Engine, jobs: list[tuple[list[int], Sampling, dict[str, Any] | None]]) -> list[str]:
    """The texts of guided and free requests, all at once."""
    requests: list[Request] = []
    guides: dict[int, Guide] = {}
    for prompt, sampling, schema in jobs:
        request = engine.submit(prompt, sampling, guided=schema is not None)
        if schema is not None:
            guides[id(request)] = GUIDES.json_schema(schema)
            request.allow(guides[id(request)].mask(request.room))
        requests.append(request)
    steps = 0
    while not all(request.finished for request in requests):
        steps += 1
        assert steps < 1000
        for event in engine.step():
            request = event.request
            if id(request) in guides and not request.finished:
                for token in event.tokens:
                    guides[id(request)].accept(token)
                request.allow(guides[id(request)].mask(request.room - len(request.tokens)))
    return [request.text for request in requests]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guided_and_free_requests_share_steps(temperature: float) -> None:
    """Each says what it says alone, whatever is beside it."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    jobs: list[tuple[list[int], Sampling, dict[str, Any] | None]] = [
        (
            [5 + i, 40, 9 + 2 * i, *range(20, 20 + 7 * i)],
            Sampling(max_new_tokens=20 + i, temperature=temperature, seed=i),
            schema if i % 3 != 1 else None,
        )
        for i in range(9)
    ]
    model = make_model(llama_config()).requires_grad_(False)
    tokenizer = make_tokenizer()
    alone = [run(Engine(model, tokenizer, fast=False), [job])[0] for job in jobs]
    engine = Engine(model, tokenizer, max_batch=4, prefill_chunk=16)
    assert run(engine, jobs) == alone
    for text, (_, _, wanted) in zip(alone, jobs, strict=True):
        if wanted is not None:
            jsonschema.validate(json.loads(text), wanted)
