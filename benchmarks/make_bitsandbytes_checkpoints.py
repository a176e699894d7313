"""Quantize a float checkpoint with Transformers and bitsandbytes, for salience to read.

Runs in the environment of `interop_transformers.py`, between two runs where salience is:

    PYTHONPATH=src:tests python benchmarks/tiny_checkpoints.py bitsandbytes --keep-float -o OUT
    ~/peer/bin/python benchmarks/make_bitsandbytes_checkpoints.py OUT/float -o THEIRS
    PYTHONPATH=src:tests python benchmarks/interop_bitsandbytes.py THEIRS

Makes THEIRS/NAME by `save_pretrained`, and THEIRS/NAME.safetensors: `input_ids`, the `logits` of
the model read back, in fp32, and `<linear>.weight`, what bitsandbytes dequantizes of each linear.
"""

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from interop_transformers import compute_in_fp32
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "nf4-stored-bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def make(source: Path, out: Path, options: dict[str, Any]) -> None:
    config = BitsAndBytesConfig(**options)
    load: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, **load
    ).save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, **load)
    weights = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            module.weight.quant_state.dtype = torch.float32
            weights[f"{name}.weight"] = dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
        elif type(module).__name__ == "Linear8bitLt":
            weights[f"{name}.weight"] = int8_vectorwise_dequant(
                module.weight.data, module.weight.SCB
            )
    compute_in_fp32(model)
    for parameter in model.parameters():
        if parameter.is_floating_point() and type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.float()
    tokens = torch.randint(
        model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits.float()
    tensors = {"input_ids": tokens, "logits": logits, **weights}
    versions = {name: version(name) for name in ("bitsandbytes", "transformers", "torch")}
    save_file({key: t.contiguous() for key, t in tensors.items()}, f"{out}.safetensors", versions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--out", required=True, type=Path)
    args = parser.parse_args()
    for name, options in CONFIGS.items():
        make(args.source, args.out / name, options)


if __name__ == "__main__":
    main()
