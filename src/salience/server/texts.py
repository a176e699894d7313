"""`/v1/completions`, `/tokenize` and `/detokenize`: texts and tokens without a chat template."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from salience.chat.prompt import encode
from salience.server.answers import TextAnswer, documented, new_id, text_logprobs, usage
from salience.server.chats import STATUSES, drawn
from salience.server.errors import ApiError
from salience.server.protocol import (
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    form_of,
    plain_messages,
)
from salience.server.service import Service
from salience.server.sse import DONE, Events, data, until_gone
from salience.server.worker import Job, Piece, Stream

_MOST_PROMPTS = 64
_DEFAULT_TOKENS = 16  # OpenAI's


def router(service: Service) -> APIRouter:
    """The routes."""
    made = APIRouter()

    @made.post(
        "/v1/completions",
        summary="Go on with a text",
        responses=documented(TextAnswer, *STATUSES, stream=True),
        tags=["text"],
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        answer = _Answer(service, body)
        jobs = await until_gone(request, answer.jobs())
        if body.stream:
            return Events(answer.frames(await answer.begin(jobs)))
        return JSONResponse(await until_gone(request, answer.whole(jobs)))

    @made.post(
        "/tokenize",
        summary="The tokens of a text or of messages",
        responses=documented(dict[str, Any], *STATUSES),
        tags=["text"],
    )
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError("tokenize takes either prompt or messages", param="prompt")
        if body.prompt is not None:
            tokens = await service.tokens(body.prompt)
        else:
            messages = plain_messages(body.messages or ())
            tokens = await service.apart(lambda: encode(service.tokenizer, messages))
        answer = {"tokens": tokens, "count": len(tokens), "max_model_len": service.context}
        return JSONResponse(answer)

    @made.post(
        "/detokenize",
        summary="The text of tokens",
        responses=documented(dict[str, Any], *STATUSES),
        tags=["text"],
    )
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.check_model(body.model)
        service.check_tokens(body.tokens, "tokens")
        return JSONResponse({"prompt": str(service.tokenizer.decode(body.tokens))})

    return made


class _Answer:
    """One request's answer. Prompt p's reply i is choice p * n + i."""

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        self._service = service
        self._body = body
        self._id = new_id("cmpl")
        self._created = int(time.time())
        self._n = body.n or 1
        self._echoed: list[str] = []

    async def jobs(self) -> list[Job]:
        """What is asked for.

        Raises:
            ApiError: 400, what is not possible.
        """
        body, service = self._body, self._service
        service.check_model(body.model)
        if body.suffix:
            raise ApiError("suffix is not possible here; leave it out", param="suffix")
        if body.best_of not in (None, self._n):
            raise ApiError("best_of must be n or left out", param="best_of")
        if body.echo and body.logprobs is not None:
            raise ApiError("echo gives no log probabilities of the prompt", param="logprobs")
        sampling = service.sampling(
            **drawn(body), max_new_tokens=body.max_tokens or _DEFAULT_TOKENS, logprobs=body.logprobs
        )
        prompts = _prompts(body.prompt)
        for each in prompts:
            if not isinstance(each, str):
                service.check_tokens(each, "prompt")
        if body.echo:
            self._echoed = [
                p if isinstance(p, str) else str(service.tokenizer.decode(p)) for p in prompts
            ]
        guide = await service.form(form_of(body, body.response_format))
        return [
            await service.text_job(each, sampling, self._n, guide)
            if isinstance(each, str)
            else Job(each, sampling, self._n, guide)
            for each in prompts
        ]

    async def begin(self, jobs: Sequence[Job]) -> list[Stream]:
        """Begin all jobs, or none."""
        streams: list[Stream] = []
        try:
            for job in jobs:
                streams.append(await self._service.complete(job))
        except ApiError:
            for stream in streams:
                stream.close()
            raise
        return streams

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.name,
        }

    def _choice(self, number: int, piece: Piece, at: int) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = text_logprobs(self._service.tokenizer, piece.logprobs, at)
        return {
            "index": number,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    def _starts(self) -> list[str]:
        return [text for text in self._echoed for _ in range(self._n)]

    async def whole(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """All texts at once."""
        streams = await self.begin(jobs)
        async with AsyncExitStack() as stack:
            for stream in streams:
                await stack.enter_async_context(stream)
            replies = [Piece(i) for i in range(len(jobs) * self._n)]
            for number, text in enumerate(self._starts()):
                replies[number].text = text
            async for number, piece in _merged(streams):
                replies[number].add(piece)
            choices = [self._choice(i, reply, 0) for i, reply in enumerate(replies)]
        return {**self._head(), "choices": choices, "usage": usage(streams)}

    async def frames(self, streams: Sequence[Stream]) -> AsyncGenerator[bytes, None]:
        """Chunks of all texts, as they come."""
        at = [0] * len(streams) * self._n
        async with AsyncExitStack() as stack:
            for stream in streams:
                await stack.enter_async_context(stream)
            for number, text in enumerate(self._starts()):
                yield self._chunk(self._choice(number, Piece(number, text), 0))
            async for number, piece in _merged(streams):
                if piece.text or piece.logprobs or piece.finish_reason:
                    yield self._chunk(self._choice(number, piece, at[number]))
                at[number] += len(piece.text)
            if self._body.include_usage:
                yield data({**self._head(), "choices": [], "usage": usage(streams)})
            yield DONE

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        chunk = {**self._head(), "choices": [choice]}
        if self._body.include_usage:
            chunk["usage"] = None
        return data(chunk)


def _prompts(prompt: str | Sequence[Any]) -> list[Any]:
    """A list of texts or of lists of tokens."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError("the prompt is empty", param="prompt")
    if isinstance(prompt[0], int):
        return [list(prompt)]
    if len(prompt) > _MOST_PROMPTS:
        message = f"there are {len(prompt)} prompts; {_MOST_PROMPTS} at once are the most"
        raise ApiError(message, param="prompt")
    return list(prompt)


async def _merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of several streams as they come, with the number of their choice."""
    iterators = [aiter(stream) for stream in streams]
    waiting = {asyncio.ensure_future(anext(it, None)): i for i, it in enumerate(iterators)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = waiting.pop(task)
                piece = task.result()
                if piece is not None:
                    yield i * streams[i].job.n + piece.index, piece
                    waiting[asyncio.ensure_future(anext(iterators[i], None))] = i
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
