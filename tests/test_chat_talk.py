"""Talks and their files; thoughts and answers."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salience.chat import thinking
from salience.chat.talk import Talk, load, save
from salience.errors import SalienceError
from salience.runtime import Sampling

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def test_turns() -> None:
    talk = Talk(system="Be brief.").said("a", "b").said("c", "d", "hm")
    assert talk.messages("e") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "hm"},
        {"role": "user", "content": "e"},
    ]
    undone, text = talk.undone()
    assert text == "c" and undone == Talk(system="Be brief.").said("a", "b")
    with pytest.raises(SalienceError, match="nothing was said yet"):
        Talk().undone()


@given(
    st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=3),
    st.none() | TEXTS,
    st.floats(0, 5),
    st.lists(TEXTS.filter(bool), max_size=2),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    turns: list[tuple[str, str, str]],
    system: str | None,
    temperature: float,
    stop: list[str],
) -> None:
    path = tmp_path_factory.getbasetemp() / "talk.json"
    talk = Talk(system=system)
    for turn in turns:
        talk = talk.said(*turn)
    sampling = Sampling(temperature=temperature, stop=tuple(stop), seed=7, top_k=5)
    save(path, talk, sampling, "m", force=True)
    found = load(path)
    assert (found.talk, found.sampling, found.model) == (talk, sampling, "m")


def test_save_replaces_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save(path, Talk(), Sampling(), "m")
    first = path.read_bytes()
    with pytest.raises(SalienceError, match=r"is there already; to write over it: /save .* !"):
        save(path, Talk().said("a", "b"), Sampling(), "m")
    assert path.read_bytes() == first
    save(path, Talk().said("a", "b"), Sampling(), "m", force=True)
    assert path.read_bytes() != first
    assert os.listdir(tmp_path) == ["a.json"]


def test_save_where_nothing_can_be_written(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "a.json", "No such file"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(SalienceError, match=why):
            save(path, Talk(), Sampling(), "m")
    assert os.listdir(tmp_path) == []


def test_save_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SalienceError, match="No space left"):
        save(path, Talk(), Sampling(), "m", force=True)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


GOOD: dict[str, Any] = {
    "model": "m",
    "system": None,
    "sampling": {"temperature": 0.5, "stop": ["x"]},
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ([], "it is not a JSON object"),
        ({"messages": None}, "messages is None"),
        ({"system": 3}, "system is 3"),
        ({"sampling": {"heat": 1}}, "sampling has 'heat'"),
        ({"sampling": {"temperature": "hot"}}, "temperature is 'hot'"),
        ({"sampling": {"temperature": True}}, "temperature is True"),
        ({"sampling": {"temperature": -1}}, "temperature is -1"),
        ({"sampling": {"temperature": 10**400}}, "temperature is 1"),
        ({"sampling": {"top_k": 1.5}}, "top_k is 1.5"),
        ({"sampling": {"top_k": 10**30}}, "top_k is 1"),
        ({"sampling": {"stop": "x"}}, "stop is 'x'"),
        ({"sampling": {"stop": [""]}}, "stop is"),
        ({"sampling": {"stop_token_ids": [1]}}, "sampling has 'stop_token_ids'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last message has no reply"),
        ({"messages": ["a", "b"]}, "message 1 is 'a'"),
        ({"messages": [{"role": "user"}, {}]}, "message 1 is"),
        ({"messages": [{"role": "user", "content": 1}, {}]}, "message 1 is"),
        ({"messages": [{"role": "x", "content": ""}] * 2}, "message 1 is of 'x', not of 'user'"),
        ({"messages": [{"role": "user", "content": ""}] * 2}, "message 2 is of 'user'"),
        ({"messages": [{"role": "user", "content": "", "x": ""}] * 2}, "message 1 is"),
        ({"system": "\ud800"}, "no valid Unicode"),
    ],
)
def test_malformed(tmp_path: Path, change: Any, why: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(GOOD))
    assert load(path).talk.turns == tuple(GOOD["messages"])
    path.write_text(json.dumps({**GOOD, **change} if isinstance(change, dict) else change))
    with pytest.raises(SalienceError) as failure:
        load(path)
    line = str(failure.value)
    assert why in line and line.startswith(f"{path} is no talk") and "\n" not in line


@pytest.mark.parametrize("name", list(GOOD))
def test_missing(tmp_path: Path, name: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({key: value for key, value in GOOD.items() if key != name}))
    with pytest.raises(SalienceError, match=f"{name} is missing"):
        load(path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_no_json(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(data)
    with pytest.raises(SalienceError, match=f"reading {path} failed"):
        load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SalienceError, match="failed: No such file or directory"):
        load(tmp_path / "none.json")
    with pytest.raises(SalienceError, match="failed: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [("<|im_start|>assistant\n<think>\n", True), ("<think>\n\n</think>\n\n", False), ("a", False)],
)
def test_opened(prompt: str, inside: bool) -> None:
    assert thinking.opened(prompt) == inside


@pytest.mark.parametrize(
    ("reply", "inside", "parts"),
    [
        ("Hello", False, ("", "Hello")),
        ("  Hello ", False, ("", "  Hello ")),
        ("<think>\na b\n</think>\n\nHello\n", False, ("a b", "Hello\n")),
        ("\n<think>a", False, ("a", "")),
        ("a\n</think>\nb</think>c", True, ("a", "b</think>c")),
        ("a < b </thin", True, ("a < b </thin", "")),
        ("<think>a</think>b", True, ("a", "b")),
        ("say <think> twice", False, ("", "say <think> twice")),
        ("<thin", False, ("", "<thin")),
        ("", True, ("", "")),
    ],
)
def test_split(reply: str, inside: bool, parts: tuple[str, str]) -> None:
    assert thinking.split(reply, inside, ended=True) == parts


TAGGED = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", " ", "\n", "a", "b"]),
    max_size=12,
).map("".join)


@given(TAGGED, st.booleans())
def test_both_parts_only_grow(reply: str, inside: bool) -> None:
    before = ("", "")
    for end in range(len(reply) + 1):
        parts = thinking.split(reply[:end], inside)
        assert all(new.startswith(old) for new, old in zip(parts, before, strict=True))
        before = parts
    ended = thinking.split(reply, inside, ended=True)
    assert all(new.startswith(old) for new, old in zip(ended, before, strict=True))
