"""Read an AutoAWQ (GEMM) checkpoint with AutoAWQ's own code, and write its other layouts.

Runs in an environment of its own, which needs neither salience nor transformers:

    python3 -m venv ~/autoawq
    ~/autoawq/bin/pip install torch==2.13.0 accelerate
    ~/autoawq/bin/pip install --no-deps --no-build-isolation autoawq==0.2.9

Then write what AutoAWQ unpacks, `<p>.codes` uint8 [out, in] and `<p>.zeros` uint8 [out, groups] for
each `<p>.qweight`; or compare it with a file of the same names; or write the checkpoint anew with
the weights AutoAWQ dequantizes, packed by its class for gemm, gemv or gemv_fast, or as they are:

    python benchmarks/interop_autoawq.py CHECKPOINT_DIR -o OUT.safetensors
    python benchmarks/interop_autoawq.py CHECKPOINT_DIR --check CODES.safetensors
    python benchmarks/interop_autoawq.py CHECKPOINT_DIR --repack gemv|gemv_fast|gemm|dense OUT_DIR

`interop_awq.py`, where salience is, makes a checkpoint, runs all of these, and compares.

A check prints one JSON line and exits 1 when anything differs. `max_abs_difference` is between
AutoAWQ's dequantized weights and (codes - zeros) * scales of the expected codes, rounded to the
same dtype; it is null when some codes already differ.
"""

import argparse
import importlib.util
import json
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# `import awq` would import every model class of an old transformers: leave that file out.
_spec = importlib.util.find_spec("awq")
if _spec is None:
    sys.exit("AutoAWQ is not installed here; the top of this file says how to install it")
sys.modules["awq"] = importlib.util.module_from_spec(_spec)
from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402
from awq.modules.linear.gemv import WQLinear_GEMV  # noqa: E402
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast  # noqa: E402
from awq.utils.packing_utils import dequantize_gemm, reverse_awq_order, unpack_awq  # noqa: E402

