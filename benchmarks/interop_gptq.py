"""GPTQModel and AutoGPTQ read what salience writes, and salience reads what GPTQModel writes.

The peers run in an environment of their own:

    python3 -m venv ~/gptqmodel
    ~/gptqmodel/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate datasets device-smi \
        threadpoolctl pypcre tokenicer logbar torchao defuser dill protobuf ninja setuptools wheel
    export BUILD_CUDA_EXT=0
    ~/gptqmodel/bin/pip install --no-deps --no-build-isolation gptqmodel==7.3.4 auto-gptq==0.7.1

and salience in its own, which starts them:

    PYTHONPATH=src:tests python benchmarks/interop_gptq.py WORK --peer ~/gptqmodel/bin/python \
        -o benchmarks/results/interop_gptq.json

WORK/float is a random two-block Llama; WORK/salience/NAME is a checkpoint that salience made of it,
WORK/gptqmodel/NAME one that GPTQModel quantized and saved. Beside each, NAME.READER.safetensors is
what a reader found in it: for each linear the codes and zeros, as integers [out, in], and the
logits on a few tokens, fp32. A peer's codes and zeros come from its own dequantizer: with scales of
1 it makes (code - zero), with codes of 0 as well, -zero.

The JSON says for each checkpoint whether all codes and zeros are identical, and the largest
relative difference of logits. It exits with 1 when anything differs or logits do by over 1e-3.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SALIENCE = (  # scheme, activation order
    *(("w4g32", False), ("w4g32-sym", False), ("w4g32", True), ("w4g32-sym", True)),
    *(("w3g32", True), ("w3g64-sym", True), ("w2g32", False), ("w2g32-sym", True)),
    *(("w8g64", True), ("w8g64-sym", False), ("w4channel", False), ("w4channel-sym", False)),
)
GPTQMODEL = (  # bits, group size, symmetric, activation order, checkpoint_format
    (4, 32, True, False, "gptq"),
    (4, 32, True, True, "gptq"),
    (4, 32, False, True, "gptq_v2"),
    (4, 32, False, False, "gptq"),
    (3, 32, True, True, "gptq"),
    (3, 64, False, False, "gptq_v2"),
    (2, 32, False, True, "gptq_v2"),
    (8, 64, True, False, "gptq"),
    (4, -1, True, False, "gptq_v2"),
)
MOST = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer", help="the Python of the peers' environment")
    parser.add_argument("-o", "--out", type=Path, help="results, a JSON file")
    parser.add_argument("--as-peer", action="store_true", help="run the peers' side, in theirs")
    args = parser.parse_args()
    if args.as_peer:
        peers(args.work)
        return 0
    make(args.work)
    command = [args.peer, str(Path(__file__).resolve()), str(args.work.resolve()), "--as-peer"]
    # GPTQModel's pools want two workers; compiling a dequantizer takes longer than running it.
    settings = {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": ""}
    # GPTQModel leaves a folder of logs where it is started.
    subprocess.run(command, check=True, env=os.environ | settings, cwd=args.work)
    for folder in folders(args.work / "gptqmodel"):
        read_as_salience(folder)
    return compare(args.work, args.out)


def folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


# salience's side.


def make(work: Path) -> None:
    """The float model, and salience's checkpoints of it."""
    import salience
    from tiny_models import TEXT, llama_config, make_model, random_tokens, save

    config = llama_config(num_hidden_layers=2, hidden_size=128, intermediate_size=256)
    save(make_model(config).half(), work / "float")
    (work / "text.txt").write_text(TEXT[:40_000])
    save_file({"input_ids": random_tokens()}, work / "tokens.safetensors")
    text = salience.Calibration(str(work / "text.txt"), samples=4, seqlen=128)
    for scheme, act_order in SALIENCE:
        out = work / "salience" / (scheme + ("-act-order" if act_order else ""))
        salience.quantize(
            str(work / "float"),
            out,
            method="gptq",
            format="gptq",
            scheme=scheme,
            act_order=act_order,
            calibration=text,
        )
        read_as_salience(out)


