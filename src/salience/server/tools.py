"""Function calls: tools for the template, a grammar for their calls, and calls found in replies.

    tools = Tools.of(tokenizer, body["tools"], body.get("tool_choice"))
    prompt = encode(tokenizer, tools.messages(messages), tools.template_tools)
    guide, parser = tools.guide(guides), tools.parser(prompt)

A chat template that knows tools is given them, and calls are read in the format it tells of
(`tool_formats`). Any other model gets a plain instruction in its system message and answers in
`<tool_call>` tags; earlier calls and their results are written into the talk as text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from salience.errors import SalienceError
from salience.runtime import Sampling
from salience.server.guide import Guide, Guides
from salience.server.schemas import normalized
from salience.server.tool_formats import BARE, LIST, TAGS, ToolFormat, detect, template_text
from salience.server.tool_parser import TemplateParser, ToolParser

_MOST = 128
_LONGEST_NAME = 64
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_INSTRUCTION = """\
You can call functions. To call one, write its name and its arguments as JSON between two tags, \
like this:
<tool_call>
{"name": "function", "arguments": {"argument": "value"}}
</tool_call>
The functions and the JSON schemas of their arguments:
"""


@dataclass(frozen=True)
class Tools:
    """The tools of a request. Made by `of`."""

    tokenizer: Any
    definitions: Sequence[Mapping[str, Any]]
    functions: Mapping[str, Mapping[str, Any]]  # those that may be called: name -> arguments
    form: ToolFormat
    known: bool  # whether the template tells the model of them
    needed: bool  # whether there must be a call
    parallel: bool

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: Any = None,
        parallel: bool | None = None,
    ) -> "Tools | None":
        """The tools of a request; None when there are none to call.

        Args:
            tokenizer: of Transformers.
            tools: as OpenAI's chat completions have them.
            tool_choice: "auto", "none", "required", or the function that must be called.
            parallel: whether one reply may have several calls; True for None.

        Raises:
            SalienceError: a field is wrong, which it names.
        """
        functions = _functions(tools or ())
        forced = _choice(tool_choice, functions)
        if forced == "none" or not functions:
            return None
        wanted = functions if forced in ("auto", "required") else {forced: functions[forced]}
        definitions = list(tools or ())
        form = detect(template_text(tokenizer))
        read = getattr(tokenizer, "response_template", None) is not None
        known = (form is not None or read) and _tells(tokenizer, definitions)
        return cls(
            tokenizer=tokenizer,
            definitions=definitions,
            functions=wanted,
            form=(form or TAGS) if known else TAGS,
            known=known,
            needed=forced != "auto",
            parallel=parallel is not False,
        )

    @property
    def template_tools(self) -> list[Mapping[str, Any]] | None:
        """What the chat template is given; None if it takes none."""
        return list(self.definitions) if self.known else None

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages for the template."""
        if self.known:
            return templated(self.tokenizer, messages)
        out = [_in_words(message) for message in messages]
        text = _INSTRUCTION + "\n".join(
            json.dumps(tool["function"], ensure_ascii=False) for tool in self.definitions
        )
        at = next((i for i, each in enumerate(out) if each["role"] in ("system", "developer")), -1)
        if at >= 0:
            out[at]["content"] = f"{out[at]['content']}\n\n{text}"
        elif _renders(self.tokenizer, [{"role": "system", "content": text}, *_HELLO]):
            out.insert(0, {"role": "system", "content": text})
        elif out:
            out[0]["content"] = f"{text}\n\n{out[0]['content']}"
        return out

    def sampling(self, sampling: Sampling) -> Sampling:
        """How to draw: with special tokens in the text, if calls are marked by such."""
        special = {str(token) for token in self.tokenizer.all_special_tokens}
        added = self.tokenizer.added_tokens_decoder.values()
        special.update(token.content for token in added if token.special)
        read = self.known and getattr(self.tokenizer, "response_template", None) is not None
        if read or self.form.sign in special:
            return replace(sampling, skip_special_tokens=False)
        return sampling

    def guide(self, guides: Guides) -> Guide | None:
        """A grammar: free text up to a call and then the call, or only calls where one is needed.

        None where nothing can be told before it is there: a bare JSON text that may be a call.
        """
        form, stop = self.form, not self.parallel
        calls = [
            {
                "type": "tag",
                "begin": form.begin * (not form.opening) + form.head(json.dumps(name)),
                "content": {"type": "json_schema", "json_schema": dict(schema)},
                "end": "}" + form.end,
            }
            for name, schema in self.functions.items()
        ]
        several: dict[str, Any] = {
            "type": "tags_with_separator",
            "tags": calls,
            "separator": form.between,
            "at_least_one": True,
            "stop_after_first": stop,
        }
        if form is LIST:
            tag = {
                "type": "tag",
                "begin": form.begin + form.opening,
                "content": several,
                "end": form.closing,
            }
            several, calls, stop = tag, [tag], True
        if self.needed:
            return guides.tags(several, needed=True)
        if form is BARE:
            return None
        free = {
            "type": "triggered_tags",
            "triggers": [form.sign],
            "tags": calls,
            "stop_after_first": stop,
        }
        return guides.tags(free, needed=False)

    def parser(self, prompt: Sequence[int] = ()) -> "ToolParser | TemplateParser":
        """What finds the calls in one reply.

        Args:
            prompt: its tokens, which a tokenizer's own response template may ask for.
        """
        names, most = frozenset(self.functions), None if self.parallel else 1
        short = self.form is LIST  # its templates take ids of nine characters only
        if self.known and getattr(self.tokenizer, "response_template", None) is not None:
            return TemplateParser(self.tokenizer, prompt, self.definitions, names, most, short)
        return ToolParser(names, most, short)


