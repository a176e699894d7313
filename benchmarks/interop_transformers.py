"""Load checkpoints with Transformers and the format's own library, and compare logits.

Runs in an environment of its own, without salience:

    python3 -m venv ~/peer
    ~/peer/bin/pip install torch==2.13.0 transformers accelerate compressed-tensors bitsandbytes

    python benchmarks/tiny_checkpoints.py compressed-tensors -o OUT    # where salience is
    ~/peer/bin/python benchmarks/interop_transformers.py OUT

OUT has checkpoint folders NAME and files NAME.safetensors with `input_ids` and the `logits` that
salience has for them. Each folder is loaded unchanged, in fp32 on the CPU. Prints one JSON line for
each: `error` is |theirs - ours| / |ours|, `quantized` how many modules Transformers took as such.
bitsandbytes would compute in fp16, or on some CPUs in bf16; here it is told to do so in fp32. Of
LLM.int8, which also rounds the inputs to 8 bits, the weights that bitsandbytes dequantizes are run.
Exits 1 when an error is too large, when a tensor of the checkpoint had no place, or when nothing
was quantized.

compressed-tensors 0.18 to 0.20 do not load asymmetric checkpoints, their own neither: on the meta
device they make room for unpacked zeros. These are loaded with `dequantize=True`, which rounds each
weight to fp16 (and takes one scheme only). Version 0.17 loads them, but no codes of 2, 3 or 5 bits:

    ~/peer/bin/pip install --no-deps --target ~/peer-old compressed-tensors==0.17.1
    PYTHONPATH=~/peer-old ~/peer/bin/python benchmarks/interop_transformers.py OUT w4g32 mixed

Groups in activation order ("actorder") are read by versions up to 0.18 and refused by newer ones;
but 0.18 with `dequantize=True`, its only way to asymmetric ones, ignores the order.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import int8_vectorwise_dequant
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

EXACT, ROUNDED = 1e-5, 3e-3  # the second when weights are rounded to fp16


def load(folder: Path) -> tuple[Any, dict[str, Any], bool]:
    """The model, what Transformers says of loading it, whether it was dequantized."""
    options = {"dtype": torch.float32, "device_map": "cpu", "output_loading_info": True}
    try:
        return *AutoModelForCausalLM.from_pretrained(folder, **options), False
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        return *AutoModelForCausalLM.from_pretrained(folder, **options), True


def compute_in_fp32(model: torch.nn.Module) -> None:
    """Have bitsandbytes' layers multiply fp32 inputs by the weights they hold."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
            module.support_avx512bf16_for_cpu = False
        elif type(module).__name__ == "Linear8bitLt":
            weight = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            plain = torch.nn.Linear(*reversed(weight.shape), module.bias is not None)
            plain.weight.data, plain.bias = weight, module.bias
            model.set_submodule(name, plain)


def compare(folder: Path, expected: dict[str, torch.Tensor]) -> dict[str, object]:
    model, info, dequantized = load(folder)
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    modules = list(model.modules())
    quantized = sum(
        hasattr(module, "weight_packed") or type(module).__name__ in ("Linear4bit", "Linear8bitLt")
        for module in modules
    )
    compute_in_fp32(model)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()  # bitsandbytes has them loaded as stored
    with torch.no_grad():
        theirs = model(input_ids=expected["input_ids"], use_cache=False).logits.double()
    ours = expected["logits"].double()
    error = ((theirs - ours).norm() / ours.norm()).item()
    strays = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"]]))
    limit = ROUNDED if dequantized else EXACT
    return {
        "checkpoint": folder.name,
        "method": method,
        "error": error,
        "quantized": quantized,
        "dequantized": dequantized,
        "strays": strays,
        "agrees": error <= limit and (quantized > 0 or dequantized) and not strays,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder with checkpoints and their logits")
    parser.add_argument("names", nargs="*", help="which; all by default")
    args = parser.parse_args()
    names = args.names or sorted(path.stem for path in args.out.glob("*.safetensors"))
    results = [
        compare(args.out / name, load_file(args.out / f"{name}.safetensors")) for name in names
    ]
    for result in results:
        print(json.dumps(result))
    packages = ("torch", "transformers", "compressed-tensors", "bitsandbytes")
    print(json.dumps({"versions": {name: version(name) for name in packages}}))
    return 0 if results and all(result["agrees"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
