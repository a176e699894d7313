"""What each command does, without a terminal."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import salience
from salience.chat.commands import COMMANDS, SETTINGS, State, run
from salience.chat.session import Session
from salience.chat.talk import Talk
from salience.errors import SalienceError
from salience.runtime import Engine, Sampling


@pytest.fixture(scope="module")
def engine(llama: Path, tokenizer: PreTrainedTokenizerFast) -> Engine:
    return Engine(salience.load(llama), tokenizer, max_context=200)


@pytest.fixture
def state(engine: Engine) -> State:
    talk = Talk(system="Be brief.").said("one", "1").said("two\nlines", "2", "hm")
    return State(Session(engine, Sampling(max_new_tokens=4), talk), "tiny")


def refused(state: State, line: str) -> str:
    with pytest.raises(SalienceError) as failure:
        run(state, line)
    return str(failure.value)


def test_help_names_all(state: State) -> None:
    text = run(state, "/help").text
    for name, command in COMMANDS.items():
        assert f"{name} {command.arguments}".strip() in text and command.help in text
    assert "Ctrl-C" in text


def test_unknown(state: State) -> None:
    line = refused(state, "/etc/passwd is what?")
    assert line.startswith("there is no command /etc/passwd; /help lists them")
    assert refused(state, "/reset now") == "/reset takes nothing after it"


def test_system(state: State) -> None:
    assert run(state, "/system").text == "system message: Be brief."
    run(state, "/system You are\na poet. ")
    assert state.session.talk.messages()[0] == {"role": "system", "content": "You are\na poet."}
    assert len(state.session.talk.turns) == 4
    run(state, "/system off")
    assert state.session.talk.messages()[0]["role"] == "user"
    assert run(state, "/system").text == "system message: none"


def test_reset(state: State) -> None:
    assert "with its system message" in run(state, "/reset").text
    assert state.session.talk == Talk(system="Be brief.")


def test_undo(state: State) -> None:
    outcome = run(state, "/undo")
    assert outcome.draft == "two\nlines" and "1 turns are left" in outcome.text
    assert run(state, "/undo").draft == "one"
    assert refused(state, "/undo") == "nothing was said yet"


def test_retry(state: State) -> None:
    outcome = run(state, "/retry")
    assert outcome.retry and "temperature is 0" in outcome.text
    assert len(state.session.talk.turns) == 4, "the old reply stays until there is a new one"
    run(state, "/set temperature 1")
    assert run(state, "/retry").text == ""
    run(state, "/reset")
    assert refused(state, "/retry") == "nothing was said yet"


def test_exit(state: State) -> None:
    assert run(state, "/exit").leave


def test_save_and_load(state: State, tmp_path: Path) -> None:
    path = tmp_path / "a talk.json"
    run(state, '/set stop ["a b", "\\n"]')
    assert run(state, f"/save {path}").text == f"2 turns are in {path}"
    before, sampling = state.session.talk, state.session.sampling
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["model"] == "tiny" and written["messages"][2]["content"] == "two\nlines"
    assert "is there already" in refused(state, f"/save {path}")
    assert run(state, f"/save {path} !").text
    run(state, "/reset")
    run(state, "/set stop off")
    state.model = "other"
    text = run(state, f"/load {path}").text
    assert text.startswith("2 turns, said with tiny; ") and text.endswith(" of 200 tokens")
    assert (state.session.talk, state.session.sampling) == (before, sampling)


def test_home(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run(state, "/save ~/talk.json")
    assert (tmp_path / "talk.json").exists()


@pytest.mark.parametrize("line", ["/save", "/load", "/save  ", "/load a\0b", "/save !"])
def test_no_file(state: State, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if line == "/save !":
        run(state, line)  # a strange name for a file, but one
        assert (tmp_path / "!").exists()
    else:
        assert refused(state, line) == "name a file"


def test_load_of_no_use_changes_nothing(state: State, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    before = state.session.talk
    assert "model is missing" in refused(state, f"/load {tmp_path / 'x.json'}")
    assert state.session.talk is before


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("top_p", "0.9", 0.9),
        ("top_k", "40", 40),
        ("min_p", ".05", 0.05),
        ("repetition_penalty", "1.1", 1.1),
        ("presence_penalty", "-1", -1.0),
        ("frequency_penalty", "2e-1", 0.2),
        ("max_new_tokens", "99", 99),
        ("seed", "12", 12),
        ("stop", "### end", ("### end",)),
        ("stop", '"\\n"', ("\n",)),
        ("stop", '["a", "b"]', ("a", "b")),
        ("stop", "off", ()),
    ],
)
def test_set(state: State, name: str, text: str, value: object) -> None:
    before = asdict(state.session.sampling)
    shown = run(state, f"/set {name} {text}").text
    assert asdict(state.session.sampling) == {**before, name: value}
    assert run(state, f"/set {name}").text == shown
    assert any(shown in line for line in run(state, "/set").text.splitlines())


def test_set_random_seed(state: State) -> None:
    seeds = set()
    for _ in range(4):
        run(state, "/set seed random")
        seeds.add(state.session.sampling.seed)
    assert len(seeds) > 1


def test_set_markdown(state: State) -> None:
    run(state, "/set markdown off")
    assert not state.markdown
    assert run(state, "/set markdown").text == "markdown off"
    run(state, "/set markdown on")
    assert state.markdown


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("temperature hot", "temperature is 'hot', must be a number"),
        ("temperature -1", "temperature is -1.0, must be 0 or more"),
        ("temperature nan", "temperature is nan, must be 0 or more"),
        ("top_p 0", "top_p is 0.0, must be above 0 and at most 1"),
        ("top_k 1.5", "top_k is '1.5', must be a whole number"),
        ("top_k 99999999999999999999", "must be 0 or more, below"),
        ("max_new_tokens 0", "must be at least 1"),
        ("seed " + "9" * 5000, "must be a whole number"),
        ("stop [1]", "must be a text or a list"),
        ('stop [""]', "texts, none empty"),
        ("stop [", "must be a text or a list"),
        ("markdown maybe", "markdown is 'maybe', must be on or off"),
        ("heat 1", "there is no setting heat; use temperature, "),
    ],
)
def test_set_bad_values(state: State, text: str, why: str) -> None:
    before = state.session.sampling
    assert why in refused(state, f"/set {text}")
    assert state.session.sampling is before


def test_settings_are_those_of_sampling() -> None:
    assert set(SETTINGS) - {"markdown"} <= set(asdict(Sampling()))


def test_stats(state: State) -> None:
    text = run(state, "/stats").text
    assert "first token" not in text and f"context  {state.session.used} of 200 tokens" in text
    reply = state.session.ask("three")
    text = run(state, "/stats").text
    result = reply.result
    for part in (
        f"{result.first_token_seconds:.2f} s",
        f"{result.tokens_per_second:.1f} tokens/s",
        f"{result.prompt_tokens} tokens, {result.cached_tokens} of them in the cache",
        f"{result.prompt_tokens + len(result.tokens)} of 200 tokens",
        "GiB",
    ):
        assert part in text


def test_a_template_that_refuses(state: State, tmp_path: Path, llama: Path) -> None:
    """At the command and not at the next reply, and the talk stays as it was."""
    run(state, f"/save {tmp_path / 'with_system.json'}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    engine = Engine(state.session.engine.model, tokenizer, max_context=200)
    other = State(Session(engine, Sampling(), Talk().said("a", "b")), "tiny")
    for line in ("/system Be brief.", f"/load {tmp_path / 'with_system.json'}"):
        assert "the chat template refuses these messages: no system" in refused(other, line)
        assert other.session.talk == Talk().said("a", "b")
