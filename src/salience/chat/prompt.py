"""From messages to the tokens of a prompt, and the sampling that a model's makers advise.

The tokenizer's own chat template writes the prompt. Every turn is templated anew from the whole
talk; the engine then finds how many of its tokens are in the cache, so that only the new turn is
computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from salience.errors import SalienceError
from salience.runtime import Sampling


def encode(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **values: Any,
) -> list[int]:
    """The prompt's tokens for the next reply of the assistant; arguments as of `write`.

    Raises:
        SalienceError: there are no messages, or the template refuses them.
    """
    text = write(tokenizer, messages, tools, **values)
    return tokens_of(tokenizer, text)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of what `write` wrote: a template has the special ones in its text."""
    templated = tokenizer.chat_template is not None
    return list(tokenizer(text, add_special_tokens=not templated)["input_ids"])


def write(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **values: Any,
) -> str:
    """The prompt's text for the next reply of the assistant.

    Without a template the messages' texts follow each other, an empty line between two.

    Args:
        tokenizer: of Transformers.
        messages: `{"role": ..., "content": ...}`, oldest first.
        tools: functions in JSON schema that the template may tell the model of.
        values: further variables of the template, such as `enable_thinking`.

    Raises:
        SalienceError: there are no messages, or the template refuses them.
    """
    if not messages:
        raise SalienceError("there are no messages")
    if tokenizer.chat_template is None:
        if tools:
            raise SalienceError("the tokenizer has no chat template, so the model knows no tools")
        return "\n\n".join(str(message["content"] or "") for message in messages)
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=True,
                tokenize=False,
                **values,
            )
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise SalienceError(f"the chat template refuses these messages: {error}") from error


def defaults(model: Any, **changes: Any) -> Sampling:
    """The sampling of a model's generation config, with changes.

    Raises:
        SalienceError: a value out of its range.
    """
    config = model.generation_config
    advised = Sampling(
        temperature=(getattr(config, "temperature", None) or 1.0) if config.do_sample else 0.0,
        top_k=getattr(config, "top_k", None) or 0,
        top_p=getattr(config, "top_p", None) or 1.0,
        min_p=getattr(config, "min_p", None) or 0.0,
        repetition_penalty=getattr(config, "repetition_penalty", None) or 1.0,
    )
    return replace(advised, **changes)
