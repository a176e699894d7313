"""A talk with a model: each reply is drawn with the turns before it in the cache.

Every prompt is templated anew from the whole talk, and the engine computes what of its tokens is
not in its cache. `Encoder` sees to it that this is the new turn alone.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace

from salience.chat import thinking
from salience.chat.encoding import Encoder
from salience.chat.prompt import defaults, write
from salience.chat.talk import Talk, check_text
from salience.errors import SalienceError
from salience.runtime import Engine, Request, Result, Sampling


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, what the model thought before it, and what both took."""

    text: str
    thought: str
    result: Result


class Session:
    """A talk through an engine with one slot, or a slot of one.

    Args:
        engine: of the model, with its tokenizer.
        sampling: how replies are drawn; None for what the model's makers advise. Reply n of the
            talk adds n to its seed, or to ask again would bring the same answer.
        talk: what was said before.

    Attributes:
        talk: what was said.
        last: the newest reply of this session.
    """

    def __init__(
        self, engine: Engine, sampling: Sampling | None = None, talk: Talk | None = None
    ) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.talk = talk or Talk()
        self.last: Reply | None = None
        self._sampling = sampling or defaults(engine.model)
        self._drawn = 0  # replies since the seed was set
        plain = self.tokenizer.chat_template is None
        self._encoder = Encoder(self.tokenizer, engine.max_context, special=plain)
        self._counted: tuple[Talk, int] = (Talk(), 0)
        self._request: Request | None = None

    @property
    def sampling(self) -> Sampling:
        """How the next reply is drawn. Setting another seed begins its row anew."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        if sampling.seed != self._sampling.seed:
            self._drawn = 0
        self._sampling = sampling

    @property
    def context(self) -> int:
        """How many tokens the talk can have."""
        return self.engine.max_context

    @property
    def used(self) -> int:
        """How many it has. For a talk that was loaded or cut, this tokenizes it once."""
        if self._counted[0] is not self.talk:
            count = 0
            if self.talk.turns:
                count = len(self._encoder.encode(write(self.tokenizer, self.talk.messages())))
            self._counted = (self.talk, count)
        return self._counted[1]

    def take(self, talk: Talk) -> None:
        """Go on with another talk.

        Raises:
            SalienceError: the chat template refuses it; the talk is as it was.
        """
        write(self.tokenizer, talk.messages("x"))
        if talk.turns:
            write(self.tokenizer, talk.messages())
        self.talk = talk

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> Reply:
        """The whole reply, streamed to `on_text` without its thought; errors as of `stream`."""
        for _, piece in self.stream(text):
            if on_text is not None and piece:
                on_text(piece)
        assert self.last is not None
        return self.last

    def stream(self, text: str) -> Generator[tuple[str, str], None, None]:
        """Say something; yields what comes of the model's thought and of its answer.

        The turn is a part of the talk when the reply ends, also when it is stopped: a part of a
        reply is one. A reply that is stopped before its first token leaves the talk as it was.

        Raises:
            SalienceError: an empty text, one that the template refuses, or a talk that is longer
                than the context; the talk is as it was.
        """
        if not text.strip():
            raise SalienceError("the prompt is empty")
        prompt = write(self.tokenizer, self.talk.messages(check_text(text)))
        tokens = self._encoder.encode(prompt)
        if len(tokens) >= self.context:
            mend = "shorten it, or " if not self.talk.turns else "/undo or /reset makes room, or "
            raise SalienceError(
                f"the talk would have {len(tokens)} tokens, which leaves no room for a reply in a "
                f"context of {self.context}; {mend}start with a larger --context"
            )
        sampling = replace(self._sampling, seed=self._sampling.seed + self._drawn)
        request = self._request = self.engine.submit(tokens, sampling)
        inside, shown = thinking.opened(prompt), ("", "")
        try:
            with closing(self.engine.events(request)) as events:
                for event in events:
                    parts = thinking.split(request.text, inside, event.finish_reason is not None)
                    thought, answer = parts[0][len(shown[0]) :], parts[1][len(shown[1]) :]
                    shown = parts
                    if thought or answer:
                        yield thought, answer
        finally:
            self._request = None
            self._finish(text, prompt, request, inside)

    def again(self) -> Generator[tuple[str, str], None, None]:
        """Draw the last reply anew, in its place; as `stream`.

        Raises:
            SalienceError: nothing was said yet.
        """
        before = self.talk
        self.talk, text = before.undone()
        undone = self.talk
        try:
            yield from self.stream(text)
        finally:
            if self.talk is undone:
                self.talk = before

    def stop(self) -> None:
        """End the reply that is under way, from any thread or a signal's handler."""
        # Taken first: a second signal within the first one's handler finds nothing to do.
        request, self._request = self._request, None
        if request is not None:
            request.cancel()

    def _finish(self, text: str, prompt: str, request: Request, inside: bool) -> None:
        result = request.result()
        thought, answer = thinking.split(result.text, inside, ended=True)
        self.last = Reply(answer, thought, result)
        if not result.tokens:
            return
        self._drawn += 1
        self.talk = self.talk.said(text, answer, thought)
        self._counted = (self.talk, len(request.prompt) + len(result.tokens))
        self._encoder.keep(prompt, request)
