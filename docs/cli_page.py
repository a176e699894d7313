"""The reference of the command line, from the options themselves."""

import inspect
from enum import Enum
from html import escape
from typing import Any, get_args, get_type_hints

import typer

from salience.cli.app import app


def page() -> str:
    """The page, in Markdown."""
    parts = [
        "# Command line",
        "Exit status: 0 done, 1 something else, 2 wrong use or bad input, 3 does not fit, 4 a gate "
        "that does not hold, 130 interrupted. Errors a user can cause are one line on stderr; with "
        "`--json` stdout has one JSON object and nothing else.",
    ]
    for name, command in sorted(commands().items()):
        parts += [f"## {name}", _plain(command.help or "")]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        words = [p.metavar or p.name.upper() for p in arguments]
        parts.append(f"```sh\n{' '.join([name, *words, '[OPTIONS]'])}\n```")
        parts += [f"`{word}`: {_plain(p.help)}" for word, p in zip(words, arguments, strict=True)]
        hints = get_type_hints(inspect.unwrap(command.callback))
        options = [p for p in command.params if p.param_type_name == "option"]
        rows = [_row(p, hints.get(p.name)) for p in options if not p.hidden]
        parts.append("\n".join(["| option | | default |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def commands() -> dict[str, Any]:
    """Every command by its whole name, "salience bench decode"."""
    return _below("salience", typer.main.get_command(app))


def _below(name: str, command: Any) -> dict[str, Any]:
    if not hasattr(command, "commands"):
        return {name: command}
    found = {}
    for own, each in command.commands.items():
        found |= _below(f"{name} {own}", each)
    return found


def _row(option: Any, hint: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    help = _plain(option.help or "")
    # Versions of typer keep choices in different places; the annotation is always there.
    for kind in (hint, *get_args(hint)):
        if isinstance(kind, type) and issubclass(kind, Enum):
            help += f" One of {', '.join(f'`{each.value}`' for each in kind)}."
    if option.envvar:
        help += f" Or `${option.envvar}`."
    default = getattr(option.default, "value", option.default)
    if option.required:
        shown = "required"
    elif default is None or default is False or not str(default) or str(default) == ".":
        shown = ""
    else:
        shown = f"`{'on' if default is True else default}`"
    return f"| {names} | {help} | {shown} |"


def _plain(text: str) -> str:
    """Help as one line of a table."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("*", "\\*")
