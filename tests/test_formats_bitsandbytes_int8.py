"""bitsandbytes LLM.int8, against what bitsandbytes itself made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import salience
from helpers_checkpoint import dequantized, stored_tensors
from salience import grid
from salience.calibration import Calibration
from salience.errors import SalienceError
from salience.formats import BitsAndBytesInt8, detect_format, get_format
from salience.inspection import inspect
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.source import open_source
from tiny_models import error, llama_config, logits, make_model, random_tokens

GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes_int8.safetensors"
FORMAT = BitsAndBytesInt8()
SCHEME = Scheme.parse("w8channel-sym")


def golden() -> dict[str, Tensor]:
    return {key.partition(".")[2]: tensor for key, tensor in load_file(GOLDEN).items()}


def stored() -> dict[str, Tensor]:
    return {key: tensor for key, tensor in golden().items() if key in FORMAT.tensors}


def test_reads_bitsandbytes() -> None:
    """W = code * SCB / 127, to the last bit but one of fp32; theirs multiplies by 1 / 127."""
    case = golden()
    qt = FORMAT.read(stored(), SCHEME)
    assert torch.equal(qt.q.int() - 128, case["weight"].int())
    assert qt.scales.dtype == torch.float32
    exact = case["weight"].double() * case["SCB"].double()[:, None] / 127
    for weight in (qt.dequantize(), case["dequantized"]):
        torch.testing.assert_close(weight.double(), exact, rtol=2**-22, atol=0)


def test_writes_what_it_read() -> None:
    written = FORMAT.write(FORMAT.read(stored(), SCHEME))
    assert set(written) == FORMAT.tensors
    for key, tensor in stored().items():
        assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor)


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 20), columns=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_round_trip(rows: int, columns: int, seed: int) -> None:
    """Scales that were fp16 come back exactly, subnormal ones too."""
    random = torch.Generator().manual_seed(seed)
    bits = torch.randint(1, 0x7C00, (rows, 1), generator=random, dtype=torch.int16)
    qt = QTensor(
        torch.randint(256, (rows, columns), generator=random, dtype=torch.uint8),
        bits.view(torch.float16),
        torch.full((rows, 1), 128, dtype=torch.uint8),
        SCHEME,
    )
    back = FORMAT.read(FORMAT.write(qt), SCHEME)
    assert torch.equal(back.q, qt.q)
    assert torch.equal(back.zeros, qt.zeros)
    assert torch.equal(back.scales, qt.scales.float())


def test_config() -> None:
    config = FORMAT.config({"a": SCHEME}, ["lm_head"])
    assert config["load_in_8bit"] and not config["load_in_4bit"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["llm_int8_skip_modules"] == ["lm_head"]
    assert detect_format(config) is get_format("bitsandbytes-int8")
    assert FORMAT.scheme(config, "any") == SCHEME


def test_check() -> None:
    FORMAT.check({"a": SCHEME}, {"a": (3, 5)})
    for other in ("w8channel", "w4channel-sym", "w8g128-sym", "nf4"):
        with pytest.raises(SalienceError, match=f"holds w8channel-sym, not {other} as a wants"):
            FORMAT.check({"a": Scheme.parse(other)}, {"a": (128, 128)})


def test_without_a_format_tensor() -> None:
    tensors = stored()
    del tensors["weight_format"]
    assert torch.equal(FORMAT.read(tensors, SCHEME).q, FORMAT.read(stored(), SCHEME).q)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("weight", torch.zeros(7, 96, dtype=torch.uint8), "weight must be an int8 matrix"),
        ("weight", torch.zeros(7, dtype=torch.int8), "weight must be an int8 matrix"),
        ("weight", None, "tensor weight is missing"),
        ("SCB", torch.zeros(8), r"SCB must be float32 \[7\], not torch.float32 \[8\]"),
        ("SCB", torch.zeros(7).half(), r"SCB must be float32 \[7\], not torch.float16"),
        ("SCB", None, "tensor SCB is missing"),
        ("weight_format", torch.tensor(2, dtype=torch.uint8), "weight_format is 2: weights in a"),
        ("weight_format", torch.zeros(2), "weight_format is"),
    ],
)
def test_read_refuses(name: str, value: Any, match: str) -> None:
    tensors = {
        key: tensor for key, tensor in (stored() | {name: value}).items() if tensor is not None
    }
    with pytest.raises(SalienceError, match=match):
        FORMAT.read(tensors, SCHEME)


def test_quantizes_and_loads(llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = Calibration(str(text_file), samples=2, seqlen=64)
    options: dict[str, Any] = {"method": "rtn", "scheme": "w8channel-sym", "calibration": text}
    salience.quantize(str(llama), out, format="bitsandbytes-int8", **options)
    found = inspect(open_source(str(out)))
    assert (found.format, found.scheme, found.kept) == (
        "bitsandbytes-int8",
        str(SCHEME),
        ["lm_head"],
    )
    name = "model.layers.0.mlp.up_proj"
    weight = stored_tensors(llama)[f"{name}.weight"]
    want = FORMAT.write(grid.quantize(weight, SCHEME))
    for local, tensor in want.items():
        assert torch.equal(stored_tensors(out)[f"{name}.{local}"], tensor)
    dense, tokens = make_model(llama_config()), random_tokens()
    dense.load_state_dict(dequantized(out))
    assert error(logits(salience.load(out, "cpu"), tokens), logits(dense, tokens)) < 1e-5
