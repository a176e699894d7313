"""What was said: the messages of a talk, and the file that keeps them.

The file is JSON, for people and for other programs:

    {"model": "...", "system": "..." or null, "sampling": {...},
     "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}

A thought of the model is `reasoning_content` of its message, the name that templates know; those
that do not know it leave it out, so that it is not sent back.
"""

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from salience.errors import SalienceError
from salience.runtime import Sampling

Message = dict[str, str]
_ROLES = ("user", "assistant")
_ADJUSTABLE = {field.name for field in fields(Sampling)} - {"stop_token_ids", "logprobs"}


@dataclass(frozen=True, slots=True)
class Talk:
    """Turns of one user message and its reply each, oldest first. It is never changed in place.

    Args:
        turns: the messages, user and assistant by turns.
        system: what the model is told before them.
    """

    turns: tuple[Message, ...] = ()
    system: str | None = None

    def messages(self, text: str | None = None) -> list[Message]:
        """All messages, with one more of the user's."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        last = [] if text is None else [{"role": "user", "content": text}]
        return [*system, *self.turns, *last]

    def said(self, text: str, answer: str, thought: str = "") -> "Talk":
        """With one more turn."""
        reply = {"role": "assistant", "content": answer}
        if thought:
            reply["reasoning_content"] = thought
        return replace(self, turns=(*self.turns, {"role": "user", "content": text}, reply))

    def undone(self) -> "tuple[Talk, str]":
        """Without the last turn, and what the user said in it.

        Raises:
            SalienceError: there is none.
        """
        if not self.turns:
            raise SalienceError("nothing was said yet")
        return replace(self, turns=self.turns[:-2]), self.turns[-2]["content"]


def save(path: Path, talk: Talk, sampling: Sampling, model: str, force: bool = False) -> None:
    """Write a talk; the file appears whole or not at all.

    Args:
        path: the file.
        talk: the messages.
        sampling: how replies are drawn.
        model: its name.
        force: whether it may replace a file.

    Raises:
        SalienceError: the file is there and `force` is not set, or it cannot be written.
    """
    chosen = {name: value for name, value in asdict(sampling).items() if name in _ADJUSTABLE}
    values = {"model": model, "system": talk.system, "sampling": chosen, "messages": talk.turns}
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        if path.is_dir():
            raise SalienceError(f"{path} is a folder; name a file")
        if path.exists() and not force:
            raise SalienceError(f"{path} is there already; to write over it: /save {path} !")
        part.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            part.unlink()
        raise SalienceError(f"writing {path} failed: {_why(error)}") from None


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file of a talk held."""

    talk: Talk
    sampling: Sampling
    model: str


def load(path: Path) -> Saved:
    """Read what `save` wrote.

    Raises:
        SalienceError: the file cannot be read, or is no talk.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SalienceError(f"reading {path} failed: {_why(error)}") from None
    try:
        _check(values)
        sampling = {**values["sampling"], "stop": tuple(values["sampling"].get("stop", ()))}
        talk = Talk(tuple(values["messages"]), values["system"])
        return Saved(talk, Sampling(**sampling), values["model"])
    except SalienceError as error:
        raise SalienceError(f"{path} is no talk that /save wrote: {error}") from None


def _why(error: Exception) -> str:
    """What the system says, without the path again."""
    return str(getattr(error, "strerror", None) or error)


def _check(values: Any) -> None:
    wanted: dict[str, Any] = {
        "model": str,
        "system": (str, type(None)),
        "sampling": dict,
        "messages": list,
    }
    if not isinstance(values, dict):
        raise SalienceError("it is not a JSON object")
    for name, kind in wanted.items():
        if name not in values:
            raise SalienceError(f"{name} is missing")
        if not isinstance(values[name], kind):
            raise SalienceError(f"{name} is {values[name]!r}")
    _check_sampling(values["sampling"])
    messages = values["messages"]
    for index, message in enumerate(messages):
        role = _ROLES[index % 2]
        keys = {"role", "content"} | ({"reasoning_content"} if role == "assistant" else set())
        fits = isinstance(message, dict) and {"role", "content"} <= set(message) <= keys
        if not fits or not all(isinstance(value, str) for value in message.values()):
            raise SalienceError(f"message {index + 1} is {message!r}")
        if message["role"] != role:
            raise SalienceError(f"message {index + 1} is of {message['role']!r}, not of {role!r}")
    if len(messages) % 2:
        raise SalienceError("the last message has no reply")
    texts = [text for message in messages for text in message.values()]
    for text in [*texts, values["model"], values["system"] or ""]:
        check_text(text)


def _check_sampling(sampling: Mapping[str, Any]) -> None:
    defaults = asdict(Sampling())
    for name, value in sampling.items():
        if name not in _ADJUSTABLE:
            raise SalienceError(f"sampling has {name!r}")
        kind = type(defaults[name])
        if kind is tuple:
            fits = isinstance(value, list) and all(isinstance(each, str) for each in value)
        elif kind is float:
            fits = type(value) in (int, float) and abs(value) < 1e38
        else:
            fits = type(value) is kind
        if not fits:
            raise SalienceError(f"{name} is {value!r}")


def check_text(text: str) -> str:
    """The text, if it has a form in UTF-8.

    Raises:
        SalienceError: it holds half a character, as a terminal or JSON can bring it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SalienceError(f"the text is no valid Unicode: {error.reason}") from None
    return text
