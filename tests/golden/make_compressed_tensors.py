"""Write what compressed-tensors itself packs of known codes, and what it reads back.

Run by an environment of its own (benchmarks/interop_transformers.py says how to make it):

    ~/peer/bin/python tests/golden/make_compressed_tensors.py

With compressed-tensors 0.18 or newer this writes compressed_tensors.safetensors; with an older one
compressed_tensors_old.safetensors, whose odd widths are packed in the older way and whose case
"g_idx" has groups in activation order, which newer versions dropped:

    ~/peer/bin/pip install --no-deps --target ~/peer-old compressed-tensors==0.17.1
    PYTHONPATH=~/peer-old ~/peer/bin/python tests/golden/make_compressed_tensors.py

The weights lie on a grid, so the packer finds the very codes they came from. For each case `<c>`
the file holds that grid,

    <c>.codes         uint8 [out, in]
    <c>.zeros         uint8 [out, groups]
    <c>.group_scales  fp16  [out, groups]

the tensors it packed (`<c>.weight_packed` and so on), and the weight it read back, `<c>.weight`.
"""

import re
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

VERSION = compressed_tensors.__version__
OLD = tuple(int(part) for part in re.findall(r"\d+", VERSION)[:2]) < (0, 18)
OUT = Path(__file__).with_name(f"compressed_tensors{'_old' if OLD else ''}.safetensors")
CASES = {  # name: bits, symmetric, group size, out_features, in_features
    **{f"w{bits}g32": (bits, False, 32, 12, 64) for bits in range(2, 9)},
    **{f"w{bits}g32-sym": (bits, True, 32, 12, 64) for bits in (2, 3, 4, 8)},
    **{f"w{bits}channel": (bits, False, -1, 5, 72) for bits in (2, 3, 4, 8)},
    **{f"w{bits}channel-sym": (bits, True, -1, 5, 72) for bits in (3, 4)},
}
OLD_CASES = {
    "w3g32": (3, False, 32, 44, 64),
    "w3channel-sym": (3, True, -1, 5, 72),
    "w5g32": (5, False, 32, 12, 64),
    "w6g32": (6, False, 32, 12, 64),
    "g_idx": (4, False, 16, 8, 64),
}


def make_case(
    name: str, bits: int, sym: bool, group_size: int, rows: int, columns: int, rng: torch.Generator
) -> dict[str, Tensor]:
    groups = 1 if group_size == -1 else columns // group_size
    middle = 2 ** (bits - 1)
    codes = torch.randint(2**bits, (rows, columns), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(2**bits, (rows, groups), generator=rng, dtype=torch.uint8)
    zeros = torch.full_like(zeros, middle) if sym else zeros
    scales = (torch.rand(rows, groups, generator=rng) * 0.02 + 0.001).half()

    actorder = name == "g_idx"
    g_idx = torch.arange(columns) // (columns // groups)
    if actorder:
        g_idx = g_idx[torch.randperm(columns, generator=rng)]
    state = {
        "weight": (codes.half() - zeros.half()[:, g_idx]) * scales[:, g_idx],
        "weight_scale": scales,
        "weight_zero_point": (zeros.int() - middle).to(torch.int8),
        **({"weight_g_idx": g_idx.int()} if actorder else {}),
    }
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=bits,
            symmetric=sym,
            group_size=None if group_size == -1 else group_size,
            strategy="channel" if group_size == -1 else "group",
            actorder="group" if actorder else None,
        ),
    )
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress(state, scheme)
    weight = compressor.decompress(packed, scheme)["weight"]
    return {"codes": codes, "zeros": zeros, "group_scales": scales, "weight": weight, **packed}


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{key}": tensor.clone().contiguous()
        for name, case in (OLD_CASES if OLD else CASES).items()
        for key, tensor in make_case(name, *case, rng).items()
    }
    made_by = f"compressed-tensors {VERSION}, torch {torch.__version__}"
    save_file(tensors, OUT, {"versions": made_by})  # one entry: of several the order varies
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main()
