"""`/v1/responses`, for text: items in, items out, and talks that the server remembers.

A response is kept, with the talk that led to it, so that `previous_response_id` can go on with it,
unless `store` is false. They are kept in memory only, the oldest are forgotten first, and a
response that is forgotten is said to be not found.
"""

import json
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from salience.server.answers import documented, new_id
from salience.server.errors import ApiError
from salience.server.protocol import Fields, Number, Object, plain_messages
from salience.server.service import ChatJob, ChatStream, Delta, Form, Service
from salience.server.sse import Events, data, until_gone

_STATUSES = (400, 401, 404, 408, 413, 415, 429, 500, 503)
_KEPT = 1000
_KEPT_BYTES = 64 << 20
_NOT_HERE = ("conversation", "background", "prompt")


class ResponsesRequest(Fields):
    """`/v1/responses`."""

    model: str | None = Field(None, description="The served model; may be left out.")
    input: str | list[Object] = Field(
        description="A text, or items of type message, function_call and function_call_output."
    )
    instructions: str | None = Field(None, description="A system message, for this response only.")
    previous_response_id: str | None = Field(None, description="A response to go on with.")
    max_output_tokens: int | None = Field(None, ge=1, lt=2**63)
    temperature: Number | None = Field(None, ge=0, le=100)
    top_p: Number | None = Field(None, gt=0, le=1)
    text: Object | None = Field(None, description="format: text, json_object or json_schema.")
    tools: list[Object] | None = Field(None, description="Functions that the model may call.")
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = Field(None, description="Whether to remember it: yes.")
    stream: bool | None = None


class ResponsesAnswer(BaseModel):
    """A response."""

    id: str
    object: str
    created_at: int
    status: str = Field(description="completed or incomplete")
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class _Kept:
    messages: Sequence[Mapping[str, Any]]  # with the reply, without the instructions
    response: Mapping[str, Any]
    size: int


class _Store:
    """The last responses, bounded in number and bytes."""

    def __init__(self, most: int = _KEPT, most_bytes: int = _KEPT_BYTES) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._most = most
        self._left = most_bytes

    def keep(self, messages: Sequence[Mapping[str, Any]], response: Mapping[str, Any]) -> None:
        size = len(json.dumps([messages, response]))
        self._kept[response["id"]] = _Kept(messages, response, size)
        self._left -= size
        while len(self._kept) > self._most or self._left < 0:
            self.forget(next(iter(self._kept)))

    def forget(self, name: str) -> None:
        self._left += self.get(name).size
        del self._kept[name]

    def get(self, name: str) -> _Kept:
        found = self._kept.get(name)
        if found is None:
            raise ApiError(f"there is no response {name!r}; it may be forgotten", 404)
        return found


