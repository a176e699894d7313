"""The parts that answers have in common: ids, usage, and log probabilities with their tokens' text.

A token's text may be a part of a character, so its bytes are told too: of a byte-level vocabulary
by the table that GPT-2 made known, of others by names such as <0xE4>.
"""

import functools
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from salience.runtime import TokenLogprob
from salience.server.worker import Stream


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens that a request took. All choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(BaseModel):
    """A reply."""

    role: str
    content: str | None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    """One of the replies."""

    index: int
    message: ChatMessage
    finish_reason: str = Field(description="stop, length or tool_calls")
    logprobs: dict[str, Any] | None


class Answer(BaseModel):
    """What both kinds of completions have."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: str
    created: int
    model: str
    usage: Usage


class ChatAnswer(Answer):
    """The replies to a chat."""

    choices: list[ChatChoice]


class TextChoice(BaseModel):
    """One of the texts."""

    index: int
    text: str
    finish_reason: str = Field(description="stop or length")
    logprobs: dict[str, Any] | None


class TextAnswer(Answer):
    """The texts that go on with prompts."""

    choices: list[TextChoice]


class ModelAnswer(BaseModel):
    """The served model."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """All models: one."""

    object: str
    data: list[ModelAnswer]


def documented(answer: Any, *statuses: int, stream: bool = False) -> dict[int | str, Any]:
    """The `responses` of a route for the OpenAPI document."""
    content: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
    said: dict[int | str, Any] = {status: {"model": ErrorAnswer} for status in statuses}
    return {200: {"model": answer, **({"content": content} if stream else {})}, **said}


def new_id(prefix: str) -> str:
    """An id that no other answer has."""
    return f"{prefix}-{secrets.token_hex(12)}"


def usage(streams: Sequence[Stream]) -> dict[str, Any]:
    """The tokens that some jobs took."""
    prompt = sum(stream.prompt_tokens for stream in streams)
    completion = sum(stream.completion_tokens for stream in streams)
    cached = sum(stream.cached_tokens for stream in streams)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def chat_logprobs(tokenizer: Any, found: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As chat completions write them."""
    content = [
        {
            **_entry(tokenizer, each.token, each.logprob),
            "top_logprobs": [_entry(tokenizer, *pair) for pair in each.top],
        }
        for each in found
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    raw = token_bytes(tokenizer, token)
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def text_logprobs(tokenizer: Any, found: Sequence[TokenLogprob], start: int) -> dict[str, Any]:
    """As completions write them; the first token's text is at `start`."""
    texts, offsets, at = [], [], start
    for each in found:
        texts.append(_text(tokenizer, each.token))
        offsets.append(at)
        at += len(texts[-1])
    return {
        "tokens": texts,
        "token_logprobs": [each.logprob for each in found],
        "top_logprobs": [
            {_text(tokenizer, token): logprob for token, logprob in each.top} for each in found
        ],
        "text_offset": offsets,
    }


def _text(tokenizer: Any, token: int) -> str:
    return token_bytes(tokenizer, token).decode(errors="replace")


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token stands for."""
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None:
        return b""  # the head is wider than the vocabulary
    if token in tokenizer.all_special_ids:
        return str(name).encode()
    byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", name)
    if byte:
        return bytes([int(byte[1], 16)])
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if "\ufffd" in text and all(character in _byte_of() for character in name):
        return bytes(_byte_of()[character] for character in name)
    if name.startswith("\u2581") and not text.startswith(" "):
        text = " " + text  # decoding takes the space off the beginning of a text
    return text.encode()


@functools.cache
def _byte_of() -> Mapping[str, int]:
    """The bytes that GPT-2's characters stand for: itself, where it can be printed."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    shifted = {chr(256 + i): byte for i, byte in enumerate(rest)}
    return {**{chr(byte): byte for byte in plain}, **shifted}
