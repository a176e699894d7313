"""`chat`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from salience.cli.console import print_json, stderr
from salience.cli.loaded import load_model
from salience.cli.options import (
    DeviceMapOption,
    DeviceOption,
    JsonOption,
    KernelOption,
    MemoryOption,
    Model,
    OffloadOption,
    TrustOption,
)
from salience.errors import SalienceError

_LONGEST_TURN = 2048  # tokens, in a talk; it can be stopped by Ctrl-C
_OF_THE_MODEL = "In a talk the model's own value unless given."


def chat(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Say this and print the reply; what is piped in follows it."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            min=1,
            help=f"Of a reply: 256 for --prompt, {_LONGEST_TURN} in a talk.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", min=0.0, help=f"0 is greedy, as for --prompt. {_OF_THE_MODEL}"
        ),
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help=_OF_THE_MODEL)] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="0 for all tokens.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p")] = None,
    repetition_penalty: Annotated[float | None, typer.Option("--repetition-penalty")] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of the sampling: 0 for --prompt, any in a talk."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text that ends a reply; repeatable.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", help="Tokens of the whole talk (default: the model's, or 8192)."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown/--no-markdown", help="Set the replies of a talk.")
    ] = True,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Keep what you say for the next talk.")
    ] = True,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    max_memory: MemoryOption = None,
    offload_folder: OffloadOption = None,
    kernel: KernelOption = "auto",
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Talk to MODEL; with --prompt or piped input, print one reply."""
    said = _said(prompt)
    if said is None and (json or not sys.stdout.isatty()):
        raise SalienceError("a talk needs a terminal; give --prompt, or pipe the prompt in")
    chosen = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": None if stop is None else tuple(stop),
    }
    given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}

    from salience.chat.prompt import defaults
    from salience.chat.session import Session
    from salience.chat.talk import Talk
    from salience.runtime import Engine, Sampling

    Sampling(**given)  # before the weights: a value out of its range
    loaded, tokenizer = load_model(
        model, device, device_map, max_memory, offload_folder, kernel, trust_remote_code
    )
    base: dict[str, Any]
    if said is None:
        base = {"max_new_tokens": _LONGEST_TURN, "seed": int.from_bytes(os.urandom(4), "big")}
    else:
        base = {"temperature": 0.0}
    sampling = defaults(loaded, **base | given)
    session = Session(Engine(loaded, tokenizer, max_context=context), sampling, Talk(system=system))
    if said is not None:
        _one_reply(session, said, json)
        return
    from salience.chat.commands import State
    from salience.chat.terminal import Terminal, history_file

    with stderr.status("preparing"):
        session.engine.prepare(sampling)
    name = Path(model).resolve().name if Path(model).exists() else model
    Terminal(State(session, name, markdown), history_file() if history else None).run()


def _said(prompt: str | None) -> str | None:
    """The prompt and what is piped in, which follows it after an empty line."""
    if sys.stdin is None:
        return prompt or ""
    if sys.stdin.isatty():
        return prompt
    try:
        piped = sys.stdin.buffer.read().decode().rstrip("\n")
    except UnicodeDecodeError as error:
        raise SalienceError(f"what is piped in is not UTF-8: {error}") from None
    return "\n\n".join(part for part in (prompt, piped) if part)


def _one_reply(session: Any, said: str, json: bool) -> None:
    session.engine.prepare(session.sampling)
    try:
        for thought, answer in session.stream(said):
            if json:
                continue
            if thought:
                stderr.print(thought, end="", style="dim", markup=False)
            sys.stdout.write(answer)
            sys.stdout.flush()
        if not json:
            print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain at its end
        raise typer.Exit(1) from None
    result = session.last.result
    if json:
        print_json(
            {
                "text": session.last.text,
                "thought": session.last.thought,
                "finish_reason": result.finish_reason,
                "prompt_tokens": result.prompt_tokens,
                "tokens": len(result.tokens),
                "first_token_seconds": result.first_token_seconds,
                "tokens_per_second": result.tokens_per_second,
                "seconds": result.seconds,
                "context_used": session.used,
                "context_limit": session.context,
            }
        )
        return
    stderr.print(
        f"{len(result.tokens)} tokens, first after {result.first_token_seconds:.2f} s, "
        f"then {result.tokens_per_second:.1f} tokens/s"
    )