@torch.no_grad()
def read_as_salience(folder: Path) -> None:
    import salience
    from salience.formats import detect_format
    from salience.source import open_source
    from salience.structure import linears

    source = open_source(str(folder))
    config = source.config.quantization_config
    fmt, found = detect_format(config), {}
    stored = source.stored
    for name in linears(source.skeleton()):
        tensors = {part: f"{name}.{part}" for part in fmt.tensors}
        if tensors[fmt.marker] not in stored.names():
            continue
        parts = {part: stored.tensor(full) for part, full in tensors.items()}
        qt = fmt.read(parts, fmt.scheme(config, name))
        group = parts["g_idx"].long()
        found[f"{name}.codes"] = qt.q.int()
        found[f"{name}.zeros"] = qt.zeros.int()[:, group].contiguous()
    ids = load_file(folder.parents[1] / "tokens.safetensors")["input_ids"]
    model = salience.load(folder, kernel="reference")
    found["logits"] = model(input_ids=ids, use_cache=False).logits
    save_file(found, folder.with_name(f"{folder.name}.salience.safetensors"))


# The peers' side.


def import_gptqmodel() -> None:
    """Import GPTQModel without torchvision, which one of its vision models asks for by name."""
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():
        names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
        stubs: list[Any] = [types.ModuleType(name) for name in names]
        stubs[0].transforms, stubs[2].InterpolationMode = stubs[1], None
        sys.modules.update(zip(names, stubs, strict=True))
    import gptqmodel  # noqa: F401


def peers(work: Path) -> None:
    import_gptqmodel()
    quantize_as_gptqmodel(work)
    for folder in folders(work / "salience") + folders(work / "gptqmodel"):
        read_as_gptqmodel(folder)
    for folder in folders(work / "salience"):
        if json.loads((folder / "quantize_config.json").read_text())["sym"]:
            read_as_autogptq(folder)
    names = ("gptqmodel", "auto-gptq", "torch", "transformers")
    found = {name: version(name) for name in names} | {"python": platform.python_version()}
    (work / "peers.json").write_text(json.dumps(found))


def quantize_as_gptqmodel(work: Path) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    text = (work / "text.txt").read_text()
    pieces = [text[start : start + 500] for start in range(0, 8000, 500)]
    for bits, group_size, sym, desc_act, form in GPTQMODEL:
        config = QuantizeConfig(
            bits=bits,
            group_size=group_size,
            sym=sym,
            desc_act=desc_act,
            act_group_aware=False,
            format=form,
            offload_to_disk=False,
        )
        model = GPTQModel.load(str(work / "float"), config, device="cpu")
        model.quantize(pieces, batch_size=1, backend=BACKEND.GPTQ_TORCH)
        kind = ("-sym" if sym else "") + ("-act-order" if desc_act else "")
        size = "channel" if group_size == -1 else f"g{group_size}"
        model.save(str(work / "gptqmodel" / f"w{bits}{size}{kind}-{form}"))


@torch.no_grad()
def read_as_gptqmodel(folder: Path) -> None:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    config = json.loads((folder / "quantize_config.json").read_text())
    target = folder.with_name(f"{folder.name}.gptqmodel.safetensors")
    if not config["sym"] and config["checkpoint_format"] == "gptq":
        save_file(read_layers_as_gptqmodel(folder, config), target)
        return
    found: dict[str, Tensor] = {}
    loaded = GPTQModel.load(
        str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16
    )
    model = loaded.model
    nn.Module.float(model)  # scales and all: Transformers' own refuses to
    ids = load_file(folder.parents[1] / "tokens.safetensors")["input_ids"]
    found["logits"] = model(input_ids=ids, use_cache=False).logits
    for name, layer in model.named_modules():
        if isinstance(layer, TorchLinear):
            found |= unpack(name, layer, lambda layer=layer: layer.dequantize_weight().T)
    save_file(found, target)


