"""Finds calls in a reply that comes in pieces.

What may begin a call is held back until it is one or is not. A call is given out when it is whole:
its arguments are JSON by then, and what is no call of a given function stays text. However the
text is cut into pieces, the same deltas come, but for how the plain text is cut.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MARKS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_END = "</tool_call>"
# How a reply begins that is nothing but a call; blanks do not count.
_BARE = tuple(
    fence + start
    for fence in ("", "```json", "```")
    for start in ('{"name":', '{"type":"function"', '{"function":{', '[{"name":')
)
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_DECODER = json.JSONDecoder(strict=False)
_NAMED = re.compile(r"\s*([\w.-]{1,64})(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?(?=\{)")


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """Text (no index), or a call: its index, id, name and arguments in JSON."""

    content: str = ""
    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class _Calls:
    """Makes deltas of calls.

    Args:
        names: functions that may be called.
        most: calls of a reply; None for any number.
        short: ids of nine characters.
    """

    def __init__(self, names: frozenset[str], most: int | None, short: bool) -> None:
        self.names = names
        self.most = most
        self.short = short
        self.count = 0

    def delta(self, value: Any) -> list[ToolDelta] | None:
        """The call that JSON stands for, or a list's calls; None if it is none."""
        if isinstance(value, list):
            found = [self.delta(each) for each in value] if value else [None]
            if any(each is None for each in found):
                return None
            return [delta for each in found if each for delta in each]
        call = _call(value)
        if call is None or call[0] not in self.names:
            return None
        if self.most is not None and self.count >= self.most:
            return []
        code = secrets.token_hex(12)
        index, self.count = self.count, self.count + 1
        return [ToolDelta("", index, code[:9] if self.short else f"call_{code}", *call)]


def _call(value: Any) -> tuple[str, str] | None:
    if not isinstance(value, dict):
        return None
    inner = value.get("function", value)
    if isinstance(inner, str):  # {"function": name, ...}
        inner = {**value, "name": inner}
    if not isinstance(inner, dict):
        return None
    arguments = inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(inner.get("name"), str) or not isinstance(arguments, dict):
        return None
    return inner["name"], json.dumps(arguments, ensure_ascii=False)


class ToolParser:
    """Finds calls in the formats of `tool_formats`.

    Args:
        names: functions that may be called.
        most: calls of a reply; None for any number.
        short: ids of nine characters.
    """

    def __init__(self, names: frozenset[str], most: int | None = None, short: bool = False) -> None:
        self._calls = _Calls(names, most, short)
        self._held = ""
        self._mark: str | None = None  # that what is held begins with; "" for a bare call
        self._begun = False  # whether there was anything but blanks

    def push(self, text: str) -> list[ToolDelta]:
        """What a piece of the reply adds."""
        self._held += text
        # A call is whole after one of these only.
        if self._mark is not None and not any(end in text for end in "}]>`"):
            return []
        return self._take(final=False)

    def flush(self) -> list[ToolDelta]:
        """What is left at the end."""
        return self._take(final=True)

    def _take(self, final: bool) -> list[ToolDelta]:
        out: list[ToolDelta] = []
        while True:
            step = self._text if self._mark is None else self._marked
            found, again = step(final)
            out += found
            if not again:
                return out

    def _text(self, final: bool) -> tuple[list[ToolDelta], bool]:
        """Go on outside of calls: what to give out, and whether there is more to do."""
        held = self._held
        if not self._begun and (bare := _bare(held, final)) is not None:
            if bare:
                self._mark, self._begun = "", True
            return [], bare
        places = [(at, mark) for mark in _MARKS if (at := held.find(mark)) >= 0]
        if places:
            at, self._mark = min(places)
            self._held, self._begun = held[at:], True
            return self._plain(held[:at].rstrip()), True
        # Blanks wait, too: before a call they are none of the content.
        keep = 0 if final else max(_overlap(held, mark) for mark in _MARKS)
        shown = held[: len(held) - keep]
        if not final or self._calls.count:
            shown = shown.rstrip()
        self._held = "" if final else held[len(shown) :]
        self._begun = self._begun or bool(shown)
        return self._plain(shown), False

    def _plain(self, text: str) -> list[ToolDelta]:
        return [ToolDelta(text)] if text else []

    def _marked(self, final: bool) -> tuple[list[ToolDelta], bool]:
        """Go on inside of a call, or of what may be one."""
        held, mark = self._held, self._mark or ""
        read = _LIST_READER if mark == "[TOOL_CALLS]" else _TAG if mark == _MARKS[0] else _bare_call
        found = read(held[len(mark) :], final)
        if found is None:  # not whole
            if not final:
                return [], False
            return self._give_up(held)
        value, end = found
        deltas = None if end < 0 else self._calls.delta(value)
        if deltas is None:
            return self._give_up(held)
        self._held, self._mark = held[len(mark) + end :], None
        return deltas, True

    def _give_up(self, held: str) -> tuple[list[ToolDelta], bool]:
        """It is no call: its mark, or all of a bare one's first character, is text."""
        cut = len(self._mark or "") or 1
        self._held, self._mark = held[cut:], None
        return self._plain(held[:cut]), True


