"""The examples run, on a tiny model."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quantize_and_chat(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "quantize_and_chat.py"))["main"]
    text = main(str(llama), str(tmp_path / "out"), samples=2, seqlen=32)
    assert isinstance(text, str)
    printed = capsys.readouterr().out
    assert "4.62 bits a weight" in printed
    assert "largest error" in printed
