"""`/v1/chat/completions`."""

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from salience.server.answers import (
    ChatAnswer,
    chat_logprobs,
    documented,
    new_id,
    usage,
)
from salience.server.errors import ApiError
from salience.server.protocol import ChatRequest, SamplingFields, form_of, plain_messages
from salience.server.service import ChatJob, ChatStream, Delta, Service, ToolPiece
from salience.server.sse import DONE, Events, data, until_gone

STATUSES = (400, 401, 404, 408, 413, 415, 429, 500, 503)


def drawn(body: SamplingFields) -> dict[str, Any]:
    """The fields of `Service.sampling` that both kinds of completions have.

    Raises:
        ApiError: something that is not possible.
    """
    if body.logit_bias:
        raise ApiError("logit_bias is not possible here; leave it out", param="logit_bias")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return {
        "seed": body.seed,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": 0 if body.top_k == -1 else body.top_k,
        "min_p": body.min_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "stop": stop,
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": body.ignore_eos,
    }


def _job(service: Service, body: ChatRequest) -> ChatJob:
    service.check_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    most = body.max_completion_tokens or body.max_tokens
    sampling = service.sampling(
        **drawn(body),
        max_new_tokens=most,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return ChatJob(
        messages=plain_messages(body.messages),
        sampling=sampling,
        n=body.n or 1,
        form=form_of(body, body.response_format),
        tools=body.tools or (),
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        template=body.chat_template_kwargs or {},
    )


def router(service: Service) -> APIRouter:
    """The route."""
    made = APIRouter()

    @made.post(
        "/v1/chat/completions",
        summary="Go on with a chat",
        responses=documented(ChatAnswer, *STATUSES, stream=True),
        tags=["chat"],
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        answer = _Answer(service, body)
        job = _job(service, body)
        if body.stream:
            stream = await until_gone(request, service.chat(job))
            return Events(answer.frames(stream))
        return JSONResponse(await until_gone(request, answer.whole(job)))

    return made


class _Answer:
    """One request's answer."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self._service = service
        self._body = body
        self._id = new_id("chatcmpl")
        self._created = int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._service.name,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._service.tokenizer, delta.logprobs)

    async def whole(self, job: ChatJob) -> dict[str, Any]:
        """All replies at once."""
        async with await self._service.chat(job) as stream:
            replies = [_Reply() for _ in range(job.n)]
            async for delta in stream:
                replies[delta.index].add(delta)
            choices = [
                {
                    "index": index,
                    "message": reply.message(),
                    "logprobs": self._logprobs(reply.joined()),
                    "finish_reason": reply.finish_reason,
                }
                for index, reply in enumerate(replies)
            ]
            used = usage([stream.stream])
        return {**self._head("chat.completion"), "choices": choices, "usage": used}

    async def frames(self, stream: ChatStream) -> AsyncGenerator[bytes, None]:
        """Chunks: the role first, then what comes, the reason of the end in the last of each."""
        async with stream:
            for index in range(stream.stream.job.n):
                yield self._chunk(index, {"role": "assistant", "content": ""})
            async for delta in stream:
                said: dict[str, Any] = {"content": delta.text} if delta.text else {}
                if delta.tool_calls:
                    said["tool_calls"] = [_call(part) for part in delta.tool_calls]
                if said or delta.logprobs:
                    yield self._chunk(delta.index, said, self._logprobs(delta))
                if delta.finish_reason:
                    yield self._chunk(delta.index, {}, None, delta.finish_reason)
            if self._body.include_usage:
                used = usage([stream.stream])
                yield data({**self._head("chat.completion.chunk"), "choices": [], "usage": used})
            yield DONE

    def _chunk(
        self,
        index: int,
        said: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": said, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._body.include_usage:
            chunk["usage"] = None
        return data(chunk)


def _call(part: ToolPiece) -> dict[str, Any]:
    """A piece of a call in a chunk."""
    if part.id is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}


class _Reply:
    """The deltas of one reply, joined."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self._text: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._deltas: list[Delta] = []

    def add(self, delta: Delta) -> None:
        self._text.append(delta.text)
        self._deltas.append(delta)
        for part in delta.tool_calls:
            if part.index not in self._calls:
                function = {"name": part.name or "", "arguments": ""}
                call = {"id": part.id, "type": "function", "function": function}
                self._calls[part.index] = call
            self._calls[part.index]["function"]["arguments"] += part.arguments
        self.finish_reason = delta.finish_reason

    def joined(self) -> Delta:
        """All log probabilities in one."""
        found = tuple(each for delta in self._deltas for each in delta.logprobs)
        return Delta(0, logprobs=found)

    def message(self) -> dict[str, Any]:
        text = "".join(self._text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            message["content"] = text or None
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        return message