# A reader takes the text after a mark and returns the value and where it ends; None when it is not
# whole, and an end of -1 for what can be no call.
Reader = Callable[[str, bool], tuple[Any, int] | None]


def _json(text: str, at: int, final: bool) -> tuple[Any, int] | None:
    at += len(text[at:]) - len(text[at:].lstrip())
    if at == len(text):
        return None
    if text[at] not in "{[":
        return None, -1
    try:
        return _DECODER.raw_decode(text, at)
    except ValueError as error:
        # Not whole yet, or wrong? What is wrong before the end stays so.
        wrong = isinstance(error, json.JSONDecodeError) and _wrong(error, text)
        return (None, -1) if final or wrong else None
    except RecursionError:
        return None, -1


def _wrong(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more text could not mend it."""
    if error.msg.startswith(("Unterminated", "Invalid \\", "Invalid control")):
        return error.msg.startswith("Invalid control")
    rest = text[error.pos :].strip()
    begun = any(word.startswith(rest) for word in _WORDS) or not rest.strip("+-.eE0123456789")
    return not begun


def _tag(text: str, final: bool) -> tuple[Any, int] | None:
    found = _json(text, 0, final)
    if found is None or found[1] < 0:
        return found
    value, end = found
    rest = text[end:].lstrip()
    if rest.startswith(_END):
        return value, len(text) - len(rest) + len(_END)
    if not final and _END.startswith(rest):
        return None
    return value, end  # the end mark is forgotten by small models


def _list(text: str, final: bool) -> tuple[Any, int] | None:
    named = _NAMED.match(text)
    if named is None:
        if not final and not text.lstrip().startswith(("[", "{")) and len(text) < 200:
            plain = "{" not in text
            return None if plain else (None, -1)
        return _json(text, 0, final)
    found = _json(text, named.end(), final)
    if found is None or found[1] < 0:
        return found
    return {"name": named[1], "arguments": found[0]}, found[1]


def _bare_call(text: str, final: bool) -> tuple[Any, int] | None:
    """One or more calls and nothing else, perhaps in a fence."""
    fence = re.match(r"\s*```(?:json)?", text)
    at, values = fence.end() if fence else 0, []
    while True:
        found = _json(text, at, final)
        if found is None or found[1] < 0:
            return found
        values.append(found[0])
        at = found[1]
        rest = text[at:].lstrip()
        if rest.startswith((";", "{")):
            at = len(text) - len(rest) + rest.startswith(";")
            continue
        if not final:
            return None  # what follows decides
        if fence and rest.startswith("```"):
            rest = rest[3:].strip()
        if rest:
            return None, -1
        several = [part for each in values for part in (each if isinstance(each, list) else [each])]
        return several, len(text)


_TAG: Reader = _tag
_LIST_READER: Reader = _list


def _bare(text: str, final: bool) -> bool | None:
    """Whether a reply begins as a bare call; False if that is open, None if not."""
    tight = "".join(text.split())
    if any(tight.startswith(start) for start in _BARE):
        return True
    return False if not final and any(start.startswith(tight) for start in _BARE) else None


def _overlap(text: str, mark: str) -> int:
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)


class TemplateParser:
    """Finds calls by the tokenizer's own response template.

    Args:
        tokenizer: of Transformers, with a `response_template`.
        prompt: its tokens.
        tools: as the chat template was given them.
        names: functions that may be called.
        most: calls of a reply; None for any number.
        short: ids of nine characters.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        tools: Sequence[Mapping[str, Any]],
        names: frozenset[str],
        most: int | None = None,
        short: bool = False,
    ) -> None:
        self._calls = _Calls(names, most, short)
        self._parser = tokenizer.get_response_parser(prefix=list(prompt) or "", tools=list(tools))

    def push(self, text: str) -> list[ToolDelta]:
        """What a piece of the reply adds."""
        return self._deltas(lambda: self._parser.feed(text))

    def flush(self) -> list[ToolDelta]:
        """What is left at the end."""
        return self._deltas(lambda: self._parser.finalize()[1])

    def _deltas(self, read: Callable[[], list[dict[str, Any]]]) -> list[ToolDelta]:
        try:
            events = read()
        except (ValueError, KeyError, TypeError):  # a call that is no JSON
            return []
        out: list[ToolDelta] = []
        for event in events:
            calls = event["field"] == "tool_calls"
            if event["type"] == "region_close" and calls:
                out += self._calls.delta(event["value"]) or ()
            elif event["type"] == "region_chunk" and not calls and event["text"]:
                out.append(ToolDelta(event["text"]))
        return out