def read_layers_as_gptqmodel(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Each linear by GPTQModel's layer and its conversion of version 1 to 2: it writes asymmetric
    weights of version 1, whose zeros borrow, and its loader refuses them.
    """
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    bits, group_size, desc_act = config["bits"], config["group_size"], config["desc_act"]
    found: dict[str, Tensor] = {}
    for name, parts in quantized(load_file(folder / "model.safetensors")):
        columns, rows = len(parts["g_idx"]), parts["scales"].shape[1]
        layer = TorchLinear(bits, group_size, False, desc_act, columns, rows).eval()
        for part, tensor in parts.items():
            getattr(layer, part).data = tensor.float() if part == "scales" else tensor
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        found |= unpack(name, layer, lambda layer=layer: layer.dequantize_weight().T)
    return found


@torch.no_grad()
def read_as_autogptq(folder: Path) -> None:
    """Each linear by AutoGPTQ's layer, of which only the file is imported: the package wants an
    old Transformers.
    """
    spec = importlib.util.find_spec("auto_gptq")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "nn_modules" / "qlinear" / "qlinear_cuda.py"
    file = importlib.util.spec_from_file_location("autogptq_qlinear", path)
    assert file is not None and file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    config = json.loads((folder / "quantize_config.json").read_text())
    found: dict[str, Tensor] = {}
    for name, parts in quantized(load_file(folder / "model.safetensors")):
        columns, rows = len(parts["g_idx"]), parts["scales"].shape[1]
        layer = module.QuantLinear(
            config["bits"], config["group_size"], columns, rows, False, weight_dtype=torch.float32
        )
        layer.load_state_dict(parts | {"scales": parts["scales"].float()})
        eye = torch.eye(columns)
        found |= unpack(name, layer, lambda layer=layer, eye=eye: layer(eye).T)
    save_file(found, folder.with_name(f"{folder.name}.autogptq.safetensors"))


def quantized(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each linear's name and packed tensors."""
    parts = ("qweight", "qzeros", "scales", "g_idx")
    for name in sorted(key.removesuffix(".qweight") for key in tensors if ".qweight" in key):
        yield name, {part: tensors[f"{name}.{part}"] for part in parts}


def unpack(name: str, layer: Any, dequantize: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Codes and zeros [out, in] by a layer's own dequantizer; the layer is spent afterwards."""
    layer.scales.data = torch.ones_like(layer.scales.data)
    steps = dequantize().round().int()
    layer.qweight.data = torch.zeros_like(layer.qweight.data)
    zeros = -dequantize().round().int()
    return {f"{name}.codes": (steps + zeros).contiguous(), f"{name}.zeros": zeros.contiguous()}


# Both.


def compare(work: Path, out: Path | None) -> int:
    rows, good = [], True
    for writer in ("salience", "gptqmodel"):
        for folder in folders(work / writer):
            ours = load_file(folder.with_name(f"{folder.name}.salience.safetensors"))
            for reader in ("gptqmodel", "autogptq"):
                path = folder.with_name(f"{folder.name}.{reader}.safetensors")
                if not path.exists():
                    continue
                theirs, row = load_file(path), {"written by": writer, "checkpoint": folder.name}
                codes = {key for key in ours if key != "logits"}
                same = codes == theirs.keys() - {"logits"} and all(
                    torch.equal(ours[key], theirs[key]) for key in codes
                )
                row |= {"read by": ["salience", reader], "linears": len(codes) // 2}
                row |= {"identical codes and zeros": same}
                good &= same and bool(codes)
                if "logits" in theirs:
                    reference = ours["logits"].double()
                    apart = (theirs["logits"].double() - reference).norm() / reference.norm()
                    row["relative difference of logits"] = float(f"{apart.item():.2e}")
                    good &= apart.item() <= MOST
                rows.append(row)
                print(json.dumps(row))
    result = {"versions": json.loads((work / "peers.json").read_text()), "checkpoints": rows}
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
