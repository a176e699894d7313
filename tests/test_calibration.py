"""Calibration tokens."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
)

from salience import calibration as module
from salience.calibration import Calibration, read_text
from salience.errors import SalienceError
from tiny_models import TEXT


def test_tokens_are_chunks_of_the_text(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = Calibration(str(text_file), samples=9, seqlen=32).tokens(tokenizer)
    assert tokens.shape == (9, 32) and tokens.dtype == torch.int64
    ids = tokenizer(text_file.read_text())["input_ids"]
    chunks = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    found = [chunks.index(row) for row in tokens.tolist()]
    assert len(set(found)) == 9
    assert found != sorted(found)


def test_tokens_by_seed(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def tokens(seed: int) -> Tensor:
        torch.manual_seed(seed + 7)  # the global generator has no say
        return Calibration(str(text_file), samples=9, seqlen=32, seed=seed).tokens(tokenizer)

    assert torch.equal(tokens(0), tokens(0))
    assert torch.equal(tokens(3), tokens(3))
    assert not torch.equal(tokens(0), tokens(3))


def test_text_that_is_too_short(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "short.txt"
    path.write_text(TEXT[:500])
    count = len(tokenizer(TEXT[:500])["input_ids"])
    with pytest.raises(
        SalienceError,
        match=rf"{path} has {count} tokens, {4 * 128 - count} too few for 4 samples of 128",
    ):
        Calibration(str(path), samples=4, seqlen=128).tokens(tokenizer)
    exact = Calibration(str(path), samples=1, seqlen=count).tokens(tokenizer)
    assert exact.shape == (1, count)
    path.write_text("")
    with pytest.raises(SalienceError, match="has 0 tokens, 8 too few"):
        Calibration(str(path), samples=1, seqlen=8).tokens(tokenizer)


def test_jsonl(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [TEXT[:900], "naïve “quotes”\n", TEXT[900:2000]]
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in documents]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    plain = tmp_path / "text.txt"
    plain.write_text("".join(f"{text}\n" for text in documents), encoding="utf-8")
    found = Calibration(str(path), samples=4, seqlen=64).tokens(tokenizer)
    assert torch.equal(found, Calibration(str(plain), samples=4, seqlen=64).tokens(tokenizer))
    assert read_text(str(path)) == plain.read_text(encoding="utf-8")


@pytest.mark.parametrize("line", ["{", '{"content": "x"}', '["text"]', '"text"', "7"])
def test_jsonl_that_is_wrong(line: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(SalienceError, match=rf"{path} line 2 is no JSON object with a \"text\""):
        Calibration(str(path), samples=1, seqlen=8).tokens(tokenizer)


def test_default_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = Calibration(samples=4, seqlen=32).tokens(tokenizer)
    text = tokenizer.decode(tokens[0])
    assert text in TEXT
    assert read_text("pydoc") == TEXT
    assert len(TEXT) > 4 * 128 * 512 / 2  # enough for the default with a usual tokenizer


def test_a_huge_file_is_not_read_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "huge.txt"
    path.write_text(TEXT * 20)
    read: list[int] = []

    class Counting:
        def __call__(self, text: str, **_: Any) -> Any:
            read.append(len(text))
            return tokenizer(text)

    Calibration(str(path), samples=2, seqlen=32).tokens(Counting())
    assert read == [2 * 32 * 64]


def test_bytes_that_are_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "binary.txt"
    path.write_bytes(bytes(range(256)) * 8)
    assert Calibration(str(path), samples=1, seqlen=64).tokens(tokenizer).shape == (1, 64)


def test_no_such_text(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SalienceError, match="nowhere is no file; for a Hub dataset, pip install"):
        Calibration("nowhere", samples=1, seqlen=8).tokens(tokenizer)
    with pytest.raises(SalienceError, match=r"text nowhere\.txt does not exist"):
        read_text("nowhere.txt")


@pytest.mark.parametrize("values", [{"samples": 0}, {"seqlen": 0}, {"samples": -1}])
def test_sizes_that_are_wrong(values: dict[str, int]) -> None:
    with pytest.raises(SalienceError, match="at least 1"):
        Calibration(**values)  # type: ignore[arg-type]


def test_describe() -> None:
    assert Calibration("a.txt", 3, 5, 7).describe() == {
        "text": "a.txt",
        "samples": 3,
        "seqlen": 5,
        "seed": 7,
        "tokens": 15,
    }
    assert module.DEFAULT_TEXT == "pydoc"
