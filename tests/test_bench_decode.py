"""`salience bench decode`: what is counted, and that shapes, checkpoints and baselines run."""

from pathlib import Path

import pytest

import salience
from helpers_bench import Command, assert_png, make_command, write_shape
from salience.bench import decode, measure
from salience.bench.decode import Task
from salience.errors import SalienceError
from salience.runtime.timing import Timing, steady


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return make_command(monkeypatch, capfd)


def test_steady_steps() -> None:
    # Two prompts come in one after the other; then four steps of 0.5 s; then one reply is alone.
    stamps = [
        (1.0, 1, 1, 0),
        (2.0, 2, 2, 0),
        (2.5, 2, 2, 0),
        (3.0, 2, 2, 0),
        (3.5, 2, 2, 1),
        (9.0, 1, 2, 2),
    ]
    assert steady(stamps, 2, 5) == Timing(0.5, 9.0, False)


def test_steps_while_prompts_still_come() -> None:
    stamps = [(1.0, 1, 1, 0), (2.0, 1, 1, 1), (3.0, 1, 2, 1), (4.0, 1, 2, 2)]
    assert steady(stamps, 2, 2) == Timing(2.0, 4.0, True)  # three tokens in 3 s, two sequences


def test_task() -> None:
    assert Task((1,), 8, 4).length == 12 and Task((1,), 8, 4, 20).length == 20
    with pytest.raises(SalienceError, match="--context 11 has no room for 8"):
        Task((1,), 8, 4, 11)


def test_a_shape_with_its_float_form(command: Command, tmp_path: Path) -> None:
    plot, out = tmp_path / "out.png", tmp_path / "out.json"
    found = command(
        "decode", "--shape", write_shape(tmp_path), "--scheme", "w4g64", "--batch", "1,3",
        "--prompt", "5", "--new", "6", "--dense", "--transformers", "--device", "cpu",
        "--json", "-o", out, "--plot", plot,
    )  # fmt: skip
    values = found.json
    assert_png(plot)
    assert out.read_text().startswith("{\n")
    names = [variant["name"] for variant in values["variants"]]
    assert names == ["w4g64", "dense", "transformers"]
    assert [v["dtype"] for v in values["variants"]] == ["float32", "float32", "bfloat16"]
    token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, numbers, bytes
    packed, dense, _ = values["variants"]
    parameters = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 2 * 320 * 64 + 5 * 64
    assert dense["resident"] == {
        "weights": 4 * parameters,
        "read": 4 * (parameters - 320 * 64),
        "token": token,
    }
    assert packed["resident"]["read"] < dense["resident"]["read"]
    bandwidth = max(values["rates"]["copy"], values["rates"]["read"])
    for variant in values["variants"]:
        assert [row["batch"] for row in variant["rows"]] == [1, 3]
        for row in variant["rows"]:
            length = 5 + 6 / 2
            moved = (
                variant["resident"]["read"] + row["batch"] * length * variant["resident"]["token"]
            )
            assert row["floor_seconds"] == pytest.approx(moved / bandwidth)
            assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["step_seconds"])
            assert row["share"] == pytest.approx(row["floor_seconds"] / row["step_seconds"])
            assert row["prefill_seconds"] > 0 and not row["interleaved"]
    for row in dense["rows"]:  # a place more than the context, in steps of 64
        assert row["predicted_bytes"] == 4 * parameters + row["batch"] * 64 * token
    over = values["over"]["dense"]
    for mine, theirs in zip(packed["rows"], dense["rows"], strict=True):
        ratio = mine["tokens_per_second"] / theirs["tokens_per_second"]
        assert over[str(mine["batch"])] == pytest.approx(ratio)


def test_a_checkpoint_and_the_table(command: Command, llama: Path, tmp_path: Path) -> None:
    salience.quantize(str(llama), tmp_path / "out", method="rtn", scheme="w4g64")
    args = ("--batch", "2", "--prompt", "4", "--new", "3", "--device", "cpu")
    found = command("decode", tmp_path / "out", *args, "--dense")
    assert found.status == 0, found.stderr
    assert "w4g64 over dense" in found.stdout and "TB/s" in found.stdout
    refused = command("decode", llama, *args, "--dense")
    assert refused.status == 2 and "is float already" in refused.stderr
    assert command("decode", llama, *args, "--json").json["variants"][0]["name"] == "dense"


def test_a_head_in_codes(command: Command, tmp_path: Path) -> None:
    found = command(
        "decode", "--shape", write_shape(tmp_path), "--scheme", "w3g32", "--rule", "lm_head=w8g64",
        "--batch", "1", "--prompt", "3", "--new", "2", "--layers", "1", "--json",
    )  # fmt: skip
    assert found.json["variants"][0]["name"] == "w3g32 w8g64"


def test_memory_is_asked_for_first(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 2**30)
    monkeypatch.setattr(decode, "build", None)  # nothing may be made
    monkeypatch.setattr(decode, "measure_rates", None)
    found = command("decode", "--shape", "llama-3-8b", "--layers", "2", "--batch", "1")
    assert found.status == 3 and found.stdout == ""
    assert "error: llama-3-8b in w4g128 needs" in found.stderr
    assert "where 1.00 GiB are free; use a smaller --batch" in found.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "name a MODEL or a --shape"),
        (["x", "--shape", "llama-3-8b"], "name a MODEL or a --shape"),
        (["x", "--scheme", "w4g64"], "are for a --shape"),
        (["x", "--rule", "head=w8g64"], "are for a --shape"),
        (["--shape", "gpt-7"], "there is no shape 'gpt-7'; use smollm2-135m, tinyllama-1.1b"),
        (["--shape", "smollm2-135m"], "group size 128 does not divide the 576 inputs"),
        (["--shape", "llama-3-8b", "--batch", "0"], "--batch '0' is not understood"),
        (["--shape", "llama-3-8b", "--context", "9"], "--context 9 has no room for 128 + 256"),
    ],
    ids=str,
)
def test_wrong_use(args: list[str], said: str, command: Command) -> None:
    found = command("decode", *args)
    assert found.status == 2 and found.stdout == ""
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert said in found.stderr
