"""Write autoawq_gemv.safetensors: what AutoAWQ's gemv and gemv_fast packers make of known codes.

Run as make_autoawq.py is, by the environment that benchmarks/interop_autoawq.py describes:

    ~/autoawq/bin/python tests/golden/make_awq_gemv.py

The weights lie on a 4-bit grid, so the packers, which divide them by their scales again, find the
very codes they came from. For each case `<c>` the file holds that grid,

    <c>.codes         uint8 [out, in]
    <c>.zeros         uint8 [out, groups]
    <c>.group_scales  fp16  [out, groups]

and the state dict of AutoAWQ's layer, `<c>.qweight`, `<c>.qzeros`, `<c>.scales`.
"""

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

OUT = Path(__file__).with_name("autoawq_gemv.safetensors")
CASES = {  # name: out_features, in_features, group_size
    "gemv_g128": (8, 1152, 128),  # nine groups: more than fill one word
    "gemv_g64": (16, 192, 64),
    "gemv_g32": (8, 128, 32),
    "gemv_fast_g128": (8, 1152, 128),
    "gemv_fast_g64": (16, 192, 64),
    "gemv_fast_g32": (8, 128, 32),
}

# `import awq` would import every model class of an old transformers: leave that file out.
_spec = importlib.util.find_spec("awq")
sys.modules["awq"] = importlib.util.module_from_spec(_spec)
from awq.modules.linear.gemv import WQLinear_GEMV  # noqa: E402
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast  # noqa: E402


def make_case(
    kind: type, out_features: int, in_features: int, group_size: int, rng: torch.Generator
) -> dict[str, Tensor]:
    """A random grid, and AutoAWQ's layer packed from the weights on it."""
    groups = (out_features, in_features // group_size)
    codes = torch.randint(16, (out_features, in_features), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(16, groups, generator=rng, dtype=torch.uint8)
    scales = (torch.rand(groups, generator=rng) * 0.02 + 0.001).half()

    linear = nn.Linear(in_features, out_features, bias=False, dtype=torch.float16)
    steps = codes.half() - zeros.half().repeat_interleave(group_size, dim=1)
    linear.weight.data = steps * scales.repeat_interleave(group_size, dim=1)

    # As AutoAWQ's quantizer calls these two: both [out, groups], the zeros in the weight's dtype.
    layer = kind.from_linear(linear, 4, group_size, scales=scales, zeros=zeros.half())
    return {"codes": codes, "zeros": zeros, "group_scales": scales, **layer.state_dict()}


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for name, case in CASES.items():
        kind = WQLinear_GEMVFast if "fast" in name else WQLinear_GEMV
        for key, tensor in make_case(kind, *case, rng).items():
            tensors[f"{name}.{key}"] = tensor.contiguous()
    versions = ", ".join(f"{name} {version(name)}" for name in ("autoawq", "torch", "safetensors"))
    save_file(tensors, OUT, {"versions": versions})  # one entry: of several the order varies


if __name__ == "__main__":
    main()