BITS = 4
CLASSES = {"gemm": WQLinear_GEMM, "gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast}


def read_modules(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each quantized module's name and tensors, which may lie in different shards."""
    shards = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = safe_open(path, "pt")
        shards.update(dict.fromkeys(shard.keys(), shard))
    names = sorted(key.removesuffix(".qweight") for key in shards if key.endswith(".qweight"))
    if not names:
        sys.exit(f"{folder} holds no .safetensors file with a .qweight tensor")
    for name in names:
        keys = [key for key in ("qweight", "qzeros", "scales", "bias") if f"{name}.{key}" in shards]
        yield name, {key: shards[f"{name}.{key}"].get_tensor(f"{name}.{key}") for key in keys}


def unpack(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and zeros [out, groups], uint8, as AutoAWQ reads them."""
    packed = unpack_awq(tensors["qweight"], tensors["qzeros"], BITS)
    codes, zeros = reverse_awq_order(*packed, BITS)
    # AutoAWQ masks the nibbles last too: its shifts leave the higher ones in place.
    codes, zeros = ((x & (2**BITS - 1)).to(torch.uint8).t().contiguous() for x in (codes, zeros))
    return codes, zeros


def dequantize(tensors: dict[str, Tensor]) -> Tensor:
    """The weight [out, in] of AutoAWQ's layer after it has loaded the tensors."""
    in_features = tensors["qweight"].shape[0]
    groups, out_features = tensors["scales"].shape
    layer = WQLinear_GEMM(
        BITS, in_features // groups, in_features, out_features, "bias" in tensors, "cpu"
    )
    layer.load_state_dict(tensors)
    weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, BITS, layer.group_size)
    return weight.t()


def difference(tensors: dict[str, Tensor], codes: Tensor, zeros: Tensor) -> float:
    """Largest distance of AutoAWQ's weights from the grid values of `codes`."""
    weight = dequantize(tensors)
    group_size = codes.shape[1] // zeros.shape[1]
    steps = codes.float() - zeros.float().repeat_interleave(group_size, dim=1)
    grid = steps * tensors["scales"].t().float().repeat_interleave(group_size, dim=1)
    return (weight.float() - grid.to(weight.dtype).float()).abs().max().item()


def dump(folder: Path, out: Path) -> None:
    """Write every module's codes and zeros to `out`."""
    tensors = {}
    for name, module in read_modules(folder):
        tensors[f"{name}.codes"], tensors[f"{name}.zeros"] = unpack(module)
    save_file(tensors, out, versions())


def check(folder: Path, expected: Path) -> bool:
    """Compare every module with the expected codes, print the JSON line; whether all agree."""
    differing, differences = [], []
    with safe_open(expected, "pt") as file:
        keys = file.keys()
        wanted = {key.removesuffix(".codes") for key in keys if key.endswith(".codes")}
        found = set()
        for name, module in read_modules(folder):
            found.add(name)
            if name not in wanted:
                continue
            codes, zeros = file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.zeros")
            got_codes, got_zeros = unpack(module)
            if torch.equal(got_codes, codes) and torch.equal(got_zeros, zeros):
                differences.append(difference(module, codes, zeros))
            else:
                differing.append(name)
    differing += sorted(wanted ^ found)
    if differing:
        print("differ, or lie in one place only:", *differing, file=sys.stderr)
    report = {
        "modules": len(found),
        "identical": not differing,
        "max_abs_difference": None if differing else max(differences),
        "versions": versions(),
    }
    print(json.dumps(report))
    return not differing


def repack(folder: Path, version: str, out: Path) -> None:
    """Write the checkpoint with AutoAWQ's own layers of another version, or dense."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            tensors |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    for name, module in read_modules(folder):
        for key in module:
            del tensors[f"{name}.{key}"]
        state = {"weight": dequantize(module)}
        if "bias" in module:
            state["bias"] = module["bias"]
        if version != "dense":
            state = repacked(module, state, CLASSES[version])
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    if version == "dense":
        del config["quantization_config"]
    else:
        config["quantization_config"]["version"] = version
    (out / "config.json").write_text(json.dumps(config))


def repacked(
    module: dict[str, Tensor], state: dict[str, Tensor], kind: type[nn.Module]
) -> dict[str, Tensor]:
    """The state of AutoAWQ's layer of class `kind`, from a float weight and its grid."""
    rows, columns = state["weight"].shape
    linear = nn.Linear(columns, rows, "bias" in state, dtype=torch.float16)
    linear.load_state_dict(state)
    scales, zeros = module["scales"].t().contiguous(), unpack(module)[1].half()
    if kind is WQLinear_GEMM:  # its packer wants them the other way
        scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
    group_size = columns // len(module["scales"])
    layer = kind.from_linear(linear, BITS, group_size, scales=scales, zeros=zeros)
    return dict(layer.state_dict())


def versions() -> dict[str, str]:
    """What read the checkpoint."""
    packages = {name: version(name) for name in ("autoawq", "torch", "safetensors")}
    return packages | {"python": platform.python_version()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Read an AutoAWQ checkpoint with AutoAWQ's code.")
    parser.add_argument("checkpoint", type=Path, help="folder with the .safetensors files")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("-o", "--out", type=Path, help="write the codes and zeros here")
    mode.add_argument("--check", type=Path, help="compare with the codes and zeros in this file")
    mode.add_argument("--repack", nargs=2, metavar=("VERSION", "OUT_DIR"), help="write it anew")
    args = parser.parse_args()
    if args.repack:
        version, out = args.repack
        if version not in (*CLASSES, "dense"):
            parser.error(f"VERSION is {version}; use dense or one of {', '.join(CLASSES)}")
        repack(args.checkpoint, version, Path(out))
        return 0
    if args.out:
        dump(args.checkpoint, args.out)
        return 0
    return 0 if check(args.checkpoint, args.check) else 1


if __name__ == "__main__":
    sys.exit(main())
