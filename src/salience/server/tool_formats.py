"""How models write tool calls: a few formats, told by what a chat template says, not by names.

| format | a call |
|---|---|
| tags | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, each its own (Hermes, Qwen) |
| list | `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` (Mistral) |
| bare | `{"name": ..., "parameters": {...}}` alone, maybe after `<|python_tag|>` (Llama) |

A template that writes none of these gets the first one, and a plain instruction.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls.

    Args:
        name: for messages.
        sign: what is in the chat templates of models that write so.
        begin: before a call, or before all of them.
        end: after it.
        arguments: what the key of the arguments is.
        opening: of the list of calls; empty where each call has its own begin.
        between: two calls.
        closing: of the list.
    """

    name: str
    sign: str
    begin: str
    end: str = ""
    arguments: str = "arguments"
    opening: str = ""
    between: str = "\n"
    closing: str = ""

    def head(self, function: str) -> str:
        """The call up to its arguments; `function` in JSON."""
        return f'{{"name": {function}, "{self.arguments}": '


TAGS = ToolFormat("tags", "<tool_call>", "<tool_call>\n", "\n</tool_call>")
LIST = ToolFormat("list", "[TOOL_CALLS]", "[TOOL_CALLS]", opening="[", between=", ", closing="]")
BARE = ToolFormat("bare", "<|python_tag|>", "", arguments="parameters", between="; ")
# A template may have the signs of several: of `<tool_call>` in one of `[TOOL_CALLS]`, say.
FORMATS = (LIST, TAGS, BARE)


def markers() -> tuple[str, ...]:
    """What begins or ends calls, for which some tokenizers have special tokens."""
    return ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>")


def detect(template: str | None) -> ToolFormat | None:
    """The format that a chat template tells of; None if it tells of none we know."""
    text = template or ""
    if "<function=" in text or "[ARGS]" in text:
        return None  # other texts inside of the same marks
    found = next((each for each in FORMATS if each.sign in text), None)
    if found is None and '"parameters"' in text and '"name"' in text:
        return BARE
    return found


def template_text(tokenizer: Any) -> str | None:
    """The chat template that a request with tools is written by."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return template.get("tool_use", template.get("default"))
    return template if isinstance(template, str) else None
