"""What the routes ask: prompts from messages, jobs for the engine, replies as deltas.

    async with await service.chat(ChatJob(messages, service.sampling(temperature=0.7))) as stream:
        async for delta in stream: ...

No route knows of the engine, and nothing here knows of HTTP. What takes longer than a moment,
tokens of a long text or the grammar of a schema, is done on a thread of its own.
"""

import asyncio
import inspect
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from salience.chat.encoding import Encoder
from salience.chat.prompt import defaults, write
from salience.errors import SalienceError
from salience.placement import input_device
from salience.runtime import Engine, Sampling, TokenLogprob
from salience.runtime.limits import context
from salience.server.capacity import default_batch
from salience.server.errors import ApiError
from salience.server.guide import Guide, Guides
from salience.server.tools import Tools, templated
from salience.server.worker import Job, Piece, Stream, Watch, Worker

_T = TypeVar("_T")
# Between two steps of the running replies; a CPU needs a few hundred milliseconds for so many.
_PREFILL_CHUNK = {True: 512, False: 256}


# `Tools.of(tokenizer, tools, tool_choice, parallel)`.
ToolMaker = Callable[[Any, Sequence[Mapping[str, Any]], Any, bool], Tools | None]


@dataclass(frozen=True, slots=True)
class Form:
    """What a reply must look like: `value` is a schema, a pattern, a grammar, or None."""

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    value: Any = None


