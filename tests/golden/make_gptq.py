"""Write gptq.safetensors: what GPTQModel's own packer makes of known codes.

Run by the environment that benchmarks/interop_gptq.py describes:

    ~/gptqmodel/bin/python tests/golden/make_gptq.py

The weights lie on a grid, so the packer, which divides them by their scales again, finds the very
codes they came from. For each case `<c>` the file holds that grid,

    <c>.codes         uint8 [out, in]
    <c>.zeros         uint8 [out, groups]
    <c>.group_scales  fp16  [out, groups]
    <c>.order         int32 [in], the group of each column

and the state dict of GPTQModel's layer: `<c>.qweight`, `<c>.qzeros`, `<c>.scales`, `<c>.g_idx`. The
packer makes version 2 ("gptq_v2"); of a case named "v1" the zeros are then converted as GPTQModel
does when it saves version 1.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from interop_gptq import import_gptqmodel

OUT = Path(__file__).with_name("gptq.safetensors")
ROWS, COLUMNS, GROUP_SIZE = 32, 64, 32  # the packer takes only multiples of 32
CASES = {  # name: bits, symmetric, activation order
    "w2_v2": (2, False, False),
    "w3_v2": (3, False, False),
    "w4_v2": (4, False, False),
    "w8_v2": (8, False, False),
    "w4_v2_act_order": (4, False, True),
    "w3_v2_sym": (3, True, False),
    "w2_v1_sym": (2, True, False),
    "w3_v1_sym": (3, True, False),
    "w4_v1_sym": (4, True, True),
    "w8_v1_sym": (8, True, False),
    "w4_v1": (4, False, False),  # with zeros of 0: whole words are decremented, and they borrow
}


def make_case(
    name: str, bits: int, sym: bool, act_order: bool, rng: torch.Generator
) -> dict[str, Tensor]:
    """A random grid, and GPTQModel's layer packed from the weights on it."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    groups = (ROWS, COLUMNS // GROUP_SIZE)
    codes = torch.randint(2**bits, (ROWS, COLUMNS), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(2**bits, groups, generator=rng, dtype=torch.uint8)
    zeros[::5] = 0
    if sym:
        zeros.fill_(2 ** (bits - 1))
    scales = (torch.rand(groups, generator=rng) * 0.02 + 0.001).half()
    order = torch.arange(COLUMNS) // GROUP_SIZE
    if act_order:
        order = order[torch.randperm(COLUMNS, generator=rng)]
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = (codes.float() - zeros.float()[:, order]) * scales.float()[:, order]
    layer = TorchLinear(
        bits,
        GROUP_SIZE,
        sym,
        act_order,
        COLUMNS,
        ROWS,
        register_buffers=True,
        format=FORMAT.GPTQ_V2,
    )
    layer.pack_original(linear, scales.float(), zeros.float(), order.int())
    if "v1" in name:
        config = QuantizeConfig(bits=bits, group_size=GROUP_SIZE, sym=sym)
        convert_gptq_v2_to_v1_format_module(layer, config)
    state = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
    grid = {"codes": codes, "zeros": zeros, "group_scales": scales, "order": order.int()}
    return grid | state


def main() -> None:
    import_gptqmodel()
    rng = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{key}": tensor.contiguous().clone()
        for name, case in CASES.items()
        for key, tensor in make_case(name, *case, rng).items()
    }
    versions = ", ".join(f"{name} {version(name)}" for name in ("gptqmodel", "torch"))
    save_file(tensors, OUT, {"versions": versions})  # one entry: of several the order varies


if __name__ == "__main__":
    main()
