"""The examples run, on a tiny model."""

import runpy
from pathlib import Path

import pytest

import salience
from salience import hf

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quantize_and_chat(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "quantize_and_chat.py"))["main"]
    text = main(str(llama), str(tmp_path / "out"), samples=2, seqlen=32)
    assert isinstance(text, str)
    printed = capsys.readouterr().out
    assert "4.62 bits a weight" in printed
    assert "largest error" in printed


@pytest.mark.parametrize("format", ["awq", "gptq"])
def test_transformers_three_lines(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    out = str(tmp_path / "out")
    salience.quantize(str(llama), out, method="rtn", scheme="w4g32-sym", format=format)
    main = runpy.run_path(str(EXAMPLES / "transformers_three_lines.py"))["main"]
    prompt = "The assert statement"
    try:
        text = main(out, prompt, max_new_tokens=3)
    finally:
        hf.disable()
    assert text.startswith(prompt) and len(text) > len(prompt)
    assert capsys.readouterr().out == f"{text}\n"
