"""JSON schemas as the grammar compiler holds to them.

xgrammar ignores some keywords without a word (`uniqueItems`, `if`, `not`, `required` names that
are no properties, what stands beside `$ref`, `anyOf` or `enum`, ...). An answer to such a schema
need not validate. So a schema is rewritten to one that says the same, or a little less, in keywords
that are held to; where that is not possible it is refused with the keyword's name.

Schemas come from anyone: size and depth are limited before anything looks at them, and so is what
is dear to compile, which is counting: about 0.03 s for each different length up to 128.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from salience.errors import SalienceError

MAX_BYTES = 1 << 18
MAX_DEPTH = 32
MAX_NODES = 1000
MAX_COUNTED = 640
_MAX_MULTIPLES = 1000
_MAX_PATTERN = 8192
_MAX_GROUPS = 40  # inside each other
_ANY_LENGTH = 128  # longer counts cost no more than this one

_NOTES = {
    "title", "description", "default", "examples", "example", "deprecated", "readOnly",
    "writeOnly", "$schema", "$id", "id", "$comment", "$anchor", "$vocabulary", "nullable",
    "discriminator", "contentEncoding", "contentMediaType",
}  # fmt: skip
# By the type that they are about.
_OF_TYPE = {
    "object": {
        "properties", "required", "additionalProperties", "patternProperties", "minProperties",
        "maxProperties", "propertyNames", "unevaluatedProperties",
    },
    "array": {
        "items", "prefixItems", "minItems", "maxItems", "unevaluatedItems", "additionalItems",
    },
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}  # fmt: skip
_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}
_CHOICES = ("anyOf", "oneOf")
_KNOWN = {"type", "enum", "const", "$ref", "allOf", *_CHOICES, "$defs", "definitions"}.union(
    *_OF_TYPE.values()
)
_FALSE_IS_FINE = {"uniqueItems": False}
_PYTHON: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "number": (int, float), "integer": int,
    "boolean": bool, "null": type(None),
}  # fmt: skip


def normalized(schema: Any) -> dict[str, Any]:
    """A schema whose keywords the compiler holds to; what validates there does here.

    Args:
        schema: an object (or True) of JSON.

    Raises:
        SalienceError: it is too large, no schema, or has a keyword that is not supported.
    """
    try:
        size = len(json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise SalienceError(f"the JSON schema is not JSON: {error}") from None
    if size > MAX_BYTES:
        raise SalienceError(f"the JSON schema has {size} bytes, at most {MAX_BYTES} are taken")
    return _Rewriter(schema).rewrite(schema, "the JSON schema", 0)


class _Rewriter:
    def __init__(self, root: Any) -> None:
        self.root = root
        self.nodes = 0
        self.lengths: set[tuple[int, int]] = set()
        self.counted = 0

    def rewrite(self, node: Any, where: str, depth: int) -> dict[str, Any]:
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise SalienceError(f"the JSON schema is deeper than {MAX_DEPTH} levels")
        if self.nodes > MAX_NODES:
            raise SalienceError(f"the JSON schema has more than {MAX_NODES} parts")
        if node is True:
            return {}
        if not isinstance(node, Mapping):
            raise SalienceError(f"{where} must be an object, not {_shown(node)}")
        found = {key: value for key, value in node.items() if key not in _NOTES}
        for key, value in found.items():
            if key not in _KNOWN and _FALSE_IS_FINE.get(key, ...) != value:
                raise SalienceError(f"{where} has {key!r}, which is not supported; leave it out")
        found = {key: value for key, value in found.items() if key in _KNOWN}
        defs = {key: found.pop(key) for key in ("$defs", "definitions") if key in found}
        out = self._body(found, where, depth)
        for key, parts in defs.items():
            out[key] = self._each(parts, f"{where}.{key}", depth)
        return out

    def _each(self, parts: Any, where: str, depth: int) -> dict[str, Any]:
        if not isinstance(parts, Mapping):
            raise SalienceError(f"{where} must be an object, not {_shown(parts)}")
        return {
            name: self.rewrite(part, f"{where}.{name}", depth + 1) for name, part in parts.items()
        }

    def _body(self, node: dict[str, Any], where: str, depth: int) -> dict[str, Any]:
        if "allOf" in node:
            parts = _list(node.pop("allOf"), f"{where}.allOf")
            for part in parts:
                node = self._merged(node, part, f"{where}.allOf")
            return self.rewrite(node, where, depth + 1)
        if "$ref" in node:
            self.resolve(node["$ref"], where)
            if len(node) == 1:
                return node
            reference = node.pop("$ref")
            node = self._merged(node, {"$ref": reference}, where)
            return self.rewrite(node, where, depth + 1)
        for key in _CHOICES:
            if key in node:
                choices = _list(node.pop(key), f"{where}.{key}")
                if node:
                    choices = [self._merged(dict(node), each, f"{where}.{key}") for each in choices]
                return {
                    "anyOf": [
                        self.rewrite(each, f"{where}.{key}[{i}]", depth + 1)
                        for i, each in enumerate(choices)
                    ]
                }
        if "enum" in node or "const" in node:
            return _values(node, where)
        types = self._types(node, where)
        if len(types) > 1:
            return {"anyOf": [self._typed(node, each, where, depth) for each in sorted(types)]}
        return self._typed(node, types[0], where, depth) if types else {}

    def _types(self, node: dict[str, Any], where: str) -> list[str]:
        given = node.get("type")
        types = [given] if isinstance(given, str) else given
        if types is None:
            return [name for name, keys in _OF_TYPE.items() if keys & node.keys()][:1]
        if not isinstance(types, list) or not types or not _TYPES.issuperset(map(str, types)):
            raise SalienceError(f"{where} has type {_shown(given)}, which is none of JSON schema")
        return list(dict.fromkeys(types))

    def _typed(self, node: dict[str, Any], type_: str, where: str, depth: int) -> dict[str, Any]:
        keys = _OF_TYPE.get("number" if type_ == "integer" else type_, set())
        out = {"type": type_, **{key: value for key, value in node.items() if key in keys}}
        if type_ == "object":
            self._object(out, where, depth)
        elif type_ == "array":
            self._array(out, where, depth)
        elif type_ == "string":
            self._string(out, where)
        elif "multipleOf" in out:
            return _multiples(out, where)
        return out

    def _object(self, out: dict[str, Any], where: str, depth: int) -> None:
        properties = out.get("properties", {})
        if not isinstance(properties, Mapping):
            raise SalienceError(f"{where}.properties must be an object")
        known = {name: part for name, part in properties.items() if part is not False}
        required = out.get("required", [])
        if not isinstance(required, list) or not all(isinstance(n, str) for n in required):
            raise SalienceError(f"{where}.required must be a list of names")
        others = out.get("additionalProperties", True)
        patterns = out.get("patternProperties", {})
        for name in required:
            if name not in known:
                if name in properties or (others is False and not patterns):
                    raise SalienceError(f"{where} requires {name!r}, which it does not allow")
                known[name] = others if isinstance(others, Mapping) else {}
        if patterns:
            self._patterns(patterns, known, where, depth)
            out["patternProperties"] = self._each(patterns, f"{where}.patternProperties", depth)
        if "propertyNames" in out:
            out["propertyNames"] = self.rewrite(out["propertyNames"], f"{where} names", depth + 1)
        if known:
            out["properties"] = self._each(known, f"{where}.properties", depth)
        if isinstance(others, Mapping):
            place = f"{where}.additionalProperties"
            out["additionalProperties"] = self.rewrite(others, place, depth + 1)
        # The same name twice counts as two for the grammar.
        if others is not False and out.get("minProperties", 0) > len(required):
            raise SalienceError(
                f"{where} has 'minProperties', which is not supported; use required"
            )

    def _patterns(self, patterns: Any, known: Mapping[str, Any], where: str, depth: int) -> None:
        for pattern in patterns if isinstance(patterns, Mapping) else ():
            check_regex(pattern)
            try:
                both = next((name for name in known if re.search(pattern, name)), None)
            except re.error as error:
                raise SalienceError(f"{where} has the pattern {pattern!r}: {error}") from None
            if both is not None:
                raise SalienceError(f"{where} has {both!r} as a property and by a pattern; use one")

    def _array(self, out: dict[str, Any], where: str, depth: int) -> None:
        if isinstance(out.get("items"), list):  # as it was written before 2020
            out["prefixItems"] = out.pop("items")
            if "additionalItems" in out:
                out["items"] = out["additionalItems"]
        out.pop("additionalItems", None)
        # Of items that it does not tell of the grammar has none.
        if out.get("minItems", 0) > len(out.get("prefixItems", ())) or "prefixItems" not in out:
            out.setdefault("items", {})
        for key in ("items", "unevaluatedItems"):
            if out.get(key, False) is not False:
                out[key] = self.rewrite(out[key], f"{where}.{key}", depth + 1)
        if "prefixItems" in out:
            parts = _list(out["prefixItems"], f"{where}.prefixItems")
            out["prefixItems"] = [self.rewrite(part, where, depth + 1) for part in parts]

    def _string(self, out: dict[str, Any], where: str) -> None:
        counts = {key: out[key] for key in ("minLength", "maxLength") if key in out}
        if any(not isinstance(n, int) or n < 0 for n in counts.values()):
            raise SalienceError(f"{where} has a length that is no whole number")
        # xgrammar takes no lengths beside these two.
        if counts and "pattern" in out:
            raise SalienceError(
                f"{where} has a pattern and a length; say the length by the pattern"
            )
        if counts:
            out.pop("format", None)
            self._count((counts.get("minLength", 0), counts.get("maxLength", 0)))
        if "pattern" in out:
            check_regex(out["pattern"])
            out["pattern"] = _in_json(out["pattern"])
            out.pop("format", None)
            self._count((_counted(out["pattern"]), 0))

    def _count(self, lengths: tuple[int, int]) -> None:
        if lengths not in self.lengths:
            self.lengths.add(lengths)
            self.counted += sum(min(n, _ANY_LENGTH) for n in lengths)
        if self.counted > MAX_COUNTED:
            raise SalienceError(
                "the JSON schema counts too many different lengths of strings; use the same "
                "maxLength for several, or leave some out"
            )

    def _merged(self, node: dict[str, Any], other: Any, where: str) -> dict[str, Any]:
        """A schema for what validates against both."""
        for _ in range(MAX_DEPTH):
            if not (isinstance(other, Mapping) and "$ref" in other):
                break
            rest = {key: value for key, value in other.items() if key != "$ref"}
            if set(rest) - _NOTES:
                node = self._merged(node, rest, where)
            other = self.resolve(other["$ref"], where)
        if other is True:
            return node
        if not isinstance(other, Mapping):
            raise SalienceError(f"{where} must hold objects, not {_shown(other)}")
        out = dict(node)
        for key, value in other.items():
            if key in _NOTES or key in ("$defs", "definitions"):
                continue
            if key not in out or out[key] == value:
                out[key] = value
            elif key == "properties" and not _differ(out[key], value):
                out[key] = {**out[key], **value}
            elif key == "required" and isinstance(value, list):
                out[key] = list(dict.fromkeys([*out[key], *value]))
            elif key == "allOf" and isinstance(value, list):
                out[key] = [*out[key], *value]
            else:
                raise SalienceError(
                    f"{where} says {key!r} twice, which is not supported; say it once"
                )
        return out

    def resolve(self, reference: Any, where: str) -> Any:
        """What a reference inside the schema points to."""
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            raise SalienceError(f"{where} refers to {_shown(reference)}; only '#/...' is supported")
        found = self.root
        for part in unquote(reference[1:]).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdigit() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, Mapping) and part in found:
                found = found[part]
            else:
                raise SalienceError(f"{where} refers to {reference!r}, which is not there")
        return found


def _multiples(out: dict[str, Any], where: str) -> dict[str, Any]:
    """Whole multiples, which xgrammar takes without a range only."""
    step = out["multipleOf"]
    if not isinstance(step, (int, float)) or step <= 0 or step != int(step):
        raise SalienceError(f"{where} has multipleOf {_shown(step)}; use a whole number")
    if len(out) == 2:
        return {"type": "integer", "multipleOf": int(step)}
    low = max(out.get("minimum", -math.inf), out.get("exclusiveMinimum", -math.inf))
    high = min(out.get("maximum", math.inf), out.get("exclusiveMaximum", math.inf))
    if not high - low <= _MAX_MULTIPLES * step:
        raise SalienceError(f"{where} has multipleOf in a wide range; leave one of them out")
    steps = range(math.ceil(low / step), math.floor(high / step) + 1)
    outside = (out.get("exclusiveMinimum"), out.get("exclusiveMaximum"))
    values = [n * int(step) for n in steps if n * int(step) not in outside]
    if not values:
        raise SalienceError(f"{where} has no multiple of {step} in its range")
    return {"enum": values}


def _values(node: dict[str, Any], where: str) -> dict[str, Any]:
    values = [node["const"]] if "const" in node else _list(node["enum"], f"{where}.enum")
    given = node.get("type", list(_TYPES))
    types = [given] if isinstance(given, str) else given
    fitting = [value for value in values if any(_is(value, type_) for type_ in types)]
    if "const" in node and "enum" in node and node["const"] not in node["enum"]:
        fitting = []
    if not fitting:
        raise SalienceError(f"{where} has no value of its type")
    beside = sorted(set(node) - {"type", "enum", "const"})
    if beside:
        raise SalienceError(f"{where} has {beside[0]!r} beside its values; leave it out")
    return {"enum": fitting}


def _is(value: Any, type_: Any) -> bool:
    if isinstance(value, bool):
        return type_ == "boolean"
    if type_ == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PYTHON.get(type_, ()))


def _differ(a: Mapping[str, Any], b: Any) -> bool:
    return not isinstance(b, Mapping) or any(a[name] != b[name] for name in a.keys() & b.keys())


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise SalienceError(f"{where} must be a list that is not empty")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_regex(pattern: Any) -> None:
    """Refuse a regex that is too large.

    Raises:
        SalienceError: its length, its groups or its counts are.
    """
    if not isinstance(pattern, str):
        raise SalienceError(f"a regex must be text, not {_shown(pattern)}")
    if len(pattern) > _MAX_PATTERN:
        raise SalienceError(f"a regex has {len(pattern)} characters, at most {_MAX_PATTERN}")
    unknown = re.search(r"\(\?(?![:P<]|<\w)|\(\?<[=!]|\\[bBpPkAZ1-9]", pattern.replace("\\\\", ""))
    if unknown:
        raise SalienceError(f"a regex has {unknown[0]!r}, which is not supported")
    if _depth(pattern, "(", ")") > _MAX_GROUPS:
        raise SalienceError(f"a regex has more than {_MAX_GROUPS} groups inside each other")
    if _counted(pattern) > MAX_COUNTED:
        raise SalienceError("a regex counts too far; use + or *, or smaller numbers in {}")


def check_grammar(ebnf: Any) -> None:
    """Refuse a grammar that is too large.

    Raises:
        SalienceError: its length, its groups or its counts are.
    """
    if not isinstance(ebnf, str):
        raise SalienceError(f"a grammar must be text, not {_shown(ebnf)}")
    if len(ebnf) > MAX_BYTES // 4:
        raise SalienceError(f"a grammar has {len(ebnf)} characters, at most {MAX_BYTES // 4}")
    if _depth(ebnf, "(", ")") > _MAX_GROUPS:
        raise SalienceError(f"a grammar has more than {_MAX_GROUPS} groups inside each other")
    if _counted(ebnf) > MAX_COUNTED:
        raise SalienceError("a grammar counts too far; use + or *, or smaller numbers in {}")


def _depth(text: str, opening: str, closing: str) -> int:
    depth = most = 0
    for char in text:
        depth += (char == opening) - (char == closing)
        most = max(most, depth)
    return most


def _counted(text: str) -> int:
    """The sum of the numbers in {}."""
    counts = re.findall(r"\{(\d*),?(\d*)\}", text)
    return sum(min(int(n[:9]), _ANY_LENGTH) for pair in counts for n in pair if n)


def _in_json(pattern: str) -> str:
    """A pattern of what a string says, as one of how JSON writes it.

    Outside of [] the compiler takes the characters as they stand between the quotes; what JSON
    escapes must be escaped. Inside of [] it leaves out such characters by itself.
    """
    out, at, in_class = [], 0, False
    while at < len(pattern):
        piece = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        at += len(piece)
        if in_class:
            in_class = piece != "]"
        elif piece == "[":
            in_class = True
        elif piece in ('"', '\\"'):
            piece = '\\\\"'
        elif piece == "\\\\":
            piece = "\\\\\\\\"
        elif piece in ("\\n", "\\t", "\\r", "\\f"):
            piece = "\\\\" + piece[1]
        elif piece in ("\\x", "\\u", "\\c", "\\0", "\\v") or piece < " ":
            raise SalienceError(f"a pattern has {piece!r}; use a class in [] or the character")
        # A group, so that what follows is about the character as a whole.
        out.append(f"(?:{piece})" if piece.startswith("\\\\") and len(piece) > 2 else piece)
    return "".join(out)
