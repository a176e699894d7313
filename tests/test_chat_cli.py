"""`salience chat` for scripts: one reply, what is piped in, JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workshop import Workshop


@pytest.fixture
def asked(workshop: Workshop, llama: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    def ask(*args: object, stdin: str = ""):  # type: ignore[no-untyped-def]
        fixed = ("chat", llama, "--max-new-tokens", 6, "--device", "cpu")
        return workshop(*fixed, *args, cwd=tmp_path, stdin=stdin)

    return ask


def reply(run) -> dict[str, object]:  # type: ignore[no-untyped-def]
    assert run.status == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
def test_json(asked) -> None:  # type: ignore[no-untyped-def]
    found = reply(asked("--prompt", "for x in", "--json"))
    assert found["text"] and found["tokens"] == 6 and found["finish_reason"] == "length"
    assert found["context_used"] == found["prompt_tokens"] + found["tokens"]  # type: ignore[operator]
    assert found["context_limit"] == 512 and found["first_token_seconds"] > 0  # type: ignore[operator]
    plain = asked("--prompt", "for x in")
    assert plain.stdout == f"{found['text']}\n"
    assert plain.stderr.startswith("6 tokens, first after ")


@pytest.mark.slow
def test_what_is_piped_in_is_the_prompt_or_follows_it(asked) -> None:  # type: ignore[no-untyped-def]
    both = reply(asked("--prompt", "Sum up:\n\nline 1\nline 2", "--json"))
    piped = reply(asked("--json", stdin="Sum up:\n\nline 1\nline 2\n"))
    joined = reply(asked("--prompt", "Sum up:", "--json", stdin="line 1\nline 2\n"))
    assert both["text"] == piped["text"] == joined["text"]
    assert both["prompt_tokens"] == piped["prompt_tokens"] == joined["prompt_tokens"]


@pytest.mark.slow
def test_greedy_unless_told(asked) -> None:  # type: ignore[no-untyped-def]
    first = reply(asked("--prompt", "x", "--json"))
    assert first["text"] == reply(asked("--prompt", "x", "--json", "--seed", 5))["text"]
    drawn = [
        reply(asked("--prompt", "x", "--json", "--temperature", 3, "--seed", seed))["text"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_options_reach_the_sampling(asked) -> None:  # type: ignore[no-untyped-def]
    first = reply(asked("--prompt", "x", "--json"))
    text = str(first["text"])
    one = reply(asked("--prompt", "x", "--json", "--temperature", 3, "--top-k", 1))
    assert one["text"] == text, "of one token the likeliest is drawn"
    stopped = reply(asked("--prompt", "x", "--json", "--stop", text[2:4]))
    assert stopped["text"] == text[: text.index(text[2:4])] and stopped["finish_reason"] == "stop"
    other = reply(asked("--prompt", "x", "--json", "--repetition-penalty", 50))
    assert other["text"] != text
    system = reply(asked("--prompt", "x", "--json", "--system", "Be brief."))
    assert system["prompt_tokens"] > first["prompt_tokens"]  # type: ignore[operator]
    cut = reply(asked("--prompt", "x", "--json", "--context", 5))
    assert cut["context_used"] == cut["context_limit"] == 5


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--prompt", ""), "the prompt is empty"),
        ((), "the prompt is empty"),
        (("--prompt", "x", "--top-p", 7), "top_p is 7.0, must be above 0 and at most 1"),
        (("--prompt", "x", "--min-p", "nan"), "min_p is nan"),
        (("--prompt", "x", "--stop", ""), "stop is ('',), must be texts, none empty"),
        (("--prompt", "x", "--context", 1), "max_context is 1"),
        (("--prompt", "x", "--context", 4096), "the model was made for 512 tokens"),
        (("--prompt", "x" * 2000), "shorten it, or start with a larger --context"),
    ],
)
def test_bad_use(asked, args: tuple[object, ...], why: str) -> None:  # type: ignore[no-untyped-def]
    run = asked(*args)
    assert run.status == 2 and run.stdout == ""
    assert run.line.startswith("error: ") and why in run.line


@pytest.mark.slow
def test_a_pipe_that_closes(llama: Path, tmp_path: Path) -> None:
    """And bytes that are no text; both need the real program."""
    command = [sys.executable, "-m", "salience", "chat", str(llama), "--device", "cpu"]
    done = subprocess.run(command, input=b"\xff", capture_output=True)
    assert done.returncode == 2 and b"what is piped in is not UTF-8" in done.stderr
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, input=b"x", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 1 and done.stderr == b""
