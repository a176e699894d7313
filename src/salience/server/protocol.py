"""The fields of requests, as OpenAI and vLLM name them.

Fields that are not here are accepted and ignored, as clients expect that send what their newest
model knows. Values out of range are refused before anything runs.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from salience.runtime.sampling import MAX_LOGPROBS
from salience.server.errors import ApiError
from salience.server.service import Form

_INT64 = 2**63
_MOST_REPLIES = 64
Number = Annotated[float, Field(allow_inf_nan=False)]
# JSON objects whose inside is for others to judge.
Object = dict[str, Any]


class Fields(BaseModel):
    """A JSON object of which some fields are known."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class StreamOptions(Fields):
    """How a stream ends."""

    include_usage: bool | None = Field(None, description="A last chunk tells the tokens used.")


class SamplingFields(Fields):
    """How replies are drawn, for both kinds of completions. What is not said is the model's own."""

    model: str | None = Field(None, description="The served model; may be left out.")
    n: int | None = Field(None, ge=1, le=_MOST_REPLIES, description="Replies to make.")
    seed: int | None = Field(
        None, ge=-_INT64, lt=_INT64, description="The same seed and prompt give the same reply."
    )
    temperature: Number | None = Field(None, ge=0, le=100, description="0: the likeliest token.")
    top_p: Number | None = Field(None, gt=0, le=1, description="Probability of the tokens kept.")
    top_k: int | None = Field(None, ge=-1, lt=_INT64, description="Tokens kept; 0 or -1 for all.")
    min_p: Number | None = Field(None, ge=0, le=1, description="Least part of the likeliest's.")
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    repetition_penalty: Number | None = Field(None, gt=0, le=100)
    logit_bias: Object | None = Field(None, description="Refused unless empty.")
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = (
        Field(None, description="Texts that end the reply and are no part of it.")
    )
    stop_token_ids: list[int] | None = Field(None, description="Tokens that end the reply.")
    ignore_eos: bool | None = Field(None, description="Go on after the model's own end.")
    stream: bool | None = Field(None, description="Send the reply as server-sent events.")
    stream_options: StreamOptions | None = None
    guided_json: Object | str | None = Field(None, description="A JSON schema of the reply.")
    guided_regex: str | None = Field(None, description="A pattern of the whole reply.")
    guided_choice: list[str] | None = Field(None, min_length=1, description="The replies allowed.")
    guided_grammar: str | None = Field(None, description="An EBNF grammar of the reply.")
    structured_outputs: Object | None = Field(
        None, description="One of json, regex, choice, grammar, json_object: the same, newer."
    )

    @property
    def include_usage(self) -> bool:
        options = self.stream_options
        return options is not None and bool(options.include_usage)


class ChatRequest(SamplingFields):
    """`/v1/chat/completions`."""

    messages: list[Object] = Field(
        min_length=1,
        description="role and content; content is a text or a list of parts of type text.",
    )
    max_tokens: int | None = Field(None, ge=1, lt=_INT64, description="Most tokens of a reply.")
    max_completion_tokens: int | None = Field(None, ge=1, lt=_INT64)
    logprobs: bool | None = Field(None, description="Tell the tokens' log probabilities.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: Object | None = Field(
        None, description="type: text, json_object or json_schema."
    )
    tools: list[Object] | None = Field(None, description="Functions that the model may call.")
    tool_choice: str | Object | None = Field(
        None, description="auto, none, required, or the function to call."
    )
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Object | None = Field(None, description="Variables of the template.")


class CompletionRequest(SamplingFields):
    """`/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, tokens, or several of either."
    )
    max_tokens: int | None = Field(None, ge=1, lt=_INT64, description="Most tokens of a reply: 16.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = Field(None, description="Begin each reply with its prompt.")
    suffix: str | None = Field(None, description="Refused unless empty.")
    best_of: int | None = Field(None, ge=1, description="Refused unless it is n.")
    response_format: Object | None = Field(None, description="As for chats.")


class TokenizeRequest(Fields):
    """`/tokenize`: a text, or messages as for a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Object] | None = None


class DetokenizeRequest(Fields):
    """`/detokenize`."""

    model: str | None = None
    tokens: list[int]


def form_of(request: SamplingFields, response_format: Mapping[str, Any] | None) -> Form | None:
    """What a reply must look like.

    Raises:
        ApiError: it is not understood, or said twice.
    """
    newer = {k: v for k, v in (request.structured_outputs or {}).items() if v is not None}
    forms = [
        _format(response_format or {}),
        _form("guided_json", "json", request.guided_json),
        _form("guided_regex", "regex", request.guided_regex),
        _form("guided_choice", "choice", request.guided_choice),
        _form("guided_grammar", "grammar", request.guided_grammar),
        *(_form("structured_outputs", kind, value) for kind, value in newer.items()),
    ]
    found = [form for form in forms if form is not None]
    if len(found) > 1:
        raise ApiError("only one form of the reply can be asked for", param="response_format")
    return found[0] if found else None


def _format(value: Mapping[str, Any]) -> Form | None:
    kind = value.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return Form("json_object")
    if kind != "json_schema":
        message = f"response_format has type {kind!r}; it may be text, json_object or json_schema"
        raise ApiError(message, param="response_format.type")
    inner = value.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        message = "response_format of type json_schema needs an object json_schema.schema"
        raise ApiError(message, param="response_format.json_schema.schema")
    return Form("json_schema", schema)


def _form(param: str, kind: str, value: Any) -> Form | None:
    if value is None:
        return None
    if kind == "json" and isinstance(value, str):
        value = _parsed(param, value)
    if kind == "json" and isinstance(value, dict):
        return Form("json_schema", value)
    if kind == "json_object" and isinstance(value, bool):
        return Form("json_object") if value else None
    if kind == "regex" and isinstance(value, str):
        return Form("regex", value)
    if kind == "grammar" and isinstance(value, str):
        return Form("grammar", value)
    texts = isinstance(value, list) and value and all(isinstance(each, str) for each in value)
    if kind == "choice" and texts:
        return Form("grammar", _choices(value))
    raise ApiError(f"{param} has {kind!r} with a value that is not understood", param=param)


def _choices(texts: Sequence[str]) -> str:
    """The grammar of one of some texts."""
    return "root ::= " + " | ".join(json.dumps(text) for text in texts)


def _parsed(param: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"{param} is no JSON: {error}", param=param) from error


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are texts: lists of text parts are joined.

    Raises:
        ApiError: one has no role, or parts that are no text.
    """
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except (UnicodeError, RecursionError) as error:
        raise ApiError(f"the messages are no text: {error}", param="messages") from error
    return [_message(f"messages.{i}", message) for i, message in enumerate(messages)]


def _message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ApiError(f"{where} has no role", param=f"{where}.role")
    if role == "developer":
        role = "system"  # what templates know it as
    if isinstance(content, list):
        content = "".join(_part(f"{where}.content.{i}", part) for i, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise ApiError(f"{where} has a content that is no text", param=f"{where}.content")
    elif content is None and role != "assistant":
        raise ApiError(f"{where} has no content", param=f"{where}.content")
    return {**message, "role": role, "content": content or ""}


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text", "refusal"):
        text = part.get("refusal" if kind == "refusal" else "text")
        if isinstance(text, str):
            return text
    if isinstance(kind, str) and kind.startswith(("image", "input_image", "audio", "input_audio")):
        thing = "images" if "image" in kind else "audio"
        message = f"this model reads text only, no {thing}; send parts of type text"
        raise ApiError(message, param=where, code="unsupported_content")
    raise ApiError(f"{where} has type {kind!r}; this model reads parts of type text", param=where)
