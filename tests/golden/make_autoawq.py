"""Write autoawq_gemm.safetensors: what AutoAWQ's own packer makes of known codes.

Run by the environment that benchmarks/interop_autoawq.py describes:

    ~/autoawq/bin/python tests/golden/make_autoawq.py

The weights lie on a 4-bit grid, so AutoAWQ's packer, which divides them by their scales again,
finds the very codes they came from. For each case `<c>` the file holds that grid,

    <c>.codes         uint8 [out, in]
    <c>.zeros         uint8 [out, groups]
    <c>.group_scales  fp16  [out, groups]

and the state dict of AutoAWQ's layer: `<c>.qweight`, `<c>.qzeros`, `<c>.scales` and, in a case
with a bias, `<c>.bias`.
"""

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

OUT = Path(__file__).with_name("autoawq_gemm.safetensors")
CASES = {  # name: out_features, in_features, group_size, bias
    "g64_bias": (64, 128, 64, True),
    "g32": (32, 96, 32, False),  # the packer takes only multiples of 32 outputs
}

# `import awq` would import every model class of an old transformers: leave that file out.
_spec = importlib.util.find_spec("awq")
sys.modules["awq"] = importlib.util.module_from_spec(_spec)
from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402


def make_case(
    out_features: int, in_features: int, group_size: int, bias: bool, rng: torch.Generator
) -> dict[str, Tensor]:
    """A random grid, and AutoAWQ's layer packed from the weights on it."""
    groups = (out_features, in_features // group_size)
    codes = torch.randint(16, (out_features, in_features), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(16, groups, generator=rng, dtype=torch.uint8)
    scales = (torch.rand(groups, generator=rng) * 0.02 + 0.001).half()

    linear = nn.Linear(in_features, out_features, bias, dtype=torch.float16)
    steps = codes.half() - zeros.half().repeat_interleave(group_size, dim=1)
    linear.weight.data = steps * scales.repeat_interleave(group_size, dim=1)
    if bias:
        linear.bias.data = torch.randn(out_features, generator=rng).half()

    # As AutoAWQ's quantizer calls it: both [groups, out], the zeros in the weight's dtype.
    layer = WQLinear_GEMM.from_linear(
        linear,
        w_bit=4,
        group_size=group_size,
        scales=scales.t().contiguous(),
        zeros=zeros.t().contiguous().half(),
    )
    return {"codes": codes, "zeros": zeros, "group_scales": scales, **layer.state_dict()}


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{key}": tensor.contiguous()
        for name, case in CASES.items()
        for key, tensor in make_case(*case, rng).items()
    }
    versions = ", ".join(f"{name} {version(name)}" for name in ("autoawq", "torch", "safetensors"))
    save_file(tensors, OUT, {"versions": versions})  # one entry: of several the order varies


if __name__ == "__main__":
    main()