@dataclass(frozen=True, slots=True)
class ChatJob:
    """A talk to go on with.

    Args:
        messages: `{"role", "content", ...}` as the chat template takes them, contents as text.
        sampling: `Service.sampling`.
        n: replies.
        form: None for any text.
        tools: functions as OpenAI's chat completions write them.
        tool_choice: "auto", "none", "required" or {"type": "function", "function": {"name"}}.
        parallel_tool_calls: whether a reply may have several calls.
        template: further variables of the chat template.
    """

    messages: Sequence[Mapping[str, Any]]
    sampling: Sampling
    n: int = 1
    form: Form | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ToolPiece:
    """A piece of a call: its beginning has an id and a name."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What was added to reply `index`; the last one has a finish_reason.

    That is "stop", "length" or "tool_calls".
    """

    index: int
    text: str = ""
    tool_calls: tuple[ToolPiece, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


class ChatStream:
    """The deltas of a chat. `async with` it, so that leaving ends what still runs."""

    def __init__(self, stream: Stream, tools: Tools | None) -> None:
        self.stream = stream
        self._parsers = (
            {}
            if tools is None
            else {i: tools.parser(stream.job.prompt) for i in range(stream.job.n)}
        )
        self._called: set[int] = set()

    async def __aenter__(self) -> "ChatStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stream.close()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for piece in self.stream:
            yield self._delta(piece)

    def _delta(self, piece: Piece) -> Delta:
        index, text, reason = piece.index, piece.text, piece.finish_reason
        calls: list[ToolPiece] = []
        if index in self._parsers:
            parser = self._parsers[index]
            found = list(parser.push(text)) if text else []
            found += parser.flush() if reason else ()
            text = "".join(part.content for part in found if part.index is None)
            for part in found:
                if part.index is not None:
                    calls.append(ToolPiece(part.index, part.arguments, part.id, part.name))
            if calls:
                self._called.add(index)
            if reason == "stop" and index in self._called:
                reason = "tool_calls"
        return Delta(index, text, tuple(calls), tuple(piece.logprobs), reason)


def make_engine(
    model: Any,
    tokenizer: Any,
    max_context: int | None,
    max_batch: int | None,
    prefill_chunk: int | None,
) -> Engine:
    """The engine of a service, with its first steps prepared.

    Args:
        model: a Transformers causal language model.
        tokenizer: of the model.
        max_context: None for the model's own, at most 8192.
        max_batch: None for what the memory allows.
        prefill_chunk: tokens of prompts between two steps; None for the default.
    """
    tokens = context(model, max_context)
    batch = max_batch or default_batch(model, tokens)
    chunk = prefill_chunk or _PREFILL_CHUNK[input_device(model).type == "cuda"]
    engine = Engine(model, tokenizer, max_context=tokens, max_batch=batch, prefill_chunk=chunk)
    engine.prepare(defaults(model), defaults(model, temperature=0.7))
    return engine


class Service:
    """A model that is served.

    Args:
        engine: nobody else's.
        tokenizer: of Transformers.
        name: of the model, as clients know it.
        queue: replies that may wait.
        watch: the metrics.
        guides: None refuses forms.
        tools: None refuses tools.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        name: str,
        queue: int = 256,
        watch: Watch | None = None,
        guides: Guides | None = None,
        tools: ToolMaker | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.engine = engine
        self.worker = Worker(engine, queue, watch)
        self.created = int(time.time())
        self._guides = guides
        self._tools = tools
        self._threads = ThreadPoolExecutor(2, "salience-prepare")
        untemplated = tokenizer.chat_template is None
        self._texts = Encoder(tokenizer, engine.max_context, special=True)
        self._chats = Encoder(tokenizer, engine.max_context, special=untemplated)

    @property
    def context(self) -> int:
        """Tokens of prompt and reply together."""
        return self.engine.max_context

    def check_model(self, name: str | None) -> None:
        """Refuse the name of another model.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.name:
            message = f"the model {name!r} does not exist; this server has {self.name!r}"
            raise ApiError(message, 404, "model", "model_not_found")

    def sampling(self, **changes: Any) -> Sampling:
        """The model's own sampling with what a request says; None for what it does not say.

        Without a seed it is a random one, without max_new_tokens as many as the context has.

        Raises:
            ApiError: 400, a value out of its range.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        given.setdefault("max_new_tokens", self.context)
        given.setdefault("seed", secrets.randbits(62))
        try:
            return defaults(self.engine.model, **given)
        except SalienceError as error:
            name = str(error).split(" ", 1)[0]
            raise ApiError(str(error), param=name if name in given else None) from error

    async def apart(self, work: Callable[[], _T]) -> _T:
        """Do something that takes a while on another thread.

        Raises:
            ApiError: 400 for its SalienceError.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except SalienceError as error:
            raise ApiError(str(error)) from error
        except (UnicodeError, RecursionError) as error:
            raise ApiError(f"a text is not valid: {type(error).__name__}: {error}") from error

    async def tokens(self, text: str) -> list[int]:
        """The tokens of a text that is no chat."""
        return await self.apart(lambda: list(self.tokenizer(text)["input_ids"]))

    async def text_job(
        self, text: str, sampling: Sampling, n: int, guide: Callable[[], Guide] | None
    ) -> Job:
        """A job whose prompt is a text that is no chat."""
        tokens = await self.apart(lambda: self._texts.encode(text))
        return Job(tokens, sampling, n, guide, partial(self._texts.keep, text))

    async def complete(self, job: Job) -> Stream:
        """Begin replies to a prompt of tokens.

        Raises:
            ApiError: 400 for a prompt that is empty or too long, 429, 503.
        """
        count = len(job.prompt)
        if not count:
            raise ApiError("the prompt is empty", param="prompt")
        if count >= self.context:
            raise ApiError(
                f"this model's context is {self.context} tokens and the prompt has {count}, which "
                "leaves no room for a reply; shorten it",
                code="context_length_exceeded",
            )
        self.check_tokens(job.prompt, "prompt")
        return self.worker.submit(job)

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Refuse tokens that the model does not have.

        Raises:
            ApiError: 400.
        """
        vocabulary = self.engine.model.config.get_text_config().vocab_size
        if not all(0 <= token < vocabulary for token in tokens):
            raise ApiError(f"tokens must be between 0 and {vocabulary - 1}", param=param)

    async def chat(self, job: ChatJob) -> ChatStream:
        """Begin replies to messages.

        Raises:
            ApiError: 400 for what the template, the schema or the context refuses, 429, 503.
        """
        taken = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "messages"}
        for name in job.template:
            if name in taken or not name.isidentifier():
                message = f"{name!r} is no variable that a request may set"
                raise ApiError(message, param="chat_template_kwargs")
        tools = await self._use(job)
        text = await self.apart(lambda: self._text(job, tools))
        prompt = await self.apart(lambda: self._chats.encode(text))
        guide = await self._guide(job, tools)
        sampling = job.sampling if tools is None else tools.sampling(job.sampling)
        made = Job(prompt, sampling, job.n, guide, partial(self._chats.keep, text))
        return ChatStream(await self.complete(made), tools)

    def _text(self, job: ChatJob, tools: Tools | None) -> str:
        if tools is None:
            return write(self.tokenizer, templated(self.tokenizer, job.messages), **job.template)
        messages = tools.messages(job.messages)
        return write(self.tokenizer, messages, tools.template_tools, **job.template)

    async def _use(self, job: ChatJob) -> Tools | None:
        make = self._tools
        if not job.tools or job.tool_choice == "none":
            return None
        if make is None:
            raise ApiError("this server has no tools", param="tools")
        return await self.apart(
            lambda: make(self.tokenizer, job.tools, job.tool_choice, job.parallel_tool_calls)
        )

    async def _guide(self, job: ChatJob, tools: Tools | None) -> Callable[[], Guide] | None:
        """What makes a guide for each reply, once it has made one here: that compiles it."""
        guides = self._guides
        if tools is not None and guides is not None:
            use = tools
            if await self.apart(lambda: use.guide(guides)) is not None:
                return lambda: _made(use.guide(guides))
        return await self.form(job.form)

    async def form(self, form: Form | None) -> Callable[[], Guide] | None:
        """What makes guides for a form, for `Job.guide`.

        Raises:
            ApiError: 400, there is no such form.
        """
        guides = self._guides
        if form is None:
            return None
        if guides is None:
            raise ApiError("this server makes no guided replies", param="response_format")
        kind, value = form.kind, form.value

        def make() -> Guide:
            maker = getattr(guides, kind)
            return maker() if kind == "json_object" else maker(value)

        await self.apart(make)
        return make

    async def stop(self) -> None:
        """End everything."""
        await self.worker.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _made(guide: Guide | None) -> Guide:
    if guide is None:
        raise SalienceError("the tools make no guide")
    return guide
