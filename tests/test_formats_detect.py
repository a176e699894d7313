"""Each checkpoint has one format, or an error that says what was seen and what is read."""

from typing import Any

import pytest

from salience.errors import SalienceError
from salience.formats import FORMATS, READ_ONLY, detect_format

CT_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}


def awq(**changes: Any) -> dict[str, Any]:
    """As AutoAWQ writes it into config.json."""
    config = {"quant_method": "awq", "zero_point": True, "group_size": 128, "bits": 4}
    return config | {"version": "gemm", "modules_to_not_convert": None} | changes


def gptq(**changes: Any) -> dict[str, Any]:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    return config | {"damp_percent": 0.01, "true_sequential": True} | changes


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": CT_WEIGHTS | weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def bnb(bits: int, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_compute_dtype": "float32",
        "llm_int8_threshold": 6.0,
    } | changes


READ = {
    "TheBloke, AutoAWQ 0.1": (awq(), "awq"),
    "first Transformers integration": (awq(version="GEMM"), "awq"),
    "AutoRound to AWQ": (awq(autoround_version="0.4.0", sym=False, iters=200), "awq"),
    "GPTQModel to AWQ": (awq(format="gemm", checkpoint_format="gemm", method="awq"), "awq"),
    "backend named": (awq(backend="autoawq"), "awq"),
    "AutoAWQ gemv": (awq(version="gemv"), "awq-gemv"),
    "AutoAWQ GEMV": (awq(version="GEMV"), "awq-gemv"),
    "AutoAWQ gemv_fast": (awq(version="gemv_fast"), "awq-gemv-fast"),
    "llm-awq through Transformers": (awq(backend="llm-awq"), "llm-awq"),
    "llm-awq, version gemv": (awq(backend="llm-awq", version="gemv"), "llm-awq"),
    "llm-awq of GPTQModel": (awq(version=None, format="llm-awq"), "llm-awq"),
    "pack-quantized": (compressed("pack-quantized", group_size=128), "compressed-tensors"),
    "int-quantized": (compressed("int-quantized", num_bits=8), "compressed-tensors"),
    "float-quantized": (compressed("float-quantized", type="float"), "compressed-tensors"),
    "nvfp4": (compressed("nvfp4-pack-quantized", type="float"), "compressed-tensors"),
    "bitsandbytes fp4": (bnb(4), "bitsandbytes"),
    "bitsandbytes nf4": (bnb(4, bnb_4bit_quant_type="nf4", _load_in_4bit=True), "bitsandbytes"),
    "bitsandbytes int8": (bnb(8), "bitsandbytes-int8"),
    "the first bitsandbytes": ({"load_in_8bit": True}, "bitsandbytes-int8"),
}
NOT_READ = {
    "AutoAWQ marlin": awq(version="marlin", zero_point=False),
    "both of bitsandbytes": bnb(4, load_in_8bit=True),
    "none of bitsandbytes": bnb(4, load_in_4bit=False),
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "fbgemm": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
    "quanto": {"quant_method": "quanto", "weights": "int4"},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "aqlm": {"quant_method": "aqlm", "nbits_per_codebook": 16, "num_codebooks": 1},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "exl2": {"quant_method": "exl2", "version": "0.0.11", "bits": 4.0},
    "exl3": {"quant_method": "exl3", "version": "0.0.1", "bits": 3.0},
    "nothing": {},
}
# Of more than one tool, and so of one format whichever of them are read here.
MAYBE = {
    "AutoGPTQ": gptq(),
    "GPTQModel v1": gptq(format="gptq", checkpoint_format="gptq", method="gptq"),
    "gptq_v2": gptq(checkpoint_format="gptq_v2", format="gptq_v2", sym=False),
    "gptq_p": gptq(checkpoint_format="gptq_p"),
    "gptq marlin": gptq(checkpoint_format="marlin", is_marlin_format=True),
}


@pytest.mark.parametrize(("config", "name"), READ.values(), ids=[*READ])
def test_detects(config: dict[str, Any], name: str) -> None:
    assert detect_format(config).name == name


@pytest.mark.parametrize(
    "config", [*(c for c, _ in READ.values()), *NOT_READ.values(), *MAYBE.values()]
)
def test_never_two(config: dict[str, Any]) -> None:
    assert sum(fmt.detect(config) for fmt in (*FORMATS, *READ_ONLY)) <= 1


@pytest.mark.parametrize("config", NOT_READ.values(), ids=[*NOT_READ])
def test_refuses(config: dict[str, Any]) -> None:
    """The error names the method, what else was seen, and what is read."""
    with pytest.raises(SalienceError, match="is not one this version reads") as caught:
        detect_format(config)
    message = str(caught.value)
    assert f"quant_method {config.get('quant_method')!r}" in message
    for key in {"version", "bits", "load_in_4bit"} & set(config):
        assert f"{key!r}: {config[key]!r}" in message
    assert all(fmt.name in message for fmt in (*FORMATS, *READ_ONLY))
    assert len(message.splitlines()) == 1


def test_marlin_is_refused_with_the_reason() -> None:
    with pytest.raises(SalienceError, match=r"permuted for one GPU kernel.* gemm version"):
        detect_format(awq(version="Marlin"))


def test_two_at_once_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(READ_ONLY[0]), "detect", lambda _self, _config: True)
    with pytest.raises(SalienceError, match=r"'quant_method': 'awq'.* is of awq and awq-gemv at"):
        detect_format(awq())
