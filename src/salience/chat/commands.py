"""What can be said to the program instead of the model: lines that begin with a slash.

`COMMANDS` is the one table of them; `/help` and the completion read it. A command is a function of
the state and of the text after its name, and answers with what is to be shown and done.
"""

import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from salience.chat.session import Session
from salience.chat.talk import Talk, check_text, load, save
from salience.errors import SalienceError
from salience.monitor import memory
from salience.runtime import Sampling

# What /set can set, in the order of /help; `markdown` is of the screen, the others of the replies.
SETTINGS = {
    "temperature": "0 takes the likeliest token each time",
    "top_p": "only the likeliest tokens that together have this probability",
    "top_k": "only the k likeliest tokens; 0 for all",
    "min_p": "only tokens this many times as likely as the likeliest",
    "repetition_penalty": "above 1 against tokens that were there",
    "presence_penalty": "against tokens that were in the reply",
    "frequency_penalty": "the same, as often as they were there",
    "max_new_tokens": "a reply ends after this many",
    "seed": "of the draw; a number, or random",
    "stop": 'texts that end a reply: ###, ["###", "\\n\\n"], or off',
    "markdown": "on or off",
}
_KINDS: dict[str, Any] = {field.name: field.type for field in fields(Sampling)}


@dataclass
class State:
    """What commands work on.

    Args:
        session: the talk and its model.
        model: its name.
        markdown: whether replies are set as markdown.
    """

    session: Session
    model: str
    markdown: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command wants.

    Args:
        text: to be shown.
        draft: to stand in the next input line.
        retry: draw the last reply anew.
        leave: end the program.
    """

    text: str = ""
    draft: str = ""
    retry: bool = False
    leave: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A line of the table: what it takes, in words; what it does, in words and in fact."""

    arguments: str
    help: str
    run: Callable[[State, str], Outcome]


def run(state: State, line: str) -> Outcome:
    """Do what a line that begins with a slash says.

    Raises:
        SalienceError: there is no such command, or it cannot do it.
    """
    name, argument = [*line.split(maxsplit=1), ""][:2]
    command = COMMANDS.get(name)
    if command is None:
        raise SalienceError(
            f"there is no command {name}; /help lists them (a space before it says it to the model)"
        )
    argument = check_text(argument.strip())
    if argument and not command.arguments:
        raise SalienceError(f"{name} takes nothing after it")
    return command.run(state, argument)


def values(state: State) -> Iterator[tuple[str, str]]:
    """The settings and their values, as /set shows them."""
    for name in SETTINGS:
        yield name, _shown(state, name)


def _shown(state: State, name: str) -> str:
    if name == "markdown":
        return "on" if state.markdown else "off"
    value = getattr(state.session.sampling, name)
    if name == "stop":
        return json.dumps(value, ensure_ascii=False) if value else "off"
    return str(value)


def _help(state: State, argument: str) -> Outcome:
    rows = [(f"{name} {each.arguments}".rstrip(), each.help) for name, each in COMMANDS.items()]
    keys = [
        ("Enter", "send; Alt-Enter, Ctrl-J or a \\ before Enter begins a new line"),
        ("Ctrl-C", "stop the answer; what came of it stays in the talk"),
        ("Ctrl-D", "leave, when nothing is written"),
    ]
    return Outcome(_table([*rows, *keys]))


def _system(state: State, argument: str) -> Outcome:
    session = state.session
    if not argument:
        return Outcome(f"system message: {session.talk.system or 'none'}")
    session.take(replace(session.talk, system=None if argument == "off" else argument))
    note = "from the next reply on"
    return Outcome(f"no system message {note}" if argument == "off" else f"it holds {note}")


def _reset(state: State, argument: str) -> Outcome:
    state.session.talk = Talk(system=state.session.talk.system)
    kept = ", with its system message" if state.session.talk.system is not None else ""
    return Outcome(f"the talk begins anew{kept}")


def _undo(state: State, argument: str) -> Outcome:
    state.session.talk, text = state.session.talk.undone()
    turns = len(state.session.talk.turns) // 2
    left = "nothing is left of the talk" if not turns else f"{turns} turns are left"
    return Outcome(f"took back the last turn; {left}", draft=text)


def _retry(state: State, argument: str) -> Outcome:
    state.session.talk.undone()
    same = state.session.sampling.temperature == 0
    note = "temperature is 0, so the reply stays the same; /set temperature 0.7 varies it"
    return Outcome(note if same else "", retry=True)


