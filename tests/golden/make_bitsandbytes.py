"""Write what bitsandbytes makes of random weights, and reads back.

bitsandbytes_nf4.safetensors, bitsandbytes_fp4.safetensors (with blocks of other sizes than 64) and
bitsandbytes_int8.safetensors are made.

Run by an environment of its own (benchmarks/interop_transformers.py says how to make it):

    ~/peer/bin/python tests/golden/make_bitsandbytes.py

For each case `<c>` the file holds the float weight, `<c>.float`, the state dict of bitsandbytes'
Linear4bit, which is what Transformers saves (`<c>.weight`, `<c>.weight.absmax` and so on), and the
weight it dequantizes, `<c>.dequantized`. Of int8 the layer is Linear8bitLt.

bitsandbytes runs here without its native library: its portable kernels round to nearest, as those
for GPUs do, while the CPU library of 0.50 rounds nested scales to 65536 even steps before it looks
for the nearest. Only nested codes differ, each by one, in about one of a thousand.
"""

import ctypes
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_load = ctypes.cdll.LoadLibrary


def _refuse(name: str) -> ctypes.CDLL:
    if "bitsandbytes" in str(name):
        raise OSError("the portable kernels are wanted")
    return _load(name)


ctypes.cdll.LoadLibrary = _refuse
import bitsandbytes  # noqa: E402

OUT = Path(__file__).parent
CASES = {  # name: dtype, double quantization, out_features, in_features
    "fp32": (torch.float32, False, 6, 128),
    "bf16": (torch.bfloat16, False, 6, 128),
    "fp16": (torch.float16, False, 6, 128),
    "fp32-dq": (torch.float32, True, 9, 64),
    "bf16-dq": (torch.bfloat16, True, 9, 64),
    "fp16-dq": (torch.float16, True, 87, 192),  # two blocks of scales, the second one short
}


# name: kind, block size, dtype, double quantization, out_features, in_features
MORE_CASES = {
    "fp4": ("fp4", 64, torch.float16, False, 6, 128),
    "fp4-dq": ("fp4", 64, torch.float32, True, 9, 64),
    "fp4g32": ("fp4", 32, torch.bfloat16, False, 5, 96),
    "nf4g128": ("nf4", 128, torch.float16, False, 4, 256),
    "nf4g256-dq": ("nf4", 256, torch.float16, True, 6, 512),
}


def make_case(
    dtype: torch.dtype,
    nested: bool,
    rows: int,
    columns: int,
    rng: torch.Generator,
    kind: str = "nf4",
    block: int = 64,
) -> dict[str, Tensor]:
    weight = torch.randn(rows, columns, generator=rng) * torch.rand(rows, 1, generator=rng)
    weight[1] = 0
    layer = bitsandbytes.nn.Linear4bit(
        columns, rows, bias=False, compress_statistics=nested, quant_type=kind
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.to(dtype), False, blocksize=block, compress_statistics=nested, quant_type=kind
    )
    layer.to("cpu")  # which quantizes
    state = layer.weight.quant_state
    return {
        "float": weight.to(dtype),
        "dequantized": bitsandbytes.functional.dequantize_4bit(layer.weight.data, state),
        **layer.state_dict(),
    }


def make_int8(rows: int, columns: int, rng: torch.Generator) -> dict[str, Tensor]:
    weight = (torch.randn(rows, columns, generator=rng) * torch.rand(rows, 1, generator=rng)).half()
    layer = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
    layer.weight.data = weight.clone()
    layer.to("cpu")
    state = layer.state_dict()
    read = bitsandbytes.functional.int8_vectorwise_dequant(state["weight"], state["SCB"])
    return {"float": weight, "dequantized": read, **state}


def write(name: str, cases: dict[str, dict[str, Tensor]]) -> None:
    tensors = {
        f"{case}.{key}": tensor.detach().clone().contiguous()
        for case, found in cases.items()
        for key, tensor in found.items()
    }
    versions = ", ".join(f"{name} {version(name)}" for name in ("bitsandbytes", "torch"))
    save_file(tensors, OUT / name, {"versions": versions})  # one entry: of several the order varies
    print(name, (OUT / name).stat().st_size)


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    write("bitsandbytes_nf4.safetensors", {name: make_case(*c, rng) for name, c in CASES.items()})
    more = {}
    for name, (kind, block, *case) in MORE_CASES.items():
        more[name] = make_case(*case, rng, kind, block)
    write("bitsandbytes_fp4.safetensors", more)
    write("bitsandbytes_int8.safetensors", {"int8": make_int8(7, 96, rng)})


if __name__ == "__main__":
    main()
