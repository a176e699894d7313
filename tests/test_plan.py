"""The plan against what quantize() then writes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config

import salience
from salience import plan as module
from salience.calibration import Calibration
from salience.errors import SalienceError
from salience.formats import get_format
from salience.plan import Plan, checkpoint_bytes, make_plan
from salience.scheme import Scheme
from salience.source import open_source
from tiny_models import VOCABULARY, llama_config, make_model, save

CPU = torch.device("cpu")


def plan(
    folder: Path, scheme: str, method: str = "awq", samples: int = 8, out: Path | None = None
) -> Plan:
    return make_plan(
        open_source(str(folder)),
        Scheme.parse(scheme),
        get_format("awq"),
        None if method == "rtn" else Calibration(samples=samples, seqlen=128),
        method,
        CPU,
        out or folder,
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "matmul_flops", lambda _device: 1e11)


@pytest.mark.parametrize("scheme", ["w4g16", "w4g32", "w4g64"])
def test_bytes_are_those_of_the_checkpoint(scheme: str, llama: Path, tmp_path: Path) -> None:
    expected = plan(llama, scheme)
    report = salience.quantize(str(llama), tmp_path / "out", method="rtn", scheme=scheme)
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert expected.disk_bytes == pytest.approx(sum(t.nbytes for t in tensors), rel=0.01)
    assert expected.bits_per_weight == report.bits_per_weight
    assert expected.quantized_parameters == sum(
        linear.in_features * linear.out_features for linear in report.linears
    )
    source = load_file(llama / "model.safetensors").values()
    assert expected.source_bytes == sum(t.nbytes for t in source)
    assert expected.parameters == sum(t.numel() for t in source)


def test_tied_embeddings_and_biases_are_counted_once(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    source = save(make_model(config), tmp_path / "in")
    expected = plan(source, "w4g32")
    salience.quantize(str(source), tmp_path / "out", method="rtn", scheme="w4g32")
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert expected.disk_bytes == pytest.approx(sum(t.nbytes for t in tensors), rel=0.01)


def test_group_that_does_not_fit(llama: Path, tmp_path: Path) -> None:
    message = r"group size 128 does not divide the 64 inputs .*: w4g64, w4g32, w4g16$"
    with pytest.raises(SalienceError, match=message):
        plan(llama, "w4g128")
    odd = save(make_model(llama_config(intermediate_size=120)), tmp_path / "odd")
    message = r"the 120 inputs of model\.layers\.0\.mlp\.down_proj; .*: none of the usual ones$"
    with pytest.raises(SalienceError, match=message):
        plan(odd, "w4g32")


def test_format_that_does_not_fit(llama: Path) -> None:
    with pytest.raises(SalienceError, match="--format awq holds 4-bit codes, not w3g32"):
        plan(llama, "w3g32")


def test_memory_grows_with_the_text_not_with_the_layers(llama: Path, tmp_path: Path) -> None:
    deep = save(make_model(llama_config(num_hidden_layers=12)), tmp_path / "deep")
    base = plan(llama, "w4g32").ram_bytes
    more_text = plan(llama, "w4g32", samples=8 + 1024).ram_bytes
    assert more_text - base >= 1024 * 128 * 64 * 4
    # The peak of this process may grow meanwhile, and a small checkpoint waits in memory.
    assert plan(deep, "w4g32").ram_bytes - base < 64 * 2**20


def test_what_does_not_fit_is_said(
    llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fine = plan(llama, "w4g32")
    assert fine.fits and fine.advice == [] and fine.vram_bytes == 0
    monkeypatch.setattr(module, "available_ram_bytes", lambda: 1000)
    monkeypatch.setattr(module, "free_disk_bytes", lambda _path: 1000)
    tight = plan(llama, "w4g32", out=tmp_path)
    assert not tight.fits
    assert "RAM is short" in tight.advice[0]
    assert f"the disk of {tmp_path} is short by {fine.disk_bytes - 1000} bytes" in tight.advice[1]


def test_time_by_phase(llama: Path) -> None:
    awq, rtn = plan(llama, "w4g32"), plan(llama, "w4g32", method="rtn")
    assert set(awq.seconds) == {"statistics", "search"} and set(rtn.seconds) == {"search"}
    assert all(seconds > 0 for seconds in (*awq.seconds.values(), *rtn.seconds.values()))
    assert rtn.seconds["search"] < awq.seconds["search"]
    longer = plan(llama, "w4g32", samples=80).seconds
    assert longer["statistics"] == pytest.approx(10 * awq.seconds["statistics"])
    assert longer["search"] == awq.seconds["search"]
    assert rtn.ram_bytes <= awq.ram_bytes


def test_no_weights_are_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("salience.checkpoint.SafetensorsCheckpoint.tensor", read)
    assert plan(llama, "w4g32").parameters == make_model(llama_config()).num_parameters()


def test_checkpoint_bytes_by_hand(llama: Path) -> None:
    model = open_source(str(llama)).skeleton()
    per_block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    floats = 2 * VOCABULARY * 64 + 64 + 3 * 2 * 64
    codes = 3 * per_block // 2
    groups = 3 * per_block // 32 * 20 // 8
    assert checkpoint_bytes(model, Scheme(4, 32)) == codes + groups + 2 * floats
