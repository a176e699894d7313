"""Write bitsandbytes_nf4.safetensors: what bitsandbytes makes of random weights, and reads back.

Run by an environment of its own (benchmarks/interop_transformers.py says how to make it):

    ~/peer/bin/python tests/golden/make_bitsandbytes.py

For each case `<c>` the file holds the float weight, `<c>.float`, the state dict of bitsandbytes'
Linear4bit, which is what Transformers saves (`<c>.weight`, `<c>.weight.absmax` and so on), and the
weight it dequantizes, `<c>.dequantized`.

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

OUT = Path(__file__).with_name("bitsandbytes_nf4.safetensors")
CASES = {  # name: dtype, double quantization, out_features, in_features
    "fp32": (torch.float32, False, 6, 128),
    "bf16": (torch.bfloat16, False, 6, 128),
    "fp16": (torch.float16, False, 6, 128),
    "fp32-dq": (torch.float32, True, 9, 64),
    "bf16-dq": (torch.bfloat16, True, 9, 64),
    "fp16-dq": (torch.float16, True, 87, 192),  # two blocks of scales, the second one short
}


def make_case(
    dtype: torch.dtype, nested: bool, rows: int, columns: int, rng: torch.Generator
) -> dict[str, Tensor]:
    weight = torch.randn(rows, columns, generator=rng) * torch.rand(rows, 1, generator=rng)
    weight[1] = 0
    layer = bitsandbytes.nn.Linear4bit(
        columns, rows, bias=False, compress_statistics=nested, quant_type="nf4"
    )
    layer.weight.data = weight.to(dtype)
    layer.to("cpu")  # which quantizes
    state = layer.weight.quant_state
    return {
        "float": weight.to(dtype),
        "dequantized": bitsandbytes.functional.dequantize_4bit(layer.weight.data, state),
        **layer.state_dict(),
    }


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{key}": tensor.detach().clone().contiguous()
        for name, case in CASES.items()
        for key, tensor in make_case(*case, rng).items()
    }
    versions = ", ".join(f"{name} {version(name)}" for name in ("bitsandbytes", "torch"))
    save_file(tensors, OUT, {"versions": versions})  # one entry: of several the order varies
    print(
        OUT, OUT.stat().st_size, {key: tuple(t.shape) for key, t in tensors.items() if "dq" in key}
    )


if __name__ == "__main__":
    main()