_HELLO = [{"role": "user", "content": "Hello"}]


def templated(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for the template: calls with their arguments as objects, or in words.

    Raises:
        SalienceError: arguments are not JSON.
    """
    read = getattr(tokenizer, "response_template", None) is not None
    if detect(template_text(tokenizer)) is None and not read:
        return [_in_words(message) for message in messages]
    return [_with_objects(message) for message in messages]


def _calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise SalienceError("a tool call in messages has no function name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise SalienceError(
                    f"the arguments of the call of {function['name']!r} in messages are not JSON"
                ) from None
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return calls


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = _calls(message)
    return {**message, "tool_calls": calls} if calls else dict(message)


def _in_words(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    texts = [content] if content else []
    for call in _calls(message):
        function = call["function"]
        written = json.dumps(
            {"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False
        )
        texts.append(f"<tool_call>\n{written}\n</tool_call>")
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(texts)}


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise SalienceError("tools must be a list")
    if len(tools) > _MOST:
        raise SalienceError(f"tools has {len(tools)} entries, at most {_MOST} are taken")
    functions: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise SalienceError(f"{where}.type must be 'function'; no other tools are known")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise SalienceError(f"{where}.function must be an object")
        name = function.get("name")
        plain = isinstance(name, str) and name.replace("_", "").replace("-", "").replace(".", "")
        if not isinstance(name, str) or len(name) > _LONGEST_NAME or not str(plain).isalnum():
            raise SalienceError(
                f"{where}.function.name must have letters, digits, _ and - only, at most "
                f"{_LONGEST_NAME}"
            )
        if name in functions:
            raise SalienceError(f"{where}.function.name is {name!r}, as of one before it")
        if not isinstance(function.get("description") or "", str):
            raise SalienceError(f"{where}.function.description must be text")
        functions[name] = _arguments(function, f"{where}.function")
    return functions


def _arguments(function: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The schema of a function's arguments, as a grammar can hold it."""
    schema = function.get("parameters")
    if schema is None or schema == {}:
        return _NO_ARGUMENTS
    if not isinstance(schema, Mapping):
        raise SalienceError(f"{where}.parameters must be a JSON schema, an object")
    if schema.get("type", "object") != "object":
        raise SalienceError(f"{where}.parameters.type must be 'object'")
    schema = {**schema, "type": "object"}
    try:
        normalized(schema)
    except SalienceError as error:
        if function.get("strict"):
            raise SalienceError(f"{where}.parameters: {error}") from None
        return {"type": "object"}  # nothing was promised beyond JSON
    return schema


def _choice(choice: Any, functions: Mapping[str, Any]) -> str:
    """auto, none, required, or a function's name."""
    if choice is None:
        return "auto"
    if choice in ("auto", "none"):
        return str(choice)
    if choice == "required":
        if not functions:
            raise SalienceError("tool_choice is 'required' and there are no tools")
        return "required"
    named = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = named.get("name") if isinstance(named, Mapping) else None
    if not isinstance(name, str):
        raise SalienceError(
            "tool_choice must be 'auto', 'none', 'required' or "
            '{"type": "function", "function": {"name": ...}}'
        )
    if name not in functions:
        raise SalienceError(f"tool_choice is the function {name!r}, which is not in tools")
    return name


def _tells(tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the chat template writes tools into the prompt."""
    without = _renders(tokenizer, _HELLO)
    told = _renders(tokenizer, _HELLO, tools)
    return told is not None and told != without


def _renders(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str | None:
    """The prompt's text; None if the template refuses."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        return None
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                add_generation_prompt=True,
                tokenize=False,
            )
        )
    except (TemplateError, TypeError, KeyError):
        return None