def router(service: Service) -> APIRouter:
    """The routes."""
    made = APIRouter(tags=["responses"])
    store = _Store()

    @made.post(
        "/v1/responses",
        summary="Respond",
        responses=documented(ResponsesAnswer, *_STATUSES, stream=True),
    )
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        answer = _Answer(service, store, body)
        if body.stream:
            stream = await until_gone(request, service.chat(answer.job))
            return Events(answer.frames(stream), on_error=answer.failure)
        return JSONResponse(await until_gone(request, answer.whole()))

    @made.get(
        "/v1/responses/{name}",
        summary="A response that was made",
        responses=documented(ResponsesAnswer, 401, 404, 500),
    )
    async def one(name: str) -> Response:
        return JSONResponse(store.get(name).response)

    @made.delete(
        "/v1/responses/{name}",
        summary="Forget a response",
        responses=documented(dict[str, Any], 401, 404, 500),
    )
    async def forget(name: str) -> Response:
        store.forget(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    return made


class _Answer:
    """One request's response.

    Raises:
        ApiError: what it asks for is not possible.
    """

    def __init__(self, service: Service, store: _Store, body: ResponsesRequest) -> None:
        service.check_model(body.model)
        for name in _NOT_HERE:
            if (body.model_extra or {}).get(name):
                raise ApiError(f"{name} is not possible here; leave it out", param=name)
        self._service = service
        self._store = store
        self._body = body
        self._talk = [*_before(store, body), *_messages(body.input)]
        self._sampling = service.sampling(
            max_new_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
        )
        self.job = ChatJob(
            messages=[*_instructions(body), *self._talk],
            sampling=self._sampling,
            form=_form(body.text),
            tools=_tools(body.tools or ()),
            tool_choice=body.tool_choice,
            parallel_tool_calls=body.parallel_tool_calls is not False,
        )
        self._head = self._made_head()
        self._writer = _Writer()

    def _made_head(self) -> dict[str, Any]:
        body = self._body
        return {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._service.name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "store": body.store is not False,
            "temperature": self._sampling.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": self._sampling.top_p,
            "truncation": "disabled",
            "metadata": body.metadata or {},
            "usage": None,
        }

    async def whole(self) -> dict[str, Any]:
        """All of it at once."""
        async with await self._service.chat(self.job) as stream:
            reason = None
            async for delta in stream:
                self._writer.add(delta)
                reason = delta.finish_reason or reason
            self._writer.end()
            return self._finished(stream, reason)

    async def frames(self, stream: ChatStream) -> AsyncGenerator[bytes, None]:
        """The events, each a frame."""
        writer = self._writer
        async with stream:
            yield writer.frame("response.created", response=self._head)
            yield writer.frame("response.in_progress", response=self._head)
            reason = None
            async for delta in stream:
                for frame in writer.add(delta):
                    yield frame
                reason = delta.finish_reason or reason
            for frame in writer.end():
                yield frame
            response = self._finished(stream, reason)
            yield writer.frame(f"response.{response['status']}", response=response)

    def failure(self, error: ApiError) -> bytes:
        """The event of an error in the middle of a stream."""
        said = error.body()["error"]
        return self._writer.frame(
            "error", code=said["code"], message=said["message"], param=said["param"]
        )

    def _finished(self, stream: ChatStream, reason: str | None) -> dict[str, Any]:
        cut = reason == "length"
        used = stream.stream
        response = {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._writer.output,
            "usage": {
                "input_tokens": used.prompt_tokens,
                "input_tokens_details": {"cached_tokens": used.cached_tokens},
                "output_tokens": used.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used.prompt_tokens + used.completion_tokens,
            },
        }
        if self._body.store is not False:
            self._store.keep([*self._talk, *_messages(self._writer.output)], response)
        return response


class _Writer:
    """Makes items of deltas, and the events that tell of them."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._text: list[str] | None = None  # of the message that goes on
        self._count = 0

    def frame(self, kind: str, **values: Any) -> bytes:
        """An event."""
        self._count += 1
        return data({"type": kind, "sequence_number": self._count - 1, **values}, event=kind)

    def add(self, delta: Delta) -> list[bytes]:
        """What a delta adds."""
        out = []
        if delta.text:
            if self._text is None:
                out += self._open()
            assert self._text is not None
            self._text.append(delta.text)
            place = self._place()
            out.append(
                self.frame("response.output_text.delta", **place, delta=delta.text, logprobs=[])
            )
        for call in delta.tool_calls:
            out += self._close()
            out += self._call(call.id or "", call.name or "", call.arguments)
        return out

    def end(self) -> list[bytes]:
        """The end of the last item; there is one in any case."""
        opened = [] if self.output else self._open()
        return opened + self._close()

    def _place(self) -> dict[str, Any]:
        return {
            "item_id": self.output[-1]["id"],
            "output_index": len(self.output) - 1,
            "content_index": 0,
        }

    def _open(self) -> list[bytes]:
        self._text = []
        self.output.append(_message_item(new_id("msg"), None))
        item, place = self.output[-1], self._place()
        return [
            self.frame("response.output_item.added", output_index=place["output_index"], item=item),
            self.frame("response.content_part.added", **place, part=_text_part("")),
        ]

    def _close(self) -> list[bytes]:
        if self._text is None:
            return []
        text, self._text = "".join(self._text), None
        place = self._place()
        item = self.output[-1] = _message_item(place["item_id"], text)
        index = place["output_index"]
        return [
            self.frame("response.output_text.done", **place, text=text, logprobs=[]),
            self.frame("response.content_part.done", **place, part=_text_part(text)),
            self.frame("response.output_item.done", output_index=index, item=item),
        ]

    def _call(self, code: str, name: str, arguments: str) -> list[bytes]:
        item = {
            "type": "function_call",
            "id": new_id("fc"),
            "call_id": code,
            "name": name,
            "arguments": arguments,
            "status": "completed",
        }
        self.output.append(item)
        index = len(self.output) - 1
        begun = {**item, "arguments": "", "status": "in_progress"}
        place = {"item_id": item["id"], "output_index": index}
        return [
            self.frame("response.output_item.added", output_index=index, item=begun),
            self.frame("response.function_call_arguments.delta", **place, delta=arguments),
            self.frame(
                "response.function_call_arguments.done", **place, name=name, arguments=arguments
            ),
            self.frame("response.output_item.done", output_index=index, item=item),
        ]


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message_item(name: str, text: str | None) -> dict[str, Any]:
    return {
        "type": "message",
        "id": name,
        "role": "assistant",
        "status": "in_progress" if text is None else "completed",
        "content": [] if text is None else [_text_part(text)],
    }


def _before(store: _Store, body: ResponsesRequest) -> Sequence[Mapping[str, Any]]:
    name = body.previous_response_id
    if name is None:
        return []
    try:
        return store.get(name).messages
    except ApiError as error:
        raise ApiError(
            str(error), 400, "previous_response_id", "previous_response_not_found"
        ) from None


def _instructions(body: ResponsesRequest) -> list[dict[str, Any]]:
    return [{"role": "system", "content": body.instructions}] if body.instructions else []


def _messages(items: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as the messages of a chat."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not items:
        raise ApiError("input is empty", param="input")
    out: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        kind = item.get("type", "message")
        where = f"input.{index}"
        if kind == "message":
            out += _plain(item, where)
        elif kind == "function_call":
            if not out or out[-1]["role"] != "assistant":
                out.append({"role": "assistant", "content": ""})
            function = {"name": _text(item, "name", where)}
            function["arguments"] = _text(item, "arguments", where)
            call = {"id": _text(item, "call_id", where), "type": "function", "function": function}
            out[-1] = {**out[-1], "tool_calls": [*out[-1].get("tool_calls", ()), call]}
        elif kind == "function_call_output":
            result = {"role": "tool", "tool_call_id": _text(item, "call_id", where)}
            out += _plain({**result, "content": item.get("output")}, where)
        elif kind != "reasoning":  # what a model thought is not told to it again
            raise ApiError(
                f"{where} has type {kind!r}; it may be message, function_call or "
                "function_call_output",
                param=f"{where}.type",
            )
    return out


def _plain(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    known = {key: message[key] for key in ("role", "content", "tool_call_id") if key in message}
    try:
        return plain_messages([known])
    except ApiError as error:
        param = (error.param or "").replace("messages.0", where)
        text = str(error).replace("messages.0", where)
        raise ApiError(text, error.status, param, error.code) from None


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ApiError(f"{where}.{name} must be text", param=f"{where}.{name}")
    return value


def _form(text: Mapping[str, Any] | None) -> Form | None:
    wanted = (text or {}).get("format") or {"type": "text"}
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Form("json_object")
    if kind != "json_schema":
        message = f"text.format has type {kind!r}; it may be text, json_object or json_schema"
        raise ApiError(message, param="text.format.type")
    if not isinstance(wanted.get("schema"), dict):
        message = "text.format of type json_schema needs an object schema"
        raise ApiError(message, param="text.format.schema")
    return Form("json_schema", wanted["schema"])


def _tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Functions as chat completions write them."""
    out = []
    for index, tool in enumerate(tools):
        if tool.get("type") != "function":
            raise ApiError(
                f"tools.{index} has type {tool.get('type')!r}; only functions are possible here",
                param=f"tools.{index}.type",
            )
        function = {key: value for key, value in tool.items() if key != "type"}
        out.append({"type": "function", "function": function})
    return out