def _save(state: State, argument: str) -> Outcome:
    name, force = argument.removesuffix(" !"), argument.endswith(" !")
    path = _path(name)
    session = state.session
    save(path, session.talk, session.sampling, state.model, force)
    return Outcome(f"{len(session.talk.turns) // 2} turns are in {path}")


def _load(state: State, argument: str) -> Outcome:
    path = _path(argument)
    saved = load(path)
    session = state.session
    session.take(saved.talk)
    session.sampling = saved.sampling
    other = f", said with {saved.model}" if saved.model != state.model else ""
    return Outcome(
        f"{len(saved.talk.turns) // 2} turns{other}; {session.used} of {session.context} tokens"
    )


def _path(name: str) -> Path:
    if not name or "\0" in name:
        raise SalienceError("name a file")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise SalienceError(f"{name}: {error}") from None


def _set(state: State, argument: str) -> Outcome:
    name, _, text = argument.partition(" ")
    if not name:
        rows = [(f"{each} {value}", SETTINGS[each]) for each, value in values(state)]
        return Outcome(_table(rows))
    if name not in SETTINGS:
        raise SalienceError(f"there is no setting {name}; use {', '.join(SETTINGS)}")
    text = text.strip()
    if text:
        if name == "markdown":
            state.markdown = _switch(text)
        else:
            value = parse_setting(name, text)
            state.session.sampling = replace(state.session.sampling, **{name: value})
    return Outcome(f"{name} {_shown(state, name)}")


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise SalienceError(f"markdown is {text!r}, must be on or off")
    return text == "on"


def parse_setting(name: str, text: str) -> Any:
    """The value of a field of `Sampling` that a text stands for.

    Raises:
        SalienceError: it stands for none.
    """
    if name == "stop":
        return _stops(text)
    if name == "seed" and text == "random":
        return secrets.randbelow(2**32)
    whole = _KINDS[name] is int
    try:
        return int(text) if whole else float(text)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise SalienceError(f"{name} is {text!r}, must be {kind}") from None


def _stops(text: str) -> tuple[str, ...]:
    if text == "off":
        return ()
    if not text.startswith(("[", '"')):
        return (text,)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise SalienceError(f'stop is {text!r}, must be a text or a list such as ["###", "\\n\\n"]')
    return tuple(check_text(each) for each in texts)


def _stats(state: State, argument: str) -> Outcome:
    session, now = state.session, memory()
    rows = []
    if session.last is not None:
        last = session.last.result
        rows = [
            ("first token", f"{last.first_token_seconds:.2f} s"),
            ("speed", f"{last.tokens_per_second:.1f} tokens/s"),
            ("reply", f"{len(last.tokens)} tokens, {ENDS[last.finish_reason]}"),
            ("prompt", f"{last.prompt_tokens} tokens, {last.cached_tokens} of them in the cache"),
        ]
    share = session.used / session.context
    rows.append(("context", f"{session.used} of {session.context} tokens ({share:.0%})"))
    rows.append(("memory", f"{gib(now.resident)}, {gib(now.available)} more to be had"))
    if now.gpu_total:
        gpu = f"{gib(now.gpu_tensors)} in tensors, {gib(now.gpu_used)} of {gib(now.gpu_total)} used"
        rows.append(("GPU memory", gpu))
    return Outcome(_table(rows))


ENDS = {"stop": "complete", "length": "cut off", "cancelled": "stopped"}


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB"


def _exit(state: State, argument: str) -> Outcome:
    return Outcome(leave=True)


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


COMMANDS = {
    "/help": Command("", "what can be written here", _help),
    "/system": Command("[TEXT]", "show or set the system message; off for none", _system),
    "/reset": Command("", "begin a new talk", _reset),
    "/undo": Command("", "take back the last turn, to write it anew", _undo),
    "/retry": Command("", "draw the last reply anew", _retry),
    "/save": Command("FILE [!]", "keep the talk as JSON; ! writes over a file", _save),
    "/load": Command("FILE", "go on with a talk that was kept", _load),
    "/set": Command("[NAME [VALUE]]", "show or change how replies are drawn", _set),
    "/stats": Command("", "times, tokens and memory", _stats),
    "/exit": Command("", "leave", _exit),
}
